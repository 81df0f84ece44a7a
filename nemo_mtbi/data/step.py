# SPDX-License-Identifier: Apache-2.0
"""Size of a training step, estimated before any audio is read."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.data.conversations import conversation_row
from nemo_mtbi.data.draw import DrawnRows
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.layouts.layout import IGNORE, Row, group_by_length, speech

COUNTED_BYTES = 2**28  # manifests up to this size are counted
RESPONSE_SHARE = 0.5  # of a microbatch's positions, where no data tell


@dataclass(frozen=True)
class Step:
    """Size of one step of one replica.

    Attributes:
        positions: of the decoder, over all rows; ``None`` if unknown.
        share: of the positions of a microbatch, those that predict a response token; the largest.
        frames: speech frames of the connector, at most.
        row: positions of the longest row; 0 if unknown.
        seconds: of speech, on average; ``None`` if unknown.
        cuts: on average; ``None`` if unknown.
    """

    positions: int | None
    share: float
    frames: int
    row: int = 0
    seconds: float | None = None
    cuts: float | None = None


def assumed_step(train: Mapping[str, Any], micro_batch_tokens: int) -> Step:
    """Return the size of a step as far as its configuration bounds it: all positions are speech.

    Each utterance is taken to be in ``rows_per_cut`` rows.

    Args:
        train: NeMo's data keys and ``rows_per_cut``.
        micro_batch_tokens: bound on rows times longest row of a microbatch.
    """
    positions = train.get("batch_tokens")
    return Step(positions, RESPONSE_SHARE, (positions or micro_batch_tokens) // (train.get("rows_per_cut") or 1))


def measured_step(
    batches: Sequence[CutSet], chat: ChatFormat, frames: FrameCounter, micro_batch_tokens: int, bound: int | None
) -> Step:
    """Return the size of a step by some batches of cuts that the sampler chose, with all their rows as speech.

    Args:
        batches: cuts with their rows.
        chat: the chat format of the model.
        frames: the frame counter of the model.
        micro_batch_tokens: bound on rows times longest row of a microbatch.
        bound: on the positions of a step, if there is one.
    """
    totals, shares, frame_counts, longest, seconds = [], [], [], 0, 0.0
    for batch in batches:
        rows: list[Row] = []
        counts: list[int] = []  # connector frames of each utterance
        for cut in batch:
            rows += _rows(cut, chat, frames, counts)
        lengths = [len(row.layout) for row in rows]
        for group in group_by_length(lengths, micro_batch_tokens):
            predicting = sum(label != IGNORE for index in group for label in rows[index].labels)
            shares.append(predicting / (len(group) * lengths[group[0]]))
        totals.append(sum(lengths))
        frame_counts.append(sum(counts))
        longest = max(longest, *lengths)
        seconds += sum(cut.duration for cut in batch)
    return Step(
        positions=max(max(totals), bound or 0),
        share=max(shares),
        frames=max(frame_counts),
        row=longest,
        seconds=seconds / len(batches),
        cuts=sum(len(batch) for batch in batches) / len(batches),
    )


def _rows(cut: Cut, chat: ChatFormat, frames: FrameCounter, counts: list[int]) -> list[Row]:
    """Return the rows of a cut, all as speech; append the frames of its audios to ``counts``."""
    drawn = DrawnRows.of(cut)
    if drawn.conversation is not None:
        own = [frames(part.num_samples) for part in drawn.conversation.cuts()]
        counts += own
        return [conversation_row(drawn.conversation, chat, own, 0)]
    counts.append(frames(cut.num_samples))
    return [behavior.row(chat, speech(0, counts[-1])) for behavior in drawn.behaviors]


def count_cuts(train: Mapping[str, Any]) -> int | None:
    """Return the utterances of a pass, if its manifest is one local file of moderate size; else ``None``."""
    source = train.get("cuts_path") or train.get("manifest_filepath")
    path = Path(source) if isinstance(source, str) else None
    if path is None or not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")) or not path.is_file():
        return None
    if path.stat().st_size > COUNTED_BYTES:
        return None
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        count = sum(bool(line.strip()) for line in lines)
    return count * (3 if train.get("perturb_speed") else 1)  # as it is, slower and faster


def steps_of_pass(train: Mapping[str, Any], batches: Iterable[CutSet], most: int, replicas: int) -> str:
    """Return the number of steps of a pass over the data, in words.

    Args:
        train: NeMo's data keys.
        batches: the first ones of the pass on one replica.
        most: largest number of ``batches``; fewer are the whole pass.
        replicas: model replicas that share the data out.
    """
    sizes = [len(batch) for batch in batches]
    if len(sizes) < most:
        return str(len(sizes))
    cuts = count_cuts(train)
    if cuts is None:
        return "unknown: only a local cuts_path or manifest_filepath of moderate size is counted"
    return f"about {math.ceil(cuts * len(sizes) / sum(sizes) / replicas)}, from {cuts} utterances"
