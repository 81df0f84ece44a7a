# SPDX-License-Identifier: Apache-2.0
"""``examples/mtbi_eval.py`` with tiny models: from a configuration to the report, killed, and with wrong input."""

import json
import os
import runpy
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf

from nemo_mtbi.data.cut_files import write_cuts
from nemo_mtbi.evaluation.settings import parse_eval_config, read_sets
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.testing import tiny_cuts

ROOT = Path(__file__).resolve().parents[2]
FILES = ("predictions.jsonl", "results.json", "results.md", "report.html")
POOL = """\
tasks:
  - {name: repeat, scoring: wer, split: train, prompts: {train: [say it, repeat it], heldout: [say]}}
  - {name: first, scoring: exact, split: train, prompts: {train: [first word]}}
  - {name: count, scoring: exact, split: heldout, prompts: {train: [count it, count the words]}}
"""


def slower(cut, folder):
    """The cut with its audio at 8 kHz, in stereo."""
    path = folder / f"{cut.id}-8k.wav"
    samples = cut.resample(8000).load_audio()[0]
    soundfile.write(path, np.stack([samples, samples], axis=1), 8000)
    found = Recording.from_file(path).to_cut()
    found.id, found.supervisions = cut.id, cut.supervisions
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A manifest of five utterances, one of them at another sample rate, with right answers but for one."""
    folder = tmp_path_factory.mktemp("corpus")
    cuts = list(CutSet.from_file(tiny_cuts(folder, 5, behaviors=False)))
    cuts[1] = slower(cuts[1], folder)
    for cut in cuts[:4]:
        words = cut.supervisions[0].text.split()
        cut.custom = {"references": {"repeat": " ".join(words), "first": words[0], "count": str(len(words))}}
    write_cuts(folder / "mixed.jsonl.gz", cuts)
    (folder / "pool.yaml").write_text(POOL)
    return folder


@pytest.fixture(scope="module")
def models(model_section, tmp_path_factory):
    """The ``.nemo`` files of two seeds."""
    from nemo_mtbi.models.mtbi_model import MTBIModel

    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        seed_everything(seed, verbose=False)
        MTBIModel(model_section(train_ds=None, validation_ds=None)).save_to(str(folder / f"{seed}.nemo"))
    return [str(folder / f"{seed}.nemo") for seed in (0, 1)]


@pytest.fixture(scope="module")
def keys(models, corpus):
    """``keys(folder, **changes)``: a configuration, of the script's own YAML where nothing else is said."""

    def make(folder, systems=None, sets=None, **changes):
        cfg = OmegaConf.load(ROOT / "conf" / "mtbi_eval.yaml")
        if systems is None:
            cfg.systems.mtbi.nemo = models
        else:
            cfg.systems = systems
        tests = {
            "test": {"cuts": str(corpus / "mixed.jsonl.gz"), "tasks": str(corpus / "pool.yaml"), "wordings": None}
        }
        cfg.sets = tests if sets is None else sets
        cfg.update({"output_dir": str(folder), "resamples": 50, "examples": 2, "cuda": -1, **changes})
        return cfg

    return make


def evaluate(cfg):
    return runpy.run_path(str(ROOT / "examples" / "mtbi_eval.py"))["main"](cfg)


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(keys(folder))
    return folder


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n")[:-1]]


def test_answers_are_those_of_the_model(whole, models, corpus):
    from nemo_mtbi.models.mtbi_model import MTBIModel

    cuts = CutSet.from_file(corpus / "mixed.jsonl.gz")
    paths = {cut.id: cut.recording.sources[0].source for cut in cuts}
    texts = {cut.id: cut.supervisions[0].text for cut in cuts}
    found = predictions(whole)
    assert len(found) == 4 * 5 * 6  # two seeds, cascade and text; five utterances under six wordings
    for seed, path in enumerate(models):
        model = MTBIModel.restore_from(path, map_location="cpu")
        rows = [row for row in found if row["system"] == "mtbi" and row["seed"] == seed]
        answers = model.generate([paths[row["utterance"]] for row in rows], [row["prompt"] for row in rows])
        assert answers == [row["answer"] for row in rows] and len(set(answers)) > 3
    rows = [row for row in found if row["system"] == "text"]
    answers = model.responder().text([(row["prompt"], texts[row["utterance"]]) for row in rows])
    assert answers == [row["answer"] for row in rows]
    right = [row["answer"] == row["reference"] for row in rows if row["metric"] == "exact" and row["reference"]]
    assert right == [row["score"] == 1.0 for row in rows if row["metric"] == "exact" and row["reference"]]


