# SPDX-License-Identifier: Apache-2.0
"""The cascade of a model whose encoder is Whisper's, and that all systems are checked before the first answers."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_mtbi.testing import tiny_cuts

ROOT = Path(__file__).resolve().parents[2]
hf = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "hf_models.py")))
POOL = """\
tasks:
  - {name: repeat, scoring: wer, split: train, prompts: {train: [say it]}}
  - {name: first, scoring: exact, split: train, prompts: {train: [first word]}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A manifest without references."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "pool.yaml").write_text(POOL)
    tiny_cuts(folder, 3, behaviors=False)
    return folder


@pytest.fixture(scope="module")
def model(model_section, tmp_path_factory):
    """A model with the encoder of Whisper, and the directory of that one."""
    from nemo_mtbi.models.mtbi_model import MTBIModel

    folder = tmp_path_factory.mktemp("model")
    whisper = hf.hf_encoder(folder / "whisper", "whisper")
    section = model_section(pretrained_asr=str(whisper), encoder={"pad": False}, train_ds=None, validation_ds=None)
    MTBIModel(section).save_to(str(folder / "m.nemo"))
    return folder / "m.nemo", whisper


def evaluate(out, corpus, systems):
    cfg = OmegaConf.load(ROOT / "conf" / "mtbi_eval.yaml")
    cfg.systems = systems
    cfg.sets = {"test": {"cuts": str(next(corpus.glob("*.jsonl*"))), "tasks": str(corpus / "pool.yaml")}}
    cfg.update({"output_dir": str(out), "resamples": 20, "examples": 0, "cuda": -1, "kl_utterances": 0})
    runpy.run_path(str(ROOT / "examples" / "mtbi_eval.py"))["main"](cfg)
    found = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return found["sets"]["test"], rows, (out / "results.md").read_text()


def test_a_cascade_that_cannot_transcribe_is_refused_before_others_answer(model, corpus, tmp_path):
    nemo, whisper = model
    systems = {"mtbi": {"nemo": str(nemo)}, "text": {"kind": "text", "of": "mtbi"}}
    cases = {
        "asr": ({}, rf"can't transcribe with {whisper}: it holds Whisper's decoder without its tokenizer"),
        "model": ({"asr": str(nemo)}, "it names the class nemo_mtbi.models.mtbi_model.MTBIModel"),
        "text": ({"asr": str(corpus / "pool.yaml")}, "it is not the .nemo of a NeMo ASR model"),
    }
    for given, message in cases.values():
        with pytest.raises(ValueError, match=message) as error:
            evaluate(tmp_path, corpus, {**systems, "cascade": {"kind": "cascade", "of": "mtbi", **given}})
        assert "systems.cascade.hypotheses" in str(error.value) and "~systems.cascade" in str(error.value)
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_every_seed_is_looked_at_before_the_first_is_asked(model, model_section, corpus, tmp_path):
    nemo, _ = model
    torn, recognizer = tmp_path / "torn.nemo", model_section()["pretrained_asr"]
    torn.write_bytes(nemo.read_bytes()[:2000])
    for second, message in ((torn, "systems.mtbi.nemo: .*torn.nemo can't be restored"), (recognizer, "key asr")):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "out", corpus, {"mtbi": {"nemo": [str(nemo), str(second)]}})
    unlogged = {"mtbi": {"nemo": str(nemo), "logs": [str(tmp_path)]}}
    with pytest.raises(ValueError, match=f"systems.mtbi.logs={tmp_path} holds no TensorBoard log .* leave logs out"):
        evaluate(tmp_path / "out", corpus, unlogged)
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("count", [1, 2])
def test_sets_of_one_and_of_two_utterances(model, corpus, tmp_path, count):
    from lhotse import CutSet

    from nemo_mtbi.data.cut_files import write_cuts

    (tmp_path / "pool.yaml").write_text(POOL)
    write_cuts(tmp_path / "cuts.jsonl.gz", list(CutSet.from_file(next(corpus.glob("*.jsonl*"))))[:count])
    systems = {"mtbi": {"nemo": str(model[0])}, "text": {"kind": "text", "of": "mtbi"}}
    found, rows, _ = evaluate(tmp_path / "out", tmp_path, systems)
    assert found["utterances"] == count and len(rows) == 2 * 2 * count


def test_cascades_of_whisper_and_of_transcripts_made_elsewhere(model, corpus, tmp_path):
    nemo, whisper = model
    hf.add_whisper_tokenizer(whisper)
    from lhotse import CutSet

    cuts = list(CutSet.from_file(next(corpus.glob("*.jsonl*"))))
    texts = {cut.id: cut.supervisions[0].text for cut in cuts}
    written = tmp_path / "h.jsonl"
    written.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))
    systems = {
        "mtbi": {"nemo": str(nemo)},
        "whisper": {"kind": "cascade", "of": "mtbi"},
        "right": {"kind": "cascade", "of": "mtbi", "hypotheses": str(written)},
        "text": {"kind": "text", "of": "mtbi"},
    }
    found, rows, table = evaluate(tmp_path / "out", corpus, systems)
    answers = {name: [row["answer"] for row in rows if row["system"] == name] for name in systems}
    assert answers["right"] == answers["text"] != answers["whisper"]
    # no reference to the task of transcription: the transcript is
    assert {row["reference"] for row in rows if row["task"] == "repeat"} == set(texts.values())
    assert {row["reference"] for row in rows if row["task"] == "first"} == {None}
    assert "task 'repeat' has no right answers in the cuts: their transcripts are taken" in found["notes"][0]
    for name in ("mtbi", "whisper", "right"):
        rates = found["systems"][name]["seen"]["transcription"]
        assert rates["wer"]["n"] == rates["cer"]["n"] == 3 and rates["wer"]["value"] > 0
    assert "| system | prompts | WER of the transcription | CER of the transcription | n |" in table
    written.write_text(written.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match=f"lacks 1 of the 3 utterances of set 'test': {cuts[0].id}"):
        evaluate(tmp_path / "again", corpus, systems)
