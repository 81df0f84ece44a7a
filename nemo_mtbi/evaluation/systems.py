# SPDX-License-Identifier: Apache-2.0
"""Systems that answer: an MTBI model on speech, the cascade, the LLM on reference transcripts.

All three put something into the audio slot of the same chat format and ask the same LLM: frames, the tokens of a
recognizer's transcript, the tokens of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.evaluation.hypotheses import Hypotheses
from nemo_mtbi.evaluation.items import Clip, Divergence, Reply, load_clip
from nemo_mtbi.evaluation.recognizers import Recognizer
from nemo_mtbi.inference.divergence import twin_divergences
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.layouts.layout import make_row, speech

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Slots:
    """What some utterances put into the audio slot of a prompt.

    Attributes:
        values: Text or layout values of each utterance, or why it can't be used.
        frames: ``[F, H]`` connector frames that negative values point to; None for text.
        seconds: Of speech that was loaded.
    """

    values: Sequence[str | Sequence[int] | BadAudioError]
    frames: Tensor | None = None
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of the frames."""
        return 0 if self.frames is None else self.frames.numel() * self.frames.element_size()


class TextSystem:
    """The LLM on reference transcripts.

    Args:
        responder: An LLM with its chat format and decoding.
    """

    def __init__(self, responder: Responder):
        self.responder = responder

    def slots(self, clips: Sequence[Clip]) -> Slots:
        """What the utterances put into the audio slot."""
        return Slots([clip.transcript or "" for clip in clips])

    def ask(
        self, slots: Slots, requests: Sequence[tuple[str, int]], on_bad_audio: str, progress: Progress
    ) -> list[Reply]:
        """Answers to (prompt, index of an utterance) pairs, in order.

        Args:
            slots: Of the utterances.
            requests: What is asked about which.
            on_bad_audio: ``raise``, or ``abstain``: an empty answer.
            progress: Called with the number of questions answered.

        Raises:
            BadAudioError: an utterance can't be used, or is too long for the LLM beside the prompt.
        """
        replies: list[Reply | None] = [None] * len(requests)
        layouts, heard = [], []
        for index, (prompt, clip) in enumerate(requests):
            found = self._layout(prompt, slots.values[clip])
            if isinstance(found, BadAudioError):
                if on_bad_audio == "raise":
                    raise found
                replies[index] = Reply("", 0, False, found.reason)
                progress(1)
            else:
                layouts.append(found)
                heard.append(index)
        if layouts:
            answers = self.responder.layouts(layouts, slots.frames, progress)
            for index, answer in zip(heard, answers, strict=True):
                text = self.responder.chat.decode(answer.ids)
                replies[index] = Reply(text, len(answer.ids) + (not answer.truncated), answer.truncated)
        return replies

    def divergences(
        self, slots: Slots, requests: Sequence[tuple[str, int]], transcripts: Sequence[str], answers: Sequence[Reply]
    ) -> list[Divergence]:
        """How far this system is from its own LLM on the transcript, at the tokens of an answer.

        There is no value where the LLM itself was trained: what it would have predicted before is not known any more.

        Args:
            slots: Of the utterances.
            requests: (prompt, index of an utterance) pairs.
            transcripts: What is said, for each request.
            answers: The LLM's answers to the transcripts.
        """
        chat, rows, compared = self.responder.chat, [], []
        found = [Divergence(None, 0)] * len(requests)
        if not self.responder.model.llm_state.has_original_weights:
            return found
        longest = self.responder.model.decoder.max_sequence_length
        for index, ((prompt, clip), transcript, answer) in enumerate(zip(requests, transcripts, answers, strict=True)):
            slot, response = slots.values[clip], chat.response(answer.answer, answer.truncated)
            if isinstance(slot, BadAudioError) or answer.unheard is not None or not response:
                continue
            row, twin = (make_row(chat.prompt(prompt, part), response) for part in (slot, transcript))
            if max(len(row.layout), len(twin.layout)) <= longest:
                rows.append(replace(row, twin=twin))
                compared.append(index)
        frames = self.responder.model.no_frames() if slots.frames is None else slots.frames
        with self.responder.adaptation():
            values = twin_divergences(self.responder.model, rows, frames, self.responder.config.batch_tokens)
        for index, row, value in zip(compared, rows, values, strict=True):
            found[index] = Divergence(value, len(row.response))
        return found

    def _layout(self, prompt: str, slot: str | Sequence[int] | BadAudioError) -> list[int] | BadAudioError:
        if isinstance(slot, BadAudioError):
            return slot
        chat, config = self.responder.chat, self.responder.config
        layout = chat.prompt(prompt, slot)
        limit = self.responder.model.decoder.max_sequence_length - config.max_new_tokens
        if len(layout) <= limit:
            return layout
        taken = len(layout) - len(chat.prompt(prompt, ""))
        if len(layout) - taken > limit:
            raise ValueError(f"the prompt {prompt[:60]!r} alone is longer than the {limit} positions of the LLM")
        return BadAudioError("too_long", f"an utterance takes {taken} positions, too many beside {prompt[:60]!r}")


class SpeechSystem(TextSystem):
    """An MTBI model on speech."""

    def slots(self, clips: Sequence[Clip]) -> Slots:
        counter = self.responder.model.frame_counter
        loaded = [load_clip(clip, counter) for clip in clips]
        samples = [x for x in loaded if not isinstance(x, BadAudioError)]
        offsets = iter([0, *accumulate(counter(len(x)) for x in samples)])
        values = [x if isinstance(x, BadAudioError) else speech(next(offsets), counter(len(x))) for x in loaded]
        return Slots(values, self.responder.encode(samples), sum(map(len, samples)) / counter.sample_rate)


class CascadeSystem(TextSystem):
    """A recognizer, then the LLM on its text.

    Args:
        responder: As for :class:`TextSystem`.
        recognizer: Writes the transcripts.
    """

    def __init__(self, responder: Responder, recognizer: Recognizer):
        super().__init__(responder)
        self._recognizer = recognizer

    def slots(self, clips: Sequence[Clip]) -> Slots:
        frames = self._recognizer.frames
        loaded = [load_clip(clip, frames) for clip in clips]
        good = [x for x in loaded if not isinstance(x, BadAudioError)]
        texts = iter(self._recognizer.transcribe(good))
        values = [x if isinstance(x, BadAudioError) else next(texts) for x in loaded]
        return Slots(values, None, sum(map(len, good)) / frames.sample_rate)


class HypothesesSystem(TextSystem):
    """Transcripts made elsewhere, then the LLM on their text.

    Args:
        responder: As for :class:`TextSystem`.
        hypotheses: The transcripts, with one for each utterance that will be asked about.
    """

    def __init__(self, responder: Responder, hypotheses: Hypotheses):
        super().__init__(responder)
        self._hypotheses = hypotheses

    def slots(self, clips: Sequence[Clip]) -> Slots:
        return Slots([self._hypotheses.text(clip) for clip in clips])


def with_limits(responder: Responder, max_new_tokens: int | None, batch_tokens: int | None) -> Responder:
    """The responder with other decoding limits, where they are given."""
    given: Mapping[str, int | None] = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    config = replace(responder.config, **{key: value for key, value in given.items() if value is not None})
    return replace(responder, config=config)
