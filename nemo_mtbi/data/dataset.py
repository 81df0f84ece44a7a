# SPDX-License-Identifier: Apache-2.0
"""From sampled cuts to a step: loads audio, builds the rows, groups them into microbatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import fix_random_seed

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.checks import RAISE_OR_SKIP, at_least
from nemo_mtbi.config.interleave import InterleaveConfig
from nemo_mtbi.data.audio import BadAudioError, load_samples
from nemo_mtbi.data.behaviors import Behavior
from nemo_mtbi.data.conversations import CONVERSATION, Conversation, conversation_row
from nemo_mtbi.data.draw import DrawnRows
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.io.sources import FILES, SourcePolicy
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.layouts.interleave import AudioSlot, choose_text, interleave, interleave_wave, speech_only, text_only
from nemo_mtbi.layouts.layout import IGNORE, Row, RowInfo, StepBatch, collate


@dataclass
class _Step:
    """A step that is being built: see :func:`nemo_mtbi.layouts.layout.collate`."""

    audio: list[torch.Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    infos: list[RowInfo] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    stats: Counter = field(default_factory=Counter)

    def add_audio(self, audio: Sequence[torch.Tensor], drawn: DrawnRows, frames: FrameCounter) -> int:
        """Adds utterances; returns the index of the first of them."""
        first = len(self.audio)
        self.audio += audio
        self.counts += [frames(len(samples)) for samples in audio]
        self.ids += [drawn.cut_id] * len(audio)
        return first


class MTBIDataset(torch.utils.data.Dataset):
    """Maps the cuts that a sampler chose (with rows drawn by ``DrawRows``) to a :class:`StepBatch`.

    Picklable, and a pure function of the cuts: what it draws depends on seed, epoch, cut id and task.

    Args:
        chat: the chat format of the model.
        frames: the frame counter of the model.
        micro_batch_tokens: bound on rows times longest row of a microbatch.
        interleave: ``None`` leaves all rows speech.
        on_bad_audio: ``raise`` stops with the name of the cut; ``skip`` leaves the cut out and counts it by reason in
            ``StepBatch.skipped``. If no cut of a batch is left, the batch is ``StepBatch.empty``.
        with_rows: fill ``StepBatch.rows``, which generation-based validation reads.
        with_twins: every row that hears speech gets its text twin, for a loss that compares them.
    """

    def __init__(
        self,
        chat: ChatFormat,
        frames: FrameCounter,
        micro_batch_tokens: int,
        interleave: InterleaveConfig | None = None,
        on_bad_audio: str = "raise",
        with_rows: bool = False,
        with_twins: bool = False,
    ):
        at_least(1).check("micro_batch_tokens", micro_batch_tokens)
        RAISE_OR_SKIP.check("on_bad_audio", on_bad_audio)
        self.chat = chat
        self.frames = frames
        self.micro_batch_tokens = micro_batch_tokens
        self.interleave = interleave
        self.on_bad_audio = on_bad_audio
        self.with_rows = with_rows
        self.with_twins = with_twins
        self.policy = FILES

    def allowing(self, policy: SourcePolicy) -> MTBIDataset:
        """A copy that also reads audio from what a policy allows."""
        other = copy(self)
        other.policy = policy
        return other

    def __getitem__(self, cuts: Iterable[Cut]) -> StepBatch:
        """Loads and builds one step.

        Raises:
            BadAudioError: under ``on_bad_audio: raise``.
        """
        skipped, step = Counter(), _Step()
        for cut in cuts:
            drawn = DrawnRows.of(cut)
            skipped.update(drawn.skipped)
            try:
                if drawn.conversation is None:
                    self._add_behaviors(step, cut, drawn)
                else:
                    self._add_conversation(step, drawn, drawn.conversation)
            except BadAudioError as error:
                if self.on_bad_audio == "raise":
                    raise BadAudioError(
                        error.reason, f"{error}; mend the data, or set on_bad_audio: skip to leave it out"
                    ) from error
                skipped[error.reason] += 1
        if not step.rows:
            return StepBatch.empty(dict(skipped))
        batch = collate(step.audio, step.counts, step.rows, self.micro_batch_tokens, step.ids)
        batch.rows, batch.stats, batch.skipped = step.infos, dict(step.stats), dict(skipped)
        return batch

    def _add_behaviors(self, step: _Step, cut: Cut, drawn: DrawnRows) -> None:
        """The rows of an utterance; it is heard once by all of them."""
        samples = load_samples(cut, self.frames, self.policy)
        heard = self._audio_slots(drawn, len(samples), step.stats)
        if self.with_rows:
            num_frames = self.frames(len(samples))
            step.infos += [self._info(drawn, behavior, len(step.audio), num_frames) for behavior in drawn.behaviors]
        firsts: dict[tuple[tuple[int, int], ...], int] = {}  # rows that hear the same pieces share them
        for row in heard:
            if row.pieces not in firsts:
                firsts[row.pieces] = step.add_audio(
                    [samples[start:end] for start, end in row.pieces], drawn, self.frames
                )
        step.rows += self._rows(drawn, heard, [firsts[row.pieces] if row.pieces else None for row in heard])

    def _add_conversation(self, step: _Step, drawn: DrawnRows, conversation: Conversation) -> None:
        """The one row of a conversation, and all that it hears."""
        audio = [load_samples(cut, self.frames, self.policy) for cut in conversation.cuts()]
        counts = [self.frames(len(samples)) for samples in audio]
        first = step.add_audio(audio, drawn, self.frames)
        row = conversation_row(conversation, self.chat, counts, first if audio else None, self.with_twins)
        step.rows.append(row)
        step.stats["conversations"] += 1
        if self.with_rows:
            last = conversation.exchanges[-1]
            asked = max(index for index, label in enumerate(row.labels) if label == IGNORE)
            said = " ".join(item for item in last.contents if isinstance(item, str))
            prompt = row.layout[: asked + 2]  # all before the last answer
            step.infos.append(RowInfo(first, drawn.cut_id, CONVERSATION, prompt, said, last.answer, False, ""))

    def _audio_slots(self, drawn: DrawnRows, num_samples: int, stats: Counter) -> Sequence[AudioSlot]:
        """What stands in the audio slot of each row, and which pieces of the audio it hears."""
        whole = ((0, num_samples),)
        num_frames = self.frames(num_samples)
        speech = AudioSlot(whole, tuple(speech_only(num_frames)))
        if self.interleave is None:
            return [speech] * len(drawn.behaviors)
        if drawn.words is None:
            stats["no_alignment"] += 1
            return [speech] * len(drawn.behaviors)
        words = drawn.transcript.split()
        tokens = self.chat.pieces(words)
        config = self.interleave.at(drawn.pass_number)
        heard = []
        for number, behavior in enumerate(drawn.behaviors):
            # Without draws by task, a cut may have several rows of one task: the number tells them apart.
            rng = stable_rng("interleave", drawn.seed, drawn.epoch, drawn.cut_id, behavior.task, number)
            is_text = choose_text(words, config, rng)
            if not any(is_text):
                heard.append(speech)
                continue
            if all(is_text):
                stats["text_rows"] += 1
                heard.append(AudioSlot((), tuple(text_only(tokens))))
                continue
            stats["interleaved_rows"] += 1
            if config.level == "wave":
                args = (num_samples, self.frames.sample_rate, self.frames)
                heard.append(interleave_wave(drawn.words, is_text, tokens, *args))
            else:
                layout = interleave(drawn.words, is_text, tokens, num_frames, self.frames.frame_seconds)
                heard.append(AudioSlot(whole, tuple(layout)))
        return heard

    def _rows(self, drawn: DrawnRows, heard: Sequence[AudioSlot], utterances: Sequence[int | None]) -> list[Row]:
        """The rows of a cut; their twins read the prompt with the transcript that the targets were made from."""
        made = zip(drawn.behaviors, heard, utterances, strict=True)
        rows = [
            replace(behavior.row(self.chat, row.layout, utterance), pieces=len(row.pieces))
            for behavior, row, utterance in made
        ]
        if not self.with_twins:
            return rows
        return [
            replace(row, twin=behavior.row(self.chat, drawn.transcript)) if row.has_speech else row
            for behavior, row in zip(drawn.behaviors, rows, strict=True)
        ]

    def _info(self, drawn: DrawnRows, behavior: Behavior, utterance: int, num_frames: int) -> RowInfo:
        return RowInfo(
            utterance=utterance,
            cut_id=drawn.cut_id,
            task=behavior.task,
            prompt=tuple(self.chat.prompt(behavior.prompt, speech_only(num_frames))),
            instruction=behavior.prompt,
            reference=behavior.response,
            truncated=behavior.truncated,
            transcript=drawn.transcript,
        )


# -------------------------------------------------------------------------------------------------- passes over data


class Passes:
    """Which pass over the data comes next, and how much of it is left out. Passes are numbered from 0.

    Args:
        fixed: every pass is pass 0, for validation.
    """

    def __init__(self, fixed: bool = False):
        self.fixed = fixed
        self.epoch = 0
        self.consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is pass ``epoch``."""
        self.epoch = 0 if self.fixed else epoch

    def resume(self, batches: int) -> None:
        """The next iteration leaves out its first batches, which were trained on before; no audio is read for them."""
        self.consumed = batches

    def take(self) -> tuple[int, int]:
        """The pass that begins now, and how many of its batches it leaves out; the one after it will be whole."""
        taken, self.consumed = (self.epoch, self.consumed), 0
        return taken

    def ended(self, epoch: int) -> None:
        """Goes on to the next pass, unless another was set meanwhile."""
        if self.epoch == (0 if self.fixed else epoch):
            self.set_epoch(epoch + 1)


