# SPDX-License-Identifier: Apache-2.0
"""Questions of a task pool about utterances: every task under trained and held-out wordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lhotse.cut import Cut

from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.targets.tasks import Task, TaskPool, draw_prompt

SEEN, NEW_WORDINGS, NEW_TASKS = "seen", "heldout_wordings", "heldout_tasks"
GROUPS = {SEEN: "seen prompts", NEW_WORDINGS: "held-out wordings", NEW_TASKS: "held-out tasks"}  # titles in tables
_DRAWS = {SEEN: "seen", NEW_WORDINGS: "heldout", NEW_TASKS: "task"}  # part of the key that a wording is drawn by


@dataclass(frozen=True)
class Question:
    """A prompt about an utterance.

    Attributes:
        utterance: Index of the utterance.
        task: Its task.
        prompt: The wording of the task.
        group: One of :data:`GROUPS`.
    """

    utterance: int
    task: Task
    prompt: str
    group: str


def questions(cuts: Sequence[Cut], pool: TaskPool, seed: int) -> list[Question]:
    """Return every task for every cut: trained tasks in a seen and a held-out wording, held-out tasks in one.

    A pure function of its arguments; the wordings are drawn for each cut and task.
    """
    return [
        Question(index, task, draw_prompt(prompts, _DRAWS[group], seed, cut.id, task.name), group)
        for index, cut in enumerate(cuts)
        for task, group, prompts in _wordings(pool)
    ]


def crossed_questions(cuts: Sequence[Cut], pool: TaskPool, wordings: int | None, seed: int) -> list[Question]:
    """Return the same ``wordings`` wordings of each task for all cuts, so that wordings can be compared.

    Args:
        cuts: Utterances.
        pool: Tasks.
        wordings: How many wordings of each task and group, drawn by ``seed``; None: all.
        seed: Of the draw.

    Raises:
        ValueError: ``wordings`` is below 1.
    """
    if wordings is not None and wordings < 1:
        raise ValueError(f"wordings is {wordings}; ask at least 1 of each task, or null for all")
    chosen = []
    for task, group, prompts in _wordings(pool):
        rng = stable_rng("wordings", seed, group, task.name)
        kept = set(prompts if wordings is None else rng.sample(prompts, min(wordings, len(prompts))))
        chosen += [(task, group, prompt) for prompt in prompts if prompt in kept]
    return [Question(index, task, prompt, group) for index in range(len(cuts)) for task, group, prompt in chosen]


def _wordings(pool: TaskPool) -> list[tuple[Task, str, tuple[str, ...]]]:
    """Return each task with its groups and the wordings of each group."""
    rows = []
    for task in pool.train:
        rows.append((task, SEEN, task.prompts))
        if task.heldout_prompts:
            rows.append((task, NEW_WORDINGS, task.heldout_prompts))
    return rows + [(task, NEW_TASKS, task.prompts) for task in pool.heldout]
