# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a training: its questions, its answers, and results of one schema. The systems are fakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_pool import POOL
from lhotse import CutSet

from nemo_mtbi.demo.corpora.corpus import write_flac
from nemo_mtbi.evaluation.benchmark import (
    TrainingRecord,
    benchmark_config,
    benchmark_results,
    benchmark_set,
    run_benchmark,
)
from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.evaluation.items import Reply, load_clip
from nemo_mtbi.evaluation.questions import NEW_TASKS, NEW_WORDINGS, SEEN, questions
from nemo_mtbi.evaluation.results import is_evaluation
from nemo_mtbi.evaluation.systems import Slots
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.testing import tiny_cuts

FRAMES = FrameCounter((LengthStage(400, 160),), 16000)
RECORD = TrainingRecord(12.5, 300, 1.25)
KEYS = {"seed", "train", "nemo", "transcription", "behavior", "tasks", "title", "systems", "sets", "not_measured"}


class FakeSystem:
    """Answers with the first or last word of the transcript, or all of it; ``loud`` marks one utterance in speech."""

    def __init__(self, loud=None):
        self.loud, self.batches, self.audio = loud, [], []

    def slots(self, clips):
        if self.loud is None:
            return Slots([clip.transcript for clip in clips])
        self.audio = [load_clip(clip, FRAMES) for clip in clips]
        bad = [x if isinstance(x, Exception) else None for x in self.audio]
        return Slots([problem or clip.transcript for problem, clip in zip(bad, clips, strict=True)])

    def ask(self, slots, requests, on_bad_audio, progress):
        assert on_bad_audio == "raise"
        progress(len(requests))
        self.batches.append(list(requests))
        texts = [self.answer(prompt, slots.values[clip]) + "!" * (clip == self.loud) for prompt, clip in requests]
        return [Reply(text, 3, text.endswith("!")) for text in texts]

    @staticmethod
    def answer(prompt, text):
        words = text.split()
        return words[0] if "first" in prompt else words[-1] if prompt in ("last word", "the end") else text


@pytest.fixture
def cuts(tmp_path):
    found = list(CutSet.from_file(tiny_cuts(tmp_path, 4, behaviors=False)))
    for cut in found[:3]:
        words = cut.supervisions[0].text.split()
        cut.custom = {"references": {"say": " ".join(words), "first": words[0], "last": words[-1]}}
    return found


@pytest.mark.parametrize("progress", [False, True])
def test_text_and_speech_answer_the_same_questions_at_once(cuts, progress):
    text, speech, chosen = FakeSystem(), FakeSystem(loud=1), benchmark_set(iter(cuts), POOL, 5)
    answered = run_benchmark(speech, text, chosen, progress=progress)
    rows = questions(cuts, POOL, 5)
    assert text.batches == speech.batches == [[(row.prompt, row.utterance) for row in rows]]
    assert [len(samples) for samples in speech.audio] == [cut.num_samples for cut in cuts]
    for item, row in zip(chosen.items, rows, strict=True):
        assert (item.clip, item.task, item.group) == (row.utterance, row.task.name, row.group)
        references = (cuts[row.utterance].custom or {}).get("references") or {}
        assert item.reference == references.get(row.task.name)
    assert [clip.transcript for clip in chosen.clips] == [cut.supervisions[0].text for cut in cuts]
    assert list(answered.systems) == ["mtbi", "text"] and answered.systems["mtbi"].items is chosen.items
    assert answered.systems["mtbi"].answers(0)[-1] == answered.systems["text"].answers(0)[-1]


def results_of(cuts, folder):
    answered = run_benchmark(FakeSystem(loud=1), FakeSystem(), benchmark_set(cuts, POOL, 0), progress=False)
    return benchmark_results(benchmark_config("tiny", folder / "tiny.nemo"), answered, 3, RECORD)


def test_results_have_the_schema_of_an_evaluation_and_the_summary(cuts, tmp_path):
    path = write_json(tmp_path / "results.json", results_of(cuts, tmp_path))
    results = json.loads(path.read_text())
    assert set(results) == KEYS
    assert (results["seed"], results["nemo"]) == (3, str(tmp_path / "tiny.nemo"))
    assert results["train"] == {"seconds": 12.5, "steps": 300, "peak_rss_gib": 1.25}
    speech = results["sets"]["test"]["systems"]["mtbi"]
    assert set(speech) == {SEEN, NEW_WORDINGS, NEW_TASKS} and results["systems"]["text"]["kind"] == "text"
    assert speech[SEEN]["truncated"] == 3 and speech[SEEN]["agreement"]["low"] < 0.75
    for group, figures in results["behavior"].items():
        assert figures["agreement"] == speech[group]["agreement"]["value"]
        assert figures["text"] == results["sets"]["test"]["systems"]["text"][group]["right"]["value"]
    assert not is_evaluation(tmp_path)  # an evaluation must not replace the results of a training


def test_figures_follow_from_the_answers(cuts, tmp_path):
    """The answers to the speech of one utterance in four differ."""
    results = results_of(cuts, tmp_path)
    counts = {group: figures["n"] for group, figures in results["behavior"].items()}
    assert counts == {SEEN: 12, NEW_WORDINGS: 8, NEW_TASKS: 4}
    assert [figures["agreement"] for figures in results["behavior"].values()] == [0.75] * 3
    assert results["tasks"]["last"]["heldout"] and results["tasks"]["last"]["n_scored"] == 3
    assert results["transcription"] == {"wer": 0.0, "n": 4}  # a mark at the end is not an error


def test_a_benchmark_leaves_nothing_out(cuts):
    write_flac(Path(cuts[2].recording.sources[0].source), np.zeros(cuts[2].num_samples))
    text = FakeSystem()
    with pytest.raises(ValueError, match="tiny-0-0002 is silent"):
        run_benchmark(FakeSystem(loud=1), text, benchmark_set(cuts, POOL, 0), progress=False)
    assert not text.batches  # before any answer


def test_wrong_sets_are_errors_before_the_training(cuts):
    with pytest.raises(ValueError, match="set 'test' is empty"):
        benchmark_set([], POOL, 0)
    with pytest.raises(ValueError, match="several utterances with the id"):
        benchmark_set([cuts[0], cuts[0]], POOL, 0)
    cuts[1].custom = {"references": {"first": 5}}
    with pytest.raises(ValueError, match=f"utterance '{cuts[1].id}', task 'first': the reference must be one text"):
        benchmark_set(cuts, POOL, 0)


def test_a_text_llm_of_its_own_is_named(tmp_path):
    config = benchmark_config("tiny", tmp_path / "tiny.nemo", "llm")
    assert config.systems["text"].llm == "llm" and config.text_of("mtbi") == "text"