@dataclass(frozen=True)
class SkippedBatches:
    """What a worker says before its first batch of a resumed pass: how many it has left out."""

    batches: int


class StreamSource(Protocol):
    """Where each worker of a stream gets its batches of cuts from."""

    def seed_of(self, epoch: int, worker: int) -> int: ...

    def sampler(self, epoch: int, worker: int) -> Iterable[CutSet]: ...


class StreamDataset(Passes, torch.utils.data.IterableDataset):
    """Steps of data that can only be read in order: every worker opens them anew for each pass and samples itself.

    Torch takes one batch of each worker in turn. So of the first ``n`` batches of a pass, worker ``w`` of ``W`` had
    those number ``w``, ``w + W``, ... and leaves out just these when the pass is resumed at batch ``n``. Before its
    first batch it then yields a :class:`SkippedBatches`, and another if it had its turn already in the round of batch ``n``.

    Args:
        source: the batches of cuts.
        dataset: turns them into steps.
    """

    def __init__(self, source: StreamSource, dataset: MTBIDataset):
        super().__init__()
        self.source = source
        self.dataset = dataset

    def __iter__(self) -> Iterator[StepBatch | SkippedBatches]:
        return self._read(*self.take())

    def _read(self, epoch: int, consumed: int) -> Iterator[StepBatch | SkippedBatches]:
        worker = torch.utils.data.get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            fix_random_seed(self.source.seed_of(epoch, index))  # the process is ours
        batches = (cuts for cuts in self.source.sampler(epoch, index))  # iter() of a Lhotse sampler starts it again
        if consumed:
            share = len(range(index, consumed, workers))
            yield SkippedBatches(sum(1 for _ in islice(batches, share)))
            if index < consumed % workers:
                yield SkippedBatches(0)
        for cuts in batches:
            yield self.dataset[cuts]
