# SPDX-License-Identifier: Apache-2.0
"""The one format of a sequence: an integer layout.

A value ``v >= 0`` is a token id; ``v < 0`` is speech frame ``-(v + 1)`` of the connector's output. Prompt order, audio
first or last, text-only rows and every kind of interleaving are nothing but different layouts, made here by pure
functions on the CPU and injected into the decoder by one gather (``LayoutDecoder.embed``).
There are no placeholder tokens, and masks come from lengths and never from ids: the pad token may equal the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a position that predicts no response token


def speech(first: int, count: int) -> list[int]:
    """Return the layout values of ``count`` speech frames that begin with frame ``first``."""
    return [-(frame + 1) for frame in range(first, first + count)]


@dataclass(frozen=True)
class Row:
    """One task on one utterance. Speech values count from the utterance's own first frame.

    Attributes:
        layout: what the decoder reads, ``T`` values (the last token of the sequence is only a label: not here).
        labels: ``T`` values: the token that position ``t`` must predict, or :data:`IGNORE`.
        utterance: index of the utterance in the step, or ``None`` for a row without speech.
        twin: the same prompt with the transcript in place of the speech, and the same response. ``None`` where the row
            is text itself, or nothing compares them.
        pieces: utterances of the step that the row points into, from ``utterance`` on: its frames are numbered on
            through all of them.
    """

    layout: tuple[int, ...]
    labels: tuple[int, ...]
    utterance: int | None = None
    twin: Row | None = None
    pieces: int = 1

    @property
    def response(self) -> list[int]:
        """The tokens that are predicted, in order."""
        return [label for label in self.labels if label != IGNORE]

    @property
    def has_speech(self) -> bool:
        """Whether the layout holds a speech frame."""
        return min(self.layout) < 0


def make_row(prompt: Sequence[int], response: Sequence[int], utterance: int | None = None) -> Row:
    """Return the row of a prompt and a response.

    Args:
        prompt: layout values.
        response: token ids, with the end token unless the response was cut.
        utterance: index of the utterance in the step; ``None`` without speech.

    Raises:
        ValueError: if either is empty: there would be nothing to predict, or nothing to predict it from.
    """
    if not prompt or not response:
        raise ValueError(
            f"a row needs a prompt and a response, got {len(prompt)} and {len(response)} values: "
            "check the chat format and drop behaviors whose response is empty and truncated"
        )
    layout = (*prompt, *response[:-1])
    labels = (*([IGNORE] * (len(prompt) - 1)), *response)
    return Row(layout, labels, utterance)


def _no_positions() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass
class MicroBatch:
    """Rows of similar length that go through the decoder together, padded on the right."""

    layout: Tensor  # [R, T] int64; speech values count over the whole step
    labels: Tensor  # [R, T] int64; IGNORE where nothing is predicted
    lengths: Tensor  # [R] int64
    response_index: Tensor  # [n] int64: positions with a label, as t * R + r (Megatron's hidden states are [T, R, H])
    paired: Tensor = field(default_factory=_no_positions)  # [m] int64: which of the n belong to rows with a text twin
    twin_index: Tensor = field(default_factory=_no_positions)  # [m] int64: the same tokens among those of all twins

    @classmethod
    def from_rows(cls, rows: Sequence[Row], offsets: Sequence[int]) -> MicroBatch:
        """Return ``rows`` padded, with speech values that count over the whole step.

        Args:
            rows: the rows.
            offsets: first frame of each utterance of the step.
        """
        lengths = torch.tensor([len(row.layout) for row in rows])
        size = (len(rows), int(lengths.max()))
        layout = torch.zeros(size, dtype=torch.int64)  # padding: behind the end, never attended to
        labels = torch.full(size, IGNORE, dtype=torch.int64)
        for r, row in enumerate(rows):
            values = torch.tensor(row.layout)
            if row.utterance is not None:
                values = torch.where(values < 0, values - offsets[row.utterance], values)
            layout[r, : len(values)] = values
            labels[r, : len(values)] = torch.tensor(row.labels)
        index = (labels.t().reshape(-1) != IGNORE).nonzero().squeeze(1)
        return cls(layout, labels, lengths, index)

    @property
    def targets(self) -> Tensor:
        """The response tokens in the order of ``response_index``, ``[n]``."""
        return self.labels.t().reshape(-1)[self.response_index]

    def to(self, device: torch.device | str, **kwargs: Any) -> MicroBatch:
        """Return a copy with all tensors on ``device``; ``kwargs`` as for :meth:`torch.Tensor.to`."""
        return replace(self, **{name: value.to(device, **kwargs) for name, value in vars(self).items()})


@dataclass(frozen=True)
class RowInfo:
    """Facts about a row for validation by generation.

    Attributes:
        utterance: index of the utterance in the step.
        cut_id: id of its cut.
        task: name of the task.
        prompt: prompt layout, all speech; speech values count from the utterance's own first frame.
        instruction: the prompt as text.
        reference: the response that the text LLM gave to the transcript.
        truncated: the reference was cut by the length limit.
        transcript: text of the utterance.
    """

    utterance: int
    cut_id: str
    task: str
    prompt: tuple[int, ...]
    instruction: str
    reference: str
    truncated: bool
    transcript: str


@dataclass
class StepBatch:
    """Data of one optimizer step of one data-parallel rank: each utterance once, its rows grouped by length.

    Attributes:
        audio: ``[U, N]`` float32 samples at the encoder's rate, zero padded on the right.
        audio_lengths: ``[U]`` int64, samples.
        frame_lengths: ``[U]`` int64, connector frames as computed from ``audio_lengths``. The model compares.
        microbatches: the rows; their layouts point into the ``frame_lengths.sum()`` frames of the step.
        num_targets: response tokens of all rows; the loss is a sum over them divided by their global number.
        cut_ids: for messages.
        rows: one entry per row, in the order in which rows were made, for validation only; empty in training.
        stats: counts of what was read, by name (``no_alignment``, ``interleaved_rows``).
        skipped: counts of what was left out, by reason. A batch of nothing but skipped cuts has no utterance, no
            microbatch and 0 targets (:meth:`empty`).
        twins: the text twins of the rows with speech, grouped by their own lengths. Their response tokens, microbatch
            by microbatch in the order of ``response_index``, are what ``MicroBatch.twin_index`` points into. Empty if
            no row has speech, ``None`` if the rows came without twins.
    """

    audio: Tensor
    audio_lengths: Tensor
    frame_lengths: Tensor
    microbatches: list[MicroBatch]
    num_targets: int
    cut_ids: list[str] = field(default_factory=list)
    rows: list[RowInfo] = field(default_factory=list)
    stats: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    twins: list[MicroBatch] | None = None

    @classmethod
    def empty(cls, skipped: dict[str, int]) -> StepBatch:
        """Return a step whose cuts were all left out: it adds nothing to the loss but takes part in collectives."""
        lengths = torch.zeros(0, dtype=torch.int64)
        return cls(torch.zeros(0, 0), lengths, lengths.clone(), [], 0, skipped=skipped, twins=[])

    @property
    def num_frames(self) -> int:
        """Connector frames of all utterances."""
        return int(self.frame_lengths.sum())

    def to(self, device: torch.device | str, **kwargs: Any) -> StepBatch:
        """Return a copy with tensors on ``device``; lengths that only Python reads stay where they are."""
        return replace(
            self,
            audio=self.audio.to(device, **kwargs),
            audio_lengths=self.audio_lengths.to(device, **kwargs),
            microbatches=[microbatch.to(device, **kwargs) for microbatch in self.microbatches],
            twins=None if self.twins is None else [twin.to(device, **kwargs) for twin in self.twins],
        )


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return groups of indices, similar in length, with ``rows * longest`` of each within ``max_tokens``.

    Deterministic: longest first, ties by index; a row that is longer than ``max_tokens`` gets a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def collate(
    audio: Sequence[Tensor],
    frame_lengths: Sequence[int],
    rows: Sequence[Row],
    micro_batch_tokens: int,
    cut_ids: Sequence[str] = (),
) -> StepBatch:
    """Return a step from audio and rows.

    Args:
        audio: one ``[n]`` float tensor per utterance.
        frame_lengths: connector frames of each utterance.
        rows: rows that point at the utterances by index.
        micro_batch_tokens: bound on ``rows * longest row`` of a microbatch.
        cut_ids: one per utterance.

    Raises:
        ValueError: if there is no row, a layout points past the last frame of its utterance, or a text twin does not
            fit its row.
    """
    if not rows:
        raise ValueError("a step needs at least one row: every cut of the batch was empty or dropped")
    for row in rows:
        first = row.utterance
        available = 0 if first is None else sum(frame_lengths[first : first + row.pieces])
        last = -min(row.layout)  # number of frames that the layout needs; <= 0 for text
        name = cut_ids[row.utterance] if cut_ids and row.utterance is not None else "a row without audio"
        _check_twin(row, name)
        if last > available:
            raise ValueError(
                f"the layout of {name} points at speech frame {last - 1}, but there are only {available} frames: "
                "the layout must be built with the frame counter of the model that is trained"
            )
    offsets = [0]
    for count in frame_lengths[:-1]:
        offsets.append(offsets[-1] + count)
    groups = group_by_length([len(row.layout) for row in rows], micro_batch_tokens)
    lengths = torch.tensor([len(samples) for samples in audio], dtype=torch.int64)
    microbatches = [MicroBatch.from_rows([rows[i] for i in group], offsets) for group in groups]
    padded = torch.nn.utils.rnn.pad_sequence(list(audio), batch_first=True) if len(audio) else torch.zeros(0, 0)
    return StepBatch(
        audio=padded,
        audio_lengths=lengths,
        frame_lengths=torch.tensor(list(frame_lengths), dtype=torch.int64),
        microbatches=microbatches,
        num_targets=sum(label != IGNORE for row in rows for label in row.labels),
        twins=pair_twins(rows, groups, microbatches, micro_batch_tokens),
        cut_ids=list(cut_ids),
    )


# ---------------------------------------------------------------------------------------------------------- text twins


def _check_twin(row: Row, name: str) -> None:
    """Refuse a text twin that does not predict the tokens of its row, or has speech."""
    if row.twin is not None and (row.twin.response != row.response or row.twin.has_speech):
        raise ValueError(
            f"the text twin of {name} must be text and predict the same {len(row.response)} response tokens: make "
            "both from the same behavior"
        )


def pair_twins(
    rows: Sequence[Row], groups: Sequence[Sequence[int]], microbatches: Sequence[MicroBatch], micro_batch_tokens: int
) -> list[MicroBatch] | None:
    """Return the microbatches of the text twins, and fill ``paired`` and ``twin_index`` of those of the rows.

    Rows and twins are grouped by their own lengths, so a row and its twin stand in different microbatches at different
    places. Student and teacher are compared token by token: the number of a response token in the step, row after row,
    is the name by which both sides find it.

    Args:
        rows: all rows of a step.
        groups: the rows of each microbatch.
        microbatches: of the rows.
        micro_batch_tokens: bound on ``twins * longest twin`` of a microbatch.

    Returns:
        The twins; ``None`` if the rows have none, though some have speech.

    Raises:
        ValueError: if only some of the rows with speech have a twin.
    """
    twin_rows = {index: row.twin for index, row in enumerate(rows) if row.twin is not None}
    if any(row.has_speech and row.twin is None for row in rows):
        if twin_rows:
            raise ValueError("only some rows with speech have a text twin: give one to all of them, or to none")
        return None
    # 1. Group the twins by their own lengths; ``members`` holds the indices of their rows.
    owners = list(twin_rows)
    lengths = [len(twin.layout) for twin in twin_rows.values()]
    members = [[owners[k] for k in group] for group in group_by_length(lengths, micro_batch_tokens)]
    twins = [MicroBatch.from_rows([twin_rows[index] for index in group], []) for group in members]
    # 2. Number the response tokens of the step, row after row.
    counts = torch.tensor([len(row.response) for row in rows])  # [R]
    firsts = counts.cumsum(0) - counts  # [R]: the number of each row's first response token
    # 3. For each number, its position among the response tokens of all twins; -1 for rows without a twin.
    position = torch.full((int(counts.sum()),), -1)
    if twins:
        order = torch.cat([_token_numbers(twin, group, firsts) for twin, group in zip(twins, members, strict=True)])
        position[order] = torch.arange(len(order))
    # 4. Look up the tokens of each microbatch of rows.
    for microbatch, group in zip(microbatches, groups, strict=True):
        in_twins = position[_token_numbers(microbatch, group, firsts)]  # [n], in the order of response_index
        microbatch.paired = (in_twins >= 0).nonzero().squeeze(1)
        microbatch.twin_index = in_twins[microbatch.paired]
    return twins


def _token_numbers(microbatch: MicroBatch, group: Sequence[int], firsts: Tensor) -> Tensor:
    """Return ``[n]``: the number in the step of each response token of a microbatch, whose rows are ``group``."""
    within_row = (microbatch.labels != IGNORE).cumsum(1) - 1  # [R, T]: which of its row's tokens a position predicts
    row = microbatch.response_index % len(group)  # response_index is t * R + r
    return firsts[torch.tensor(group)][row] + within_row.t().reshape(-1)[microbatch.response_index]