def test_results_say_what_was_measured(whole):
    found = json.loads((whole / "results.json").read_text())["sets"]["test"]
    assert found["groups"] == ["seen", "heldout_wordings", "heldout_tasks"]
    seen = found["systems"]["mtbi"]["seen"]
    assert (seen["n"], seen["n_scored"], seen["utterances"], seen["seeds"]) == (15, 12, 5, 2)
    assert {"agreement", "behavior_gap", "anchor_bias", "prompt_worst"} <= set(seen) and "wer" in seen["metrics"]
    assert 0 < seen["mean_kl"]["low"] <= seen["mean_kl"]["value"] and "mean_kl" not in found["systems"]["text"]["seen"]
    assert seen["uncrossed"] == [] and "agreement" not in found["systems"]["text"]["seen"]
    assert "6 of 30 questions have no right answer" in found["notes"][0]
    compared = {(row["system"], row["measure"]) for row in found["comparisons"]}
    assert compared == {("cascade", "right"), ("cascade", "agreement"), ("text", "right")}
    assert "| mtbi |" in (whole / "results.md").read_text()
    speeds = json.loads((whole / "throughput.json").read_text())
    assert all(speeds[name]["tokens_per_second"] > 0 for name in ("mtbi", "cascade", "text"))


def test_divergences_are_those_of_validation(whole, models, corpus):
    """KL on the tokens of the text's answers, as a training with ``model.loss.kl_weight`` measures it."""
    from nemo_mtbi.config.loss import LossConfig
    from nemo_mtbi.data.audio import load_samples
    from nemo_mtbi.layouts.layout import collate, make_row, speech
    from nemo_mtbi.models.mtbi_model import MTBIModel

    cuts = {cut.id: cut for cut in CutSet.from_file(corpus / "mixed.jsonl.gz")}
    found = predictions(whole)
    read = {(row["utterance"], row["prompt"]): row for row in found if row["system"] == "text"}
    model = MTBIModel.restore_from(models[1], map_location="cpu")
    chat, speech_llm = model.responder().chat, model.speech_llm
    speech_llm.loss = LossConfig(kl_weight=1.0)
    rows = [row for row in found if row["system"] == "mtbi" and row["seed"] == 1]
    assert all(row["kl"] is None for row in read.values()) and len({row["kl"] for row in rows}) > 10
    for row in rows[::5]:
        text = read[row["utterance"], row["prompt"]]
        samples = load_samples(cuts[row["utterance"]], speech_llm.frame_counter)
        frames = speech_llm.frame_counter(len(samples))
        response = chat.response(text["answer"], text["truncated"])
        slots = speech(0, frames), chat.encode(text["transcript"])
        heard, twin = (make_row(chat.prompt(row["prompt"], slot), response) for slot in slots)
        batch = collate([samples], [frames], [replace(heard, utterance=0, twin=twin)], 1000)
        _, parts = speech_llm.evaluate_step(batch)
        assert row["kl"] == pytest.approx(parts["kl"].item() / len(response), rel=1e-3, abs=1e-5)


class Page(HTMLParser):
    """Collects what a page refers to, and its tags."""

    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "poster", "data")]


def test_report_needs_nothing_else(whole):
    page, text = Page(), (whole / "report.html").read_text()
    page.feed(text)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert "@import" not in text and "url(" not in text and "prefers-color-scheme:dark" in text
    assert (
        page.tags.count("audio") == 2 and page.tags.count("svg") == 4
    )  # bars of two measures, wordings of two groups
    assert page.tags.count("table") >= 4


@pytest.mark.slow
def test_neither_batches_nor_order_change_a_byte(whole, keys, corpus, tmp_path):
    cuts = list(CutSet.from_file(corpus / "mixed.jsonl.gz"))
    write_cuts(tmp_path / "turned.jsonl.gz", cuts[::-1])
    tests = {"cuts": str(tmp_path / "turned.jsonl.gz"), "tasks": str(corpus / "pool.yaml"), "wordings": None}
    evaluate(keys(tmp_path / "out", sets={"test": tests}, batch_size=2, batch_tokens=60, cache_gib=0))
    out = tmp_path / "out"
    assert (out / "results.md").read_bytes() == (whole / "results.md").read_bytes()
    for row, same in zip(predictions(out), predictions(whole), strict=True):
        assert row.pop("kl") == pytest.approx(same.pop("kl"), abs=1e-5)  # a float, not a choice
        assert row == same


@pytest.mark.slow
@pytest.mark.parametrize("moment", [7, 20])
def test_a_run_that_was_killed_ends_with_the_same_bytes(whole, keys, tmp_path, monkeypatch, moment):
    calls, replace = [], os.replace

    def die(source, target):
        calls.append(target)
        if len(calls) > moment:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(keys(tmp_path))
    monkeypatch.setattr(os, "replace", replace)
    done = [*tmp_path.rglob("answers/*/*/*.jsonl"), *tmp_path.rglob("divergences/*/*/*.jsonl")]
    times = {path: path.stat().st_mtime_ns for path in done}
    evaluate(keys(tmp_path))
    assert content(tmp_path) == content(whole)
    assert len(done) == moment and times == {path: path.stat().st_mtime_ns for path in done}


def test_a_finished_run_loads_no_model(whole, keys, monkeypatch):
    from nemo_mtbi.models.mtbi_model import MTBIModel

    before = content(whole)
    monkeypatch.setattr(MTBIModel, "restore_from", lambda *args, **kwargs: pytest.fail("it was loaded"))
    evaluate(keys(whole))
    assert content(whole) == before


