# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch
from lhotse import CutSet

from nemo_mtbi.data.behaviors import check_provenance, read_behaviors, transcript, word_times
from nemo_mtbi.speech_llm.pretrained import load_text_llm
from nemo_mtbi.testing import NUMBERS, PROMPTS, TURN, WORDS, tiny_cuts, tiny_speech_llm, tiny_text_llm, tiny_tokenizer


@pytest.fixture(scope="module")
def llm(llm_dir):
    return load_text_llm(llm_dir)


def test_the_tokenizer_knows_every_word_and_any_other(llm, llm_dir, tmp_path):
    for text in (*WORDS, *NUMBERS, *(prompt for prompts in PROMPTS.values() for prompt in prompts), "quixotic jazz"):
        assert llm.chat.decode(llm.chat.encode(text)) == text
    assert all(len(llm.chat.encode(word)) == 1 for word in WORDS)
    ids = llm.chat.prompt("say it", [-1, -2])
    assert len(ids) == 3 + 2 + len(llm.chat.encode("say it")) and TURN[3] == "{audio}" and ids[-3:-1] == [-1, -2]
    assert tiny_tokenizer(tmp_path).read_bytes() == (llm_dir / "tokenizer.model").read_bytes()


def test_cuts_hold_audio_word_times_and_behaviors_of_the_llm(llm, llm_dir, tmp_path):
    cuts = list(CutSet.from_file(tiny_cuts(tmp_path, 12, seed=4, llm=llm_dir)))
    assert len(cuts) == len({cut.id for cut in cuts}) == 12
    for cut in cuts:
        samples = cut.load_audio()[0]
        assert len(samples) == cut.num_samples and 0.1 < np.abs(samples).max() < 0.5
        spans, words = word_times(cut), transcript(cut).split()
        assert len(spans) == len(words) and spans[-1].end_s < cut.duration
        tones = [int(span.start_s * 16000) for span in spans]
        assert all(np.abs(samples[start : start + 3200]).mean() > 0.1 for start in tones)  # something is said there
        check_provenance(cut, {"llm": llm.fingerprint, "chat": llm.chat.fingerprint()})
        answers = {behavior.task: behavior.response for behavior in read_behaviors(cut)}
        assert answers["last"] == words[-1] and answers["count"] == NUMBERS[len(words) - 1]
    assert len({transcript(cut) for cut in cuts}) > 6


def test_cuts_without_behaviors_wait_for_targets(tmp_path):
    (cut,) = CutSet.from_file(tiny_cuts(tmp_path, 1, behaviors=False))
    with pytest.raises(ValueError, match="carries no behaviors"):
        read_behaviors(cut)


def test_the_same_seed_gives_the_same_and_another_gives_another(tmp_path):
    texts = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cuts = list(CutSet.from_file(tiny_cuts(tmp_path / name / "cuts", 3, seed)))
        audio = np.concatenate([cut.load_audio()[0] for cut in cuts])
        weights = (tiny_text_llm(tmp_path / name / "llm", seed) / "model.safetensors").read_bytes()
        texts[name] = ([transcript(cut) for cut in cuts], audio.tobytes(), weights)
    assert texts["a"] == texts["b"]
    assert all(one != other for one, other in zip(texts["a"], texts["c"], strict=True))


def test_a_speech_llm_is_reproducible_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    state, python_state = torch.get_rng_state(), random.getstate()
    first, second, other = tiny_speech_llm(1), tiny_speech_llm(1), tiny_speech_llm(2)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    weights, same, others = (dict(model.named_parameters()) for model in (first, second, other))
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    for part in ("encoder.encoder.layers.0", "connector.mlp.0", "chunks.0.decoder.layers.0.mlp.linear_fc1"):
        matrices = [name for name, value in weights.items() if name.startswith(part) and value.ndim > 1]
        assert matrices and not all(torch.equal(weights[name], others[name]) for name in matrices)
