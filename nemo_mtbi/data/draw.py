# SPDX-License-Identifier: Apache-2.0
"""Draws the rows of every cut before the sampler sees it, so that the sampler sees what a cut really costs.

Nothing is left out in silence: the counts of what was dropped travel with a neighbouring cut, through sampler and
workers, to the batch (``StepBatch.skipped``). So it does not matter whether the main process or workers read the cuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.utils import fastcopy

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.checks import Count, RaiseOrSkip, Section
from nemo_mtbi.data.behaviors import BEHAVIORS, Behavior, check_provenance, draw_behaviors, transcript, word_times
from nemo_mtbi.data.conversations import CONVERSATION, Conversation, conversation_of, conversation_row
from nemo_mtbi.data.entries import BadEntryError
from nemo_mtbi.io.sources import ForbiddenSourceError
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.layouts.interleave import WordSpan
from nemo_mtbi.layouts.layout import speech

PAYLOAD = "mtbi"  # key of the drawn rows in the custom field of a cut
# A stream that repeats for ever and never yields a usable cut would hang the training.
MAX_DROPPED_IN_A_ROW = 10_000


class SkipCounter(Counter):
    """Counts by reason over an epoch: ``counter.update(batch.skipped)``, at the end ``counter.message()``."""

    def message(self) -> str:
        """Return the counts in one line, the most frequent reason first; empty if nothing was left out."""
        return ", ".join(f"{reason}: {count}" for reason, count in sorted(self.items(), key=lambda x: (-x[1], x[0])))


@dataclass(frozen=True)
class DrawnRows:
    """Rows of a cut on their way from the drawing to the dataset.

    They hold what the dataset can't read from the cut: noise that is mixed in changes its id and adds text.

    Attributes:
        cut_id: id of the cut when its rows were drawn.
        seed: seed of the run.
        epoch: number of the pass in which the cut was drawn.
        behaviors: one per row.
        cost: positions of all its rows as speech: prompt tokens + speech frames + response tokens.
        transcript: text of the utterance.
        words: times of the words, or ``None`` without an alignment.
        skipped: what was left out since the cut before, by reason.
        pass_number: of the pass over the data, for schedules; ``epoch`` tells streams and repetitions apart.
        conversation: in the place of behaviors; one row.
    """

    cut_id: str
    seed: int
    epoch: int
    behaviors: tuple[Behavior, ...]
    cost: int
    transcript: str
    words: tuple[WordSpan, ...] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    pass_number: int = 0
    conversation: Conversation | None = None

    @classmethod
    def of(cls, cut: Cut) -> DrawnRows:
        """Return the rows that travel with a cut.

        Raises:
            ValueError: if the cut did not come through :class:`DrawRows`.
        """
        drawn = (cut.custom or {}).get(PAYLOAD)
        if not isinstance(drawn, DrawnRows):
            raise ValueError(
                f"no rows were drawn for cut {cut.id}: read the data with nemo_mtbi.data.loader.build_dataloader"
            )
        return drawn


def attach(cut: Cut, drawn: DrawnRows) -> Cut:
    """Return a copy of ``cut`` with its rows in the custom field, and its cost where Lhotse samplers count tokens."""
    if isinstance(cut, MixedCut):
        index = next(i for i, track in enumerate(cut.tracks) if track.cut.supervisions)
        tracks = list(cut.tracks)
        tracks[index] = fastcopy(tracks[index], cut=attach(tracks[index].cut, drawn))
        return fastcopy(cut, tracks=tracks)
    first, *others = cut.supervisions
    first = fastcopy(first, custom={**_without_behaviors(first.custom), "tokens": range(drawn.cost)})
    return fastcopy(cut, supervisions=[first, *others], custom={**_without_behaviors(cut.custom), PAYLOAD: drawn})


def _without_behaviors(custom: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return custom values without the behaviors, which would only make the way to the workers longer."""
    return {key: value for key, value in (custom or {}).items() if key not in (BEHAVIORS, CONVERSATION)}


