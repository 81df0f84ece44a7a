# SPDX-License-Identifier: Apache-2.0
"""Words as a model writes them, and what CTC says of models of each kind."""

import pytest
import torch
from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel, EncDecRNNTBPEModel
from nemo_models import LETTERS, canary, characters, transducer

from nemo_mtbi.prepare.alignment.ctc import CTCModel
from nemo_mtbi.testing import WORDS


@pytest.fixture(scope="module")
def models(asr_model, tmp_path_factory):
    hybrid = transducer(EncDecHybridRNNTCTCBPEModel, tmp_path_factory.mktemp("hybrid"))
    return {"ctc": CTCModel(asr_model), "hybrid": CTCModel(hybrid), "characters": CTCModel(characters())}


@pytest.mark.parametrize("kind", ["ctc", "hybrid", "characters"])
def test_every_kind_aligns_a_batch_as_its_utterances(models, kind):
    model = models[kind]
    generator = torch.Generator().manual_seed(0)
    audio = [0.1 * torch.randn(n, generator=generator) for n in (32000, 20000, 26000)]
    words = [WORDS[:3], WORDS[3:5], WORDS[1:4]]
    tokens = [[token for word in row for token in model.tokens(word)] for row in words]
    together = model.align(model.encode(audio), tokens)
    for samples, row, found in zip(audio, tokens, together, strict=True):
        (alone,) = model.align(model.encode([samples]), [row])
        assert (alone.first, alone.last) == (found.first, found.last)
        assert alone.probability == pytest.approx(found.probability, rel=1e-3)
        assert len(found.first) == len(row) and list(found.first) == sorted(found.first)
        assert all(a <= b for a, b in zip(found.first, found.last, strict=True))
        assert found.last[-1] < model.counter(len(samples)) and all(0 < p <= 1 for p in found.probability)


def test_the_frames_of_features_and_of_ctc_fit_together(models):
    output = models["ctc"].encode([torch.randn(48000)])
    assert models["ctc"].hop == 160 and models["ctc"].stride == 8
    assert output.log_probs.shape[2] == len(models["ctc"].pieces) + 1
    assert output.log_probs.exp().sum(-1) == pytest.approx(torch.ones(output.log_probs.shape[:2]), abs=1e-4)
    assert abs(int(output.feature_lengths) / models["ctc"].stride - int(output.lengths)) <= 1


def test_an_utterance_that_is_too_short_has_no_alignment(models):
    model = models["ctc"]
    row = [token for _ in range(30) for token in model.tokens(WORDS[0])]
    assert model.align(model.encode([torch.randn(8000)]), [row]) == [None]


@pytest.mark.parametrize(
    "word, letters",
    [
        ("cat", "cat"),
        ("Cat!", "cat"),
        ("“don’t”", "don't"),
        ("naïve", "naive"),
        ("'quoted'", "quoted"),
        ("ｗｉｄｅ", "wide"),
    ],
)
def test_words_are_written_as_the_model_knows_them(models, word, letters):
    model = models["characters"]
    assert model.tokens(word) == [LETTERS.index(c) for c in letters]


def test_what_has_no_sound_and_what_the_model_does_not_know(models):
    for model in models.values():
        assert model.tokens("–") == model.tokens("...") == []
        assert all(model.tokens(word) is None for word in ("12", "日本", "20th", "mp3"))


def test_upper_case_models_get_upper_case(asr_model):
    model = CTCModel(asr_model)
    model._alphabet, model._fold = set("ABC"), str.upper
    assert model._write("Cab,") == "CAB"


def test_a_model_without_ctc_is_refused(tmp_path):
    with pytest.raises(ValueError, match="EncDecRNNTBPEModel has no CTC head"):
        CTCModel(transducer(EncDecRNNTBPEModel, tmp_path / "rnnt"))
    with pytest.raises(ValueError, match="EncDecMultiTaskModel has no CTC head"):
        CTCModel(canary(tmp_path / "canary"))
