# SPDX-License-Identifier: Apache-2.0
"""Turns sampled cuts into a step: loads audio, builds the rows, groups them into microbatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from lhotse.cut import Cut

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
        """Add the utterances of a cut; return the index of the first of them.

        Args:
            audio: ``[N]`` samples of each.
            drawn: the rows of the cut, for its id.
            frames: the frame counter of the model.
        """
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
        with_twins: every row with speech gets its text twin, for a loss that compares them.
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
        """Return a copy that reads audio from what a policy allows."""
        other = copy(self)
        other.policy = policy
        return other

    def __getitem__(self, cuts: Iterable[Cut]) -> StepBatch:
        """Return the step of some cuts, with their audio loaded.

        Raises:
            BadAudioError: under ``on_bad_audio: raise``.
        """
        skipped: Counter = Counter()
        step = _Step()
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
        """Add the rows of an utterance. Pieces of audio that several rows share are encoded once."""
        samples = load_samples(cut, self.frames, self.policy)
        slots = self._audio_slots(drawn, len(samples), step.stats)
        if self.with_rows:
            num_frames = self.frames(len(samples))
            step.infos += [self._info(drawn, behavior, len(step.audio), num_frames) for behavior in drawn.behaviors]
        firsts: dict[tuple[tuple[int, int], ...], int] = {}  # index of the first utterance, by pieces
        for slot in slots:
            if slot.pieces not in firsts:
                pieces = [samples[start:end] for start, end in slot.pieces]
                firsts[slot.pieces] = step.add_audio(pieces, drawn, self.frames)
        step.rows += self._rows(drawn, slots, [firsts[slot.pieces] if slot.pieces else None for slot in slots])

    def _add_conversation(self, step: _Step, drawn: DrawnRows, conversation: Conversation) -> None:
        """Add the one row of a conversation, and all of its audios."""
        audio = [load_samples(cut, self.frames, self.policy) for cut in conversation.cuts()]
        counts = [self.frames(len(samples)) for samples in audio]
        first = step.add_audio(audio, drawn, self.frames)
        row = conversation_row(conversation, self.chat, counts, first if audio else None, self.with_twins)
        step.rows.append(row)
        step.stats["conversations"] += 1
        if self.with_rows:
            last = conversation.exchanges[-1]
            # The last position without a label is the last but one of the last prompt.
            unlabelled = max(index for index, label in enumerate(row.labels) if label == IGNORE)
            prompt = row.layout[: unlabelled + 2]
            instruction = " ".join(item for item in last.contents if isinstance(item, str))
            step.infos.append(RowInfo(first, drawn.cut_id, CONVERSATION, prompt, instruction, last.answer, False, ""))

    def _audio_slots(self, drawn: DrawnRows, num_samples: int, stats: Counter) -> Sequence[AudioSlot]:
        """Return the audio slot of each row of a cut: all speech, all text, or interleaved.

        Args:
            drawn: the rows.
            num_samples: of the utterance.
            stats: counts the kinds of rows.
        """
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
        slots = []
        for number, behavior in enumerate(drawn.behaviors):
            # Without draws by task, a cut may have several rows of one task: the number tells them apart.
            rng = stable_rng("interleave", drawn.seed, drawn.epoch, drawn.cut_id, behavior.task, number)
            is_text = choose_text(words, config, rng)
            if not any(is_text):
                slots.append(speech)
                continue
            if all(is_text):
                stats["text_rows"] += 1
                slots.append(AudioSlot((), tuple(text_only(tokens))))
                continue
            stats["interleaved_rows"] += 1
            if config.level == "wave":
                args = (num_samples, self.frames.sample_rate, self.frames)
                slots.append(interleave_wave(drawn.words, is_text, tokens, *args))
            else:
                layout = interleave(drawn.words, is_text, tokens, num_frames, self.frames.frame_seconds)
                slots.append(AudioSlot(whole, tuple(layout)))
        return slots

    def _rows(self, drawn: DrawnRows, slots: Sequence[AudioSlot], utterances: Sequence[int | None]) -> list[Row]:
        """Return the rows of a cut; their twins hold the transcript that the targets were made from.

        Args:
            drawn: behaviors and transcript.
            slots: audio slot of each row.
            utterances: index of the first piece of each row in the step; ``None`` for text.
        """
        rows = [
            replace(behavior.row(self.chat, slot.layout, utterance), pieces=len(slot.pieces))
            for behavior, slot, utterance in zip(drawn.behaviors, slots, utterances, strict=True)
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