@dataclass(frozen=True)
class DrawConfig(Section):
    """Settings of the drawing of rows.

    Attributes:
        seed: of the run.
        rows_per_cut: tasks drawn for a cut; ``None`` takes every behavior of it.
        on_bad_audio: ``raise`` or ``skip``: what to do with a cut that has no transcript or too little audio.
        min_duration, max_duration: seconds; cuts outside are counted and left out.
        min_tokens, max_tokens: bounds of a row's length as speech; rows outside are counted and left out.
        max_cost: bound of the cost of a cut (the last bucket).
        expected: fingerprints that the behaviors must come from (:func:`check_provenance`).
        allow_foreign: accept behaviors of another LLM.
        filters: pairs of (reason, predicate); a cut for which a predicate is false is counted and left out.
    """

    seed: int = 0
    rows_per_cut: Count | None = None
    on_bad_audio: RaiseOrSkip = "raise"
    min_duration: float = 0.0
    max_duration: float = float("inf")
    min_tokens: int = 0
    max_tokens: float = float("inf")
    max_cost: float = float("inf")
    expected: Mapping[str, str] = field(default_factory=dict)
    allow_foreign: bool = False
    filters: tuple[tuple[str, Callable[[Cut], bool]], ...] = ()


class DrawRows:
    """Lazy, picklable iterable of cuts with their rows.

    The epoch of a cut is the number of the loader's iteration (:meth:`set_epoch`) plus the number of times that the
    cut has come by within it, which is how streams without an end count. In streams that every worker of every rank
    reads on its own, the epochs of all readers interleave, so that no two of them draw the same rows. Takes about 100
    bytes of memory for each cut of a pass.

    Args:
        source: the cuts; any iterable that can be iterated again.
        chat: the chat format of the model.
        frames: the frame counter of the model.
        config: see :class:`DrawConfig`.
        reader: ``(rank, world_size)`` where every rank reads a stream of its own, ``None`` where all read the same.
        left_out: what ``source`` itself leaves out, by reason; it is counted with the rest, and cleared.
    """

    def __init__(
        self,
        source: Iterable[Cut],
        chat: ChatFormat,
        frames: FrameCounter,
        config: DrawConfig,
        reader: tuple[int, int] | None = None,
        left_out: Counter | None = None,
    ):
        self.source = source
        self.chat = chat
        self.frames = frames
        self.config = config
        self.reader = reader
        self.left_out = Counter() if left_out is None else left_out
        self.epoch = 0
        self._visits: dict[int, int] = {}

    def set_epoch(self, epoch: int) -> None:
        """Start pass ``epoch``."""
        self.epoch = epoch
        self._visits.clear()

    def __iter__(self) -> Iterator[Cut]:
        skipped: Counter = Counter()
        held = None  # one cut is held back, so that what is dropped behind the last one is reported too
        in_a_row = 0
        for cut in self._read():
            drawn = self._draw(cut, skipped)
            if drawn is None:
                in_a_row += 1
                if in_a_row == MAX_DROPPED_IN_A_ROW:
                    break
                continue
            in_a_row = 0
            if held is not None:
                yield self._release(held, skipped)
            held = cut, drawn
        self._take_left_out(skipped)
        if held is None or in_a_row == MAX_DROPPED_IN_A_ROW:
            what = SkipCounter(skipped).message() or "the source is empty"
            raise ValueError(f"no usable cut in the data ({what}): check the source, its filters and max_duration")
        yield self._release(held, skipped)

    def _take_left_out(self, skipped: Counter) -> None:
        skipped.update(self.left_out)
        self.left_out.clear()

    def _release(self, held: tuple[Cut, DrawnRows], skipped: Counter) -> Cut:
        cut, drawn = held
        self._take_left_out(skipped)
        drawn = fastcopy(drawn, skipped=dict(skipped))
        skipped.clear()
        return attach(cut, drawn)

    def _read(self) -> Iterator[Cut]:
        """Yield the source's cuts, with one clear error where it cannot be read."""
        iterator, last = iter(self.source), None
        while True:
            try:
                cut = next(iterator)
            except StopIteration:
                return
            except (BadEntryError, ForbiddenSourceError):  # it names its entry
                raise
            except Exception as error:
                where = "at its first entry" if last is None else f"after cut {last}"
                raise ValueError(f"the data source cannot be read {where}: {type(error).__name__}: {error}") from error
            if not isinstance(cut, Cut) or isinstance(cut, PaddingCut):
                raise ValueError(
                    f"the data source yields {type(cut).__name__}: only cuts with audio can be trained on"
                )
            last = cut.id
            yield cut

    def _next_epoch(self, cut_id: str) -> int:
        key = hash(cut_id)  # 64 bits of it: the ids of a large corpus would fill the memory
        visits = self._visits.get(key, 0)
        self._visits[key] = visits + 1
        if self.reader is None:
            return self.epoch + visits
        rank, world_size = self.reader
        worker = torch.utils.data.get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.epoch + visits) * world_size * workers + rank * workers + index

    def _draw(self, cut: Cut, skipped: Counter) -> DrawnRows | None:
        """Return the rows of a cut, or ``None`` (counted) where it is left out."""
        config = self.config
        reason = self._unwanted(cut)
        if reason is not None:
            skipped[reason] += 1
            return None
        conversation = conversation_of(cut)
        problem = self._problem(cut) if conversation is None else self._audio_problem(conversation)
        if problem is not None:
            if config.on_bad_audio == "raise":
                raise ValueError(
                    f"cut {cut.id} {problem[1]}; mend the data, or set on_bad_audio: skip to leave it out"
                )
            skipped[problem[0]] += 1
            return None
        epoch = self._next_epoch(cut.id)
        if conversation is not None:
            return self._draw_conversation(conversation, epoch, skipped)
        behaviors = draw_behaviors(cut, config.rows_per_cut, config.seed, epoch)
        if not check_provenance(cut, config.expected, config.allow_foreign):
            behaviors = [replace(behavior, ids=None) for behavior in behaviors]  # tokens of another vocabulary
        if not behaviors:
            skipped["no_response"] += 1
            return None
        audio = speech(0, self.frames(cut.num_samples))
        lengths = [len(behavior.row(self.chat, audio).layout) for behavior in behaviors]
        fits = [config.min_tokens <= length <= config.max_tokens for length in lengths]
        if not all(fits):
            skipped["row_length"] += fits.count(False)
        cost = sum(length for length, fit in zip(lengths, fits, strict=True) if fit)
        if not any(fits):
            return None
        if cost > config.max_cost:
            skipped["cost_above_last_bucket"] += 1
            return None
        kept = tuple(behavior for behavior, fit in zip(behaviors, fits, strict=True) if fit)
        words = word_times(cut)
        return DrawnRows(cut.id, config.seed, epoch, kept, cost, transcript(cut), words, pass_number=self.epoch)

    def _draw_conversation(self, conversation: Conversation, epoch: int, skipped: Counter) -> DrawnRows | None:
        counts = [self.frames(cut.num_samples) for cut in conversation.cuts()]
        cost = len(conversation_row(conversation, self.chat, counts, 0 if counts else None).layout)
        if not self.config.min_tokens <= cost <= self.config.max_tokens:
            skipped["row_length"] += 1
            return None
        if cost > self.config.max_cost:
            skipped["cost_above_last_bucket"] += 1
            return None
        drawn = DrawnRows(conversation.id, self.config.seed, epoch, (), cost, "", pass_number=self.epoch)
        return replace(drawn, conversation=conversation)

    def _audio_problem(self, conversation: Conversation) -> tuple[str, str] | None:
        """Return reason and message of a conversation with an audio that cannot be used; ``None`` if all can."""
        for cut in conversation.cuts():
            if self.frames(cut.num_samples) == 0:
                return "too_short", f"has an audio, {cut.id}, that is too short to own a single speech frame"
        return None

    def _unwanted(self, cut: Cut) -> str | None:
        """Return the name of the filter that leaves the cut out; ``None`` if none does."""
        conversation = conversation_of(cut)
        has_audio = conversation is None or bool(conversation.cuts())  # one of text alone lasts no time
        if has_audio and cut.duration > self.config.max_duration:
            return "longer_than_max_duration"
        if has_audio and cut.duration < self.config.min_duration:
            return "shorter_than_min_duration"
        return next((reason for reason, keep in self.config.filters if not keep(cut)), None)

    def _problem(self, cut: Cut) -> tuple[str, str] | None:
        """Return reason and message of an utterance that cannot be used; ``None`` if it can."""
        if not transcript(cut):
            return "no_transcript", "has no transcript (a supervision with text; see text_field)"
        if not cut.has_recording:
            return "no_audio", "has no recording"
        if self.frames(cut.num_samples) == 0:
            return "too_short", f"is too short to own a single speech frame ({cut.duration} s)"
        return None
