# SPDX-License-Identifier: Apache-2.0
"""What is asked, of whom, and how the answers are put together. The model is a fake."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lhotse import CutSet

from nemo_mtbi.demo.corpora.corpus import write_flac
from nemo_mtbi.evaluation.benchmark import NEW_TASKS, NEW_WORDINGS, SEEN, crossed_questions, questions, run_benchmark
from nemo_mtbi.evaluation.report import summarize
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.targets.tasks import TaskPool
from nemo_mtbi.testing import tiny_cuts

SEEN_WORDS = {"say": ["say it", "repeat it", "once more"], "first": ["first word", "the first"], "bare": [""]}
NEW_WORDS = {"say": ["what was that", "pardon"], "first": ["begin"], "bare": []}
POOL = TaskPool.from_dict(
    {
        "tasks": [
            {
                "name": name,
                "scoring": "wer" if name == "say" else "exact",
                "split": "train",
                "prompts": {"train": SEEN_WORDS[name], "heldout": NEW_WORDS[name]},
            }
            for name in SEEN_WORDS
        ]
        + [
            {
                "name": "last",
                "scoring": "exact",
                "split": "heldout",
                "prompts": {"train": ["last word", "the end"], "heldout": ["never asked"]},
            }
        ]
    }
)


class FakeResponder:
    """Knows what is said in an utterance by its length; answers the task's first or last word, or all of it."""

    model = SimpleNamespace(frame_counter=FrameCounter((LengthStage(400, 160),), 16000))

    def __init__(self, cuts):
        self.texts = {cut.num_samples: cut.supervisions[0].text for cut in cuts}
        self.heard, self.progress = [], {"text": 0, "speech": 0}

    def without_adapters(self):
        return self

    def text(self, requests, progress):
        progress(len(requests))
        self.progress["text"] += len(requests)
        return [self.answer(*request) for request in requests]

    def speech(self, audio, requests, progress):
        progress(len(requests))
        self.progress["speech"] += len(requests)
        self.heard += audio
        return [self.answer(prompt, self.texts[len(audio[index])]) + "!" * (index == 1) for prompt, index in requests]

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


def test_every_task_is_asked_about_every_utterance(cuts):
    rows = questions(cuts, POOL, seed=0)
    asked = [(row.utterance, row.task.name, row.group) for row in rows]
    expected = [
        (index, name, group)
        for index in range(4)
        for name, group in [
            ("say", SEEN),
            ("say", NEW_WORDINGS),
            ("first", SEEN),
            ("first", NEW_WORDINGS),
            ("bare", SEEN),  # it has no held-out wording
            ("last", NEW_TASKS),
        ]
    ]
    assert asked == expected


def test_wordings_are_those_of_the_group(cuts):
    for seed in range(20):
        for row in questions(cuts, POOL, seed):
            allowed = {SEEN: row.task.prompts, NEW_WORDINGS: row.task.heldout_prompts, NEW_TASKS: row.task.prompts}
            assert row.prompt in allowed[row.group]
            assert row.task.heldout == (row.group == NEW_TASKS)


def test_questions_depend_on_seed_utterance_and_task_alone(cuts):
    def by_cut(cuts, seed=0):
        return {(cuts[row.utterance].id, row.task.name, row.group): row.prompt for row in questions(cuts, POOL, seed)}

    whole = by_cut(cuts)
    assert by_cut(cuts) == whole == by_cut(cuts[::-1])
    assert by_cut(cuts[2:]).items() < whole.items()
    assert by_cut(cuts, seed=1) != whole
    assert len({prompt for (_, task, group), prompt in whole.items() if (task, group) == ("say", SEEN)}) > 1


@pytest.mark.parametrize("progress", [False, True])
def test_answers_to_text_and_speech_stand_side_by_side(cuts, progress):
    responder = FakeResponder(cuts)
    answers = run_benchmark(responder, iter(cuts), POOL, seed=5, progress=progress)
    rows = questions(cuts, POOL, 5)
    assert responder.progress == {"text": len(rows), "speech": len(rows)}
    assert [len(samples) for samples in responder.heard] == [cut.num_samples for cut in cuts]
    for answer, row in zip(answers, rows, strict=True):
        cut = cuts[row.utterance]
        assert (answer.cut_id, answer.task, answer.prompt, answer.group) == (
            cut.id,
            row.task.name,
            row.prompt,
            row.group,
        )
        assert answer.transcript == cut.supervisions[0].text and answer.scoring == row.task.scoring
        assert answer.text == responder.answer(row.prompt, answer.transcript)
        assert answer.speech == answer.text + "!" * (row.utterance == 1)
        assert answer.reference == ((cut.custom or {}).get("references") or {}).get(row.task.name)


def test_the_figures_follow_from_the_answers(cuts):
    """Speech of one utterance in four gets another answer."""
    summary = summarize(run_benchmark(FakeResponder(cuts), cuts, POOL, progress=False))
    assert {group: figures["n"] for group, figures in summary["behavior"].items()} == {
        SEEN: 12,
        NEW_WORDINGS: 8,
        NEW_TASKS: 4,
    }
    assert [figures["agreement"] for figures in summary["behavior"].values()] == [0.75] * 3
    assert summary["tasks"]["last"]["heldout"] and summary["tasks"]["last"]["n_scored"] == 3
    assert summary["transcription"] == {"wer": 0.0, "n": 4}  # a mark at the end is no error


def test_a_benchmark_leaves_nothing_out(cuts):
    write_flac(Path(cuts[2].recording.sources[0].source), np.zeros(cuts[2].num_samples))
    with pytest.raises(ValueError, match="tiny-0-0002 is silent"):
        run_benchmark(FakeResponder(cuts), cuts, POOL, progress=False)


def test_wordings_that_are_compared_are_asked_about_the_same_utterances(cuts):
    asked = {}
    for row in crossed_questions(cuts, POOL, 2, seed=3):
        asked.setdefault((row.task.name, row.group), {}).setdefault(row.prompt, []).append(row.utterance)
    counts = {key: len(wordings) for key, wordings in asked.items()}
    assert counts == {
        ("say", SEEN): 2,
        ("say", NEW_WORDINGS): 2,
        ("first", SEEN): 2,
        ("first", NEW_WORDINGS): 1,
        ("bare", SEEN): 1,
        ("last", NEW_TASKS): 2,
    }
    assert all(utterances == [0, 1, 2, 3] for wordings in asked.values() for utterances in wordings.values())
    chosen = {tuple(row.prompt for row in crossed_questions(cuts[:1], POOL, 2, seed)) for seed in range(10)}
    assert len(chosen) == 3  # two of three wordings of one task
    assert len(crossed_questions(cuts, POOL, None, 0)) == 4 * 11
    with pytest.raises(ValueError, match="wordings is 0"):
        crossed_questions(cuts, POOL, 0, 0)
