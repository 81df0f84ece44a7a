# SPDX-License-Identifier: Apache-2.0
"""Requests to the text LLM about a shard of cuts, and their batches: pure functions of the shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from lhotse.cut import Cut

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.checks import Count, OneOf, Section
from nemo_mtbi.data.behaviors import transcript
from nemo_mtbi.layouts.layout import group_by_length
from nemo_mtbi.targets.tasks import Task, TaskPool, draw_prompt, draw_tasks

Split = Annotated[str, OneOf("train", "heldout", "all")]


@dataclass(frozen=True)
class TargetPlan(Section):
    """Tasks and wordings that are drawn for each cut.

    Attributes:
        tasks_per_cut: tasks that are drawn for a cut; None: all.
        always_tasks: names of tasks that are drawn for every cut, among its ``tasks_per_cut``; the rest is drawn.
        prompts_per_task: distinct wordings that are drawn for each of them (fewer where the task has fewer).
        split: tasks to draw from: ``train``, ``heldout`` or ``all``.
        wordings: wordings to draw from: ``train``, ``heldout`` or ``all``.
        max_new_tokens: length limit of a response, in tokens, the same as that of ``respond``. A task's own, smaller
            limit is applied by cutting: greedy decoding with a smaller limit gives a prefix.
        batch_tokens: bound on rows × (longest prompt + ``max_new_tokens``) of a batch.
        seed: of the draws.

    Raises:
        ValueError: if a value is not legal.
    """

    tasks_per_cut: Count | None = None
    always_tasks: Sequence[str] = ()
    prompts_per_task: Count = 1
    split: Split = "train"
    wordings: Split = "train"
    max_new_tokens: Count = 64
    batch_tokens: Count = 8192
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.tasks_per_cut is not None and len(self.always_tasks) > self.tasks_per_cut:
            raise ValueError(
                f"always_tasks names {len(self.always_tasks)} tasks, more than tasks_per_cut={self.tasks_per_cut}: "
                "raise the one or shorten the other"
            )

    def tasks(self, pool: TaskPool) -> tuple[Task, ...]:
        """Return the tasks to draw from.

        Raises:
            ValueError: if there is none, one has no wording to draw from, or ``always_tasks`` names another.
        """
        tasks = {"train": pool.train, "heldout": pool.heldout, "all": pool.tasks}[self.split]
        if not tasks:
            raise ValueError(f"task pool '{pool.name}' has no task for split={self.split}: add one or change split")
        missing = sorted(set(self.always_tasks) - {task.name for task in tasks})
        if missing:
            raise ValueError(
                f"always_tasks names {', '.join(missing)}, which task pool '{pool.name}' does not have for "
                f"split={self.split}: choose among {', '.join(task.name for task in tasks)}"
            )
        for task in tasks:
            if not self.prompts(task):
                raise ValueError(
                    f"task '{task.name}' has no wording for wordings={self.wordings}: "
                    "add one to the pool, leave the task out, or change wordings"
                )
        return tasks

    def most_rows(self, pool: TaskPool) -> int:
        """Return the largest number of requests about a cut.

        Fewer are drawn where a task has fewer wordings than ``prompts_per_task``.
        """
        each = [min(self.prompts_per_task, len(self.prompts(task))) for task in self.tasks(pool)]
        return sum(sorted(each, reverse=True)[: self.tasks_per_cut])

    def prompts(self, task: Task) -> tuple[str, ...]:
        """Return the wordings of ``task`` to draw from."""
        both = task.prompts + task.heldout_prompts
        return {"train": task.prompts, "heldout": task.heldout_prompts, "all": both}[self.wordings]

    def draws(self, cut_id: str, tasks: Sequence[Task]) -> list[tuple[Task, str]]:
        """Return the (task, wording) pairs of a cut: a pure function of the seed and the cut's id."""
        count = len(tasks) if self.tasks_per_cut is None else self.tasks_per_cut
        always = [task for task in tasks if task.name in self.always_tasks]
        others = [task for task in tasks if task.name not in self.always_tasks]
        pairs = []
        for task in always + draw_tasks(others, count - len(always), self.seed, cut_id):
            left = list(self.prompts(task))
            for turn in range(min(self.prompts_per_task, len(left))):
                pairs.append((task, draw_prompt(left, self.seed, cut_id, task.name, turn)))
                left.remove(pairs[-1][1])
        return pairs


@dataclass(frozen=True)
class Request:
    """One request about the cut at position ``cut`` of its shard; ``layout`` holds token ids only."""

    cut: int
    task: str
    prompt: str
    layout: tuple[int, ...]
    limit: int  # of the response, in tokens


def plan_shard(
    cuts: Sequence[Cut], plan: TargetPlan, pool: TaskPool, chat: ChatFormat, batch_rows: int | None = None
) -> tuple[list[Request], list[list[int]]]:
    """Return the requests about the cuts of a shard, and the batches: lists of indices of requests, longest first.

    A batch has at most ``batch_rows`` rows.
    """
    requests, tasks = [], plan.tasks(pool)
    for position, cut in enumerate(cuts):
        text = transcript(cut)
        for task, prompt in plan.draws(cut.id, tasks):
            limit = min(plan.max_new_tokens, task.max_new_tokens or plan.max_new_tokens)
            layout = tuple(chat.prompt(prompt, text))
            requests.append(Request(position, task.name, prompt, layout, limit))
    lengths = [len(request.layout) + plan.max_new_tokens for request in requests]
    batches = group_by_length(lengths, plan.batch_tokens)
    if batch_rows is None:
        return requests, batches
    return requests, [batch[i : i + batch_rows] for batch in batches for i in range(0, len(batch), batch_rows)]


def rows_at_once(parameters: int) -> int:
    """Return the rows of a batch on a CPU, where a large LLM would take many minutes for as many as its memory holds.

    A function of the LLM's parameters alone, so that every run cuts the same batches.
    """
    return max(8, min(64, 2**32 // max(parameters, 1)))
