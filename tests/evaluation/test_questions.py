# SPDX-License-Identifier: Apache-2.0
"""The questions of a task pool: which tasks, under which wordings, drawn by which key."""

import pytest
from benchmark_pool import POOL
from lhotse import CutSet

from nemo_mtbi.evaluation.questions import NEW_TASKS, NEW_WORDINGS, SEEN, crossed_questions, questions
from nemo_mtbi.testing import tiny_cuts


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return list(CutSet.from_file(tiny_cuts(tmp_path_factory.mktemp("cuts"), 4, behaviors=False)))


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
