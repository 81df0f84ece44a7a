# SPDX-License-Identifier: Apache-2.0
"""Sets of an evaluation: utterances, questions about them, and how the answers are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut
from torch import Tensor

from nemo_mtbi.data.audio import BadAudioError, load_samples
from nemo_mtbi.data.behaviors import custom_value, transcript
from nemo_mtbi.data.gate import open_manifest
from nemo_mtbi.evaluation.questions import crossed_questions
from nemo_mtbi.inference.audio import load_audio
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.sources import FILES, SourcePolicy
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.metrics.abstention import is_empty, is_refusal
from nemo_mtbi.metrics.corpus import ERROR_KINDS, Metric, metric, normalize, task_metric
from nemo_mtbi.metrics.tally import mean
from nemo_mtbi.targets.tasks import Task, TaskPool

BARE = "no prompt"  # task and group of the transcript without a prompt, which only text systems answer


def _refusals(references: Sequence[Any], answers: Sequence[str], abstained: np.ndarray) -> np.ndarray:
    return np.array([[float(is_refusal(a) and not is_empty(a)), 1.0] for a in answers])


# The share of answers that refuse. Silence is no refusal: it counts for nothing.
REFUSAL = Metric("refusal", _refusals, mean, lambda reference: None)


def find_metric(name: str) -> Metric:
    """Return a metric of ``metrics.METRICS`` or ``refusal``.

    Raises:
        ValueError: the name is unknown.
    """
    return REFUSAL if name == REFUSAL.name else metric(name)


@dataclass(frozen=True)
class Clip:
    """One utterance.

    Attributes:
        id: Unique in its set.
        audio: A cut, or the path of an audio file.
        transcript: Words of the utterance, for text systems; None where they are unknown.
        policy: Sources that the audio of a cut may be read from.
    """

    id: str
    audio: Cut | Path
    transcript: str | None
    policy: SourcePolicy = FILES

    @property
    def identity(self) -> list[Any]:
        """JSON value that changes with the utterance, and not with the folder that it lies in."""
        if isinstance(self.audio, Path):
            return [self.id, self.transcript, self.audio.name]
        return [self.id, self.transcript, self.audio.num_samples, self.audio.sampling_rate, self.audio.start]


@dataclass(frozen=True)
class Item:
    """One question about one utterance.

    Attributes:
        clip: Index of the utterance in its set.
        task: Name of the task.
        group: Questions that are reported together, such as "seen" or "heldout_tasks".
        prompt: The wording of the task; may be empty.
        metrics: Names of metrics; the first is the one that stands in tables. None: the answer is not scored.
        reference: The right answer, in the form that the metrics take; None where it is unknown.
    """

    clip: int
    task: str
    group: str
    prompt: str
    metrics: tuple[str, ...] = ()
    reference: Any = None


@dataclass(frozen=True)
class Divergence:
    """Distance of a system's predictions from those of the same LLM where it reads the transcript.

    Attributes:
        kl: KL(text || system), in nats, mean over the tokens of the text system's answer; None where there is
            nothing to compare: the audio was unusable or too long, or the text has no answer of some token.
        tokens: The number of these tokens.
    """

    kl: float | None
    tokens: int


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        answer: Its text; empty where the audio was unusable.
        tokens: Generated tokens, the end token included.
        truncated: Whether the length limit cut it.
        unheard: Reason why the audio was unusable; None where it was used.
        divergence: From the text twin; None where that was not measured. Stored apart from the answer.
    """

    answer: str
    tokens: int
    truncated: bool
    unheard: str | None = None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class EvalSet:
    """Utterances and questions.

    Attributes:
        name: As the configuration calls it.
        clips: Utterances.
        items: Questions; those of a task and group stand together or not, their order means nothing.
        left_out: Items of the source that can't be scored here, by reason.
        notes: Remarks for a reader of the figures.

    Raises:
        ValueError: the source holds nothing, or two utterances have the same id.
    """

    name: str
    clips: Sequence[Clip]
    items: Sequence[Item]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.items and not self.left_out:
            raise ValueError(f"set {self.name!r} is empty: check its file")
        twice = [name for name, count in Counter(clip.id for clip in self.clips).items() if count > 1]
        if twice:
            raise ValueError(f"set {self.name!r} has several utterances with the id {twice[0]!r}: give each its own")

    def parts(self) -> dict[tuple[str, str], list[Item]]:
        """Return the questions by (group, task), the unit of resume; their order depends on their content alone."""
        parts: dict[tuple[str, str], list[Item]] = {}
        for item in sorted(self.items, key=self._order):
            parts.setdefault((item.group, item.task), []).append(item)
        return parts

    def _order(self, item: Item) -> tuple[str, ...]:
        return item.group, item.task, self.clips[item.clip].id, item.prompt

    def bare(self) -> list[Item]:
        """Return a question without a prompt for each utterance that has one with a prompt."""
        with_prompts = sorted(
            {item.clip for item in self.items if item.prompt}, key=lambda index: self.clips[index].id
        )
        return [Item(index, BARE, BARE, "") for index in with_prompts]

    @property
    def untranscribed(self) -> int:
        """Number of utterances without a transcript, which text systems can't answer."""
        return sum(clip.transcript is None for clip in self.clips)

    def digest(self, items: Sequence[Item]) -> str:
        """Return a hash of questions and their utterances; references and metrics do not change it."""
        return digest_of([[self.clips[item.clip].identity, item.prompt] for item in items])


