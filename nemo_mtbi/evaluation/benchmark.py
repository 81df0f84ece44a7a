# SPDX-License-Identifier: Apache-2.0
"""The generalization benchmark: every task on every test utterance, by text and by speech."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lhotse.cut import Cut
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from nemo_mtbi.data.audio import load_samples
from nemo_mtbi.data.behaviors import custom_value, transcript
from nemo_mtbi.evaluation.report import Answer
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.targets.tasks import Task, TaskPool, draw_prompt

if TYPE_CHECKING:
    from nemo_mtbi.inference.respond import Responder

SEEN, NEW_WORDINGS, NEW_TASKS = "seen", "heldout_wordings", "heldout_tasks"
_DRAWS = {SEEN: "seen", NEW_WORDINGS: "heldout", NEW_TASKS: "task"}  # part of the key that a wording is drawn by


@dataclass(frozen=True)
class Question:
    """One row of the benchmark: a prompt about an utterance."""

    utterance: int
    task: Task
    prompt: str
    group: str


def questions(cuts: Sequence[Cut], pool: TaskPool, seed: int) -> list[Question]:
    """Every task on every cut: trained tasks with a seen and a held-out wording, held-out tasks with one of theirs.

    A pure function of its arguments; the wordings are drawn for each cut and task.
    """
    return [
        Question(index, task, draw_prompt(prompts, _DRAWS[group], seed, cut.id, task.name), group)
        for index, cut in enumerate(cuts)
        for task, group, prompts in _asked(pool)
    ]


def crossed_questions(cuts: Sequence[Cut], pool: TaskPool, wordings: int | None, seed: int) -> list[Question]:
    """As :func:`questions`, but all cuts are asked the same ``wordings`` wordings of a task: these can be compared.

    Args:
        cuts: utterances.
        pool: tasks.
        wordings: how many of each task and group, drawn by ``seed``; ``None``: all.
        seed: of the draw.

    Raises:
        ValueError: if ``wordings`` is below 1.
    """
    if wordings is not None and wordings < 1:
        raise ValueError(f"wordings is {wordings}; ask at least 1 of each task, or null for all")
    chosen = []
    for task, group, prompts in _asked(pool):
        rng = stable_rng("wordings", seed, group, task.name)
        kept = set(prompts if wordings is None else rng.sample(prompts, min(wordings, len(prompts))))
        chosen += [(task, group, prompt) for prompt in prompts if prompt in kept]
    return [Question(index, task, prompt, group) for index in range(len(cuts)) for task, group, prompt in chosen]


def _asked(pool: TaskPool) -> list[tuple[Task, str, tuple[str, ...]]]:
    """Each task with the groups that it is asked in, and the wordings of each."""
    rows = []
    for task in pool.train:
        rows.append((task, SEEN, task.prompts))
        if task.heldout_prompts:
            rows.append((task, NEW_WORDINGS, task.heldout_prompts))
    return rows + [(task, NEW_TASKS, task.prompts) for task in pool.heldout]


def run_benchmark(
    responder: Responder,
    cuts: Iterable[Cut],
    pool: TaskPool,
    seed: int = 0,
    progress: bool = True,
    reader: Responder | None = None,
) -> list[Answer]:
    """Asks every question by transcript and by speech.

    Args:
        responder: the model.
        cuts: test utterances; the custom field ``references`` (task to right answer) is used where it is there.
        pool: tasks.
        seed: of the wordings.
        progress: show a bar.
        reader: answers to the text; ``None``: the model's own LLM, without adapters.

    Raises:
        BadAudioError: if a test utterance can't be used. A benchmark leaves nothing out.
    """
    cuts = list(cuts)
    samples: list[Tensor] = [load_samples(cut, responder.model.frame_counter) for cut in cuts]
    texts = [transcript(cut) for cut in cuts]
    references = [custom_value(cut, "references") or {} for cut in cuts]
    rows = questions(cuts, pool, seed)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
    with bar if progress else nullcontext(), Heartbeat(lambda: bar_text(bar), bar.console, progress):
        by_text = bar.add_task("answers to text", total=len(rows))
        by_speech = bar.add_task("answers to speech", total=len(rows))
        read = [(row.prompt, texts[row.utterance]) for row in rows]
        text = (reader or responder.without_adapters()).text(read, lambda n: bar.advance(by_text, n))
        speech = responder.speech(
            samples, [(row.prompt, row.utterance) for row in rows], lambda n: bar.advance(by_speech, n)
        )
    return [
        Answer(
            cut_id=cuts[row.utterance].id,
            task=row.task.name,
            prompt=row.prompt,
            group=row.group,
            scoring=row.task.scoring,
            transcript=texts[row.utterance],
            reference=references[row.utterance].get(row.task.name),
            text=text_answer,
            speech=speech_answer,
        )
        for row, text_answer, speech_answer in zip(rows, text, speech, strict=True)
    ]