def test_answers_of_another_model_are_not_taken_for_its_own(whole, keys, models):
    swapped = {"mtbi": {"nemo": models[::-1]}, "text": {"kind": "text", "of": "mtbi"}}
    with pytest.raises(ValueError, match="answers of another model"):
        evaluate(keys(whole, systems=swapped))


def test_a_second_run_in_one_folder_is_refused(keys, tmp_path):
    with (
        exclusive(tmp_path / "answers"),
        pytest.raises(RuntimeError, match="output_dir=.*is being written by another"),
    ):
        evaluate(keys(tmp_path))
    assert not list(tmp_path.iterdir())


def test_bad_audio_is_an_error_or_a_counted_abstention(keys, corpus, tmp_path):
    cuts = list(CutSet.from_file(corpus / "mixed.jsonl.gz"))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    cuts[0].recording.sources[0].source = str(tmp_path / "broken.wav")
    write_cuts(tmp_path / "cuts.jsonl.gz", cuts)
    tests = {"cuts": str(tmp_path / "cuts.jsonl.gz"), "tasks": str(corpus / "pool.yaml"), "wordings": 1}
    with pytest.raises(ValueError, match=f"{cuts[0].id} cannot be read"):
        evaluate(keys(tmp_path / "out", sets={"test": tests}))
    evaluate(keys(tmp_path / "out", sets={"test": tests}, on_bad_audio="abstain"))
    rows = [row for row in predictions(tmp_path / "out") if row["utterance"] == cuts[0].id]
    heard = [row for row in rows if row["system"] != "text"]
    assert {(row["answer"], row["unheard"], row["score"]) for row in heard} == {("", "unreadable", 0.0)}
    assert all(row["unheard"] is None for row in rows if row["system"] == "text")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["test"]["systems"]
    assert found["mtbi"]["heldout_tasks"]["unheard"] == 2 and found["mtbi"]["heldout_tasks"]["abstained"] == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"systems": {"a": {"nemo": "missing.nemo"}}}, "systems.a.nemo=missing.nemo does not exist"),
        ({"systems": {"a": {"kind": "text", "of": "b"}}}, "systems.a.of=b is no system of kind speech"),
        (
            {"systems": {"a": {"kind": "cascade", "llm": "demo"}}},
            "systems.a: set of to a speech system, or llm",
        ),
        ({"systems": {"a": {"kind": "oracle"}}}, "must be one of speech, cascade, text"),
        ({"systems": {"a": {"nemmo": "x"}}}, "nemmo"),
        ({"systems": {}}, "must each name at least one"),
        ({"sets": {"s": {"tasks": "demo"}}}, "sets.s: set cuts"),
        ({"sets": {"s": {"format": "mmlu", "path": "x"}}}, "format must be one of llaso_eval, speech_ifeval"),
        ({"sets": {"s": {"cuts": "nowhere.jsonl"}}}, "sets.s.cuts=nowhere.jsonl does not exist"),
        ({"on_bad_audio": "skip"}, "raise or abstain"),
        ({"kl_utterances": -1}, "kl_utterances is -1"),
        ({"compare_with": "x"}, "compare_with=x is no system"),
        ({"compare": [["mtbi", "x"]]}, r"compare holds \['mtbi', 'x'\]; each pair must name two of mtbi"),
        ({"compare": [["mtbi", "mtbi"]]}, "each pair must name two of"),
    ],
)
def test_wrong_configurations_are_refused_before_a_model_is_loaded(keys, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_sets(parse_eval_config(keys(tmp_path, **change)))


def test_a_set_without_anything_to_compare_with_is_refused(keys, corpus, models, tmp_path):
    cuts = [cut.with_custom("references", None) for cut in CutSet.from_file(corpus / "mixed.jsonl.gz")]
    write_cuts(tmp_path / "bare.jsonl.gz", cuts)
    tests = {"cuts": str(tmp_path / "bare.jsonl.gz"), "tasks": str(corpus / "pool.yaml"), "only": ["first"]}
    with pytest.raises(ValueError, match="no right answers, and there is no text system"):
        evaluate(keys(tmp_path / "out", systems={"mtbi": {"nemo": models[0]}}, sets={"test": tests}))
    both = {"mtbi": {"nemo": models[0]}, "text": {"kind": "text", "of": "mtbi"}}
    evaluate(keys(tmp_path / "out", systems=both, sets={"test": tests}, kl_utterances=2))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["test"]["systems"]
    assert found["mtbi"]["seen"]["agreement"]["value"] is not None and found["mtbi"]["seen"]["mean_kl"]["n"] == 2
    measured = [row["utterance"] for row in predictions(tmp_path / "out") if row["kl"] is not None]
    assert measured == sorted({cut.id for cut in cuts})[:2]
    assert not any("right" in figures["seen"] for figures in found.values())