def from_cuts(
    name: str,
    path: str | Path,
    pool: TaskPool,
    wordings: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    policy: SourcePolicy = FILES,
    leave_out: bool = False,
) -> EvalSet:
    """Return a set of cuts under a task pool: every task, under the same wordings for all cuts.

    References come from the cuts' custom field ``references`` (task to right answer). Where no cut has one to a task
    that is scored by an error rate, the transcripts are taken.

    Args:
        name: Name of the set.
        path: Lhotse cut manifest.
        pool: Tasks.
        wordings: How many wordings of each task and group; None: all.
        seed: Of the wordings.
        limit: Only the first cuts by id; None: all.
        policy: Sources that the cuts may be read from.
        leave_out: Leave out and count entries with values of a wrong type; otherwise the first is an error.

    Raises:
        ValueError: the manifest is missing or empty, an entry is bad or not allowed, or a reference is not one of its
            task's.
    """
    source = open_manifest(path, policy, leave_out, "set on_bad_audio: abstain to leave it out", f"sets.{name}.cuts")
    cuts = sorted(source, key=lambda cut: cut.id)[:limit]
    clips = [Clip(cut.id, cut, transcript(cut) or None, policy) for cut in cuts]
    references = [custom_value(cut, "references") or {} for cut in cuts]
    notes, items = _take_transcripts(clips, references, pool), []
    for row in crossed_questions(cuts, pool, wordings, seed):
        reference = references[row.utterance].get(row.task.name)
        items.append(Item(row.utterance, row.task.name, row.group, row.prompt, metrics_of(row.task), reference))
    missing = sum(item.reference is None for item in items)
    if missing:
        notes.append(
            f"{missing} of {len(items)} questions have no right answer to compare with: no score, only behavior"
        )
    left_out = {f"of entries that can't be used ({reason})": count for reason, count in source.left_out.items()}
    return EvalSet(name, clips, items, left_out, notes)


def metrics_of(task: Task) -> tuple[str, ...]:
    """Return the metrics of a task: its score from 0 to 1, and the error rate of that score where there is one."""
    score = task_metric(task.scoring).name
    return (score, task.scoring) if task.scoring in ERROR_KINDS else (score,)


def _take_transcripts(clips: Sequence[Clip], references: list[Mapping[str, Any]], pool: TaskPool) -> list[str]:
    """Fill in transcripts as right answers to tasks of an error rate to which no cut has any; in place.

    Returns:
        A note for each such task.
    """
    notes = []
    for task in pool.tasks:
        if task.scoring not in ERROR_KINDS or any(right.get(task.name) is not None for right in references):
            continue
        for index, clip in enumerate(clips):
            if clip.transcript is not None:
                references[index] = {**references[index], task.name: clip.transcript}
        notes.append(f"task {task.name!r} has no right answers in the cuts: their transcripts are taken for them")
    return notes


def is_transcription(item: Item, transcript: str | None) -> bool:
    """Return whether a question is scored by an error rate against the transcript of its utterance."""
    if transcript is None or not isinstance(item.reference, str) or not set(item.metrics) & set(ERROR_KINDS):
        return False
    return normalize(item.reference) == normalize(transcript)


def check_references(chosen: EvalSet) -> None:
    """Raise ValueError if a reference has not the form that its metric takes."""
    for item in chosen.items:
        if item.reference is None:
            continue
        for name in item.metrics:
            try:
                find_metric(name).check(item.reference)
            except ValueError as error:
                clip = chosen.clips[item.clip].id
                raise ValueError(f"set {chosen.name!r}, utterance {clip!r}, task {item.task!r}: {error}") from error


def load_clip(clip: Clip, frames: FrameCounter) -> Tensor | BadAudioError:
    """Return mono ``[n]`` samples at the encoder's rate, whatever rate the audio has, or the error of bad audio."""
    try:
        if isinstance(clip.audio, Path):
            return load_audio(clip.audio, frames)
        return load_samples(clip.audio, frames, clip.policy)
    except BadAudioError as error:
        return error
