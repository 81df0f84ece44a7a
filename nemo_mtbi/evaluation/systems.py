# SPDX-License-Identifier: Apache-2.0
"""Systems that answer: an MTBI model on speech, the cascade, the LLM on reference transcripts.

All three use the same chat format and the same LLM; they differ in what fills the audio slot: frames, the tokens of a
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
from nemo_mtbi.speech_llm.model import SpeechLLM

Progress = Callable[[int], None]
SlotValue = str | Sequence[int] | BadAudioError


@dataclass(frozen=True)
class Slots:
    """Contents of the audio slot of a prompt, for some utterances.

    Attributes:
        values: Text or layout values of each utterance, or the error of one that can't be used.
        frames: ``[F, H]`` connector frames that negative values point to; None for text.
        seconds: Duration of the speech that was loaded.
    """

    values: Sequence[SlotValue]
    frames: Tensor | None = None
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """Size of the frames in bytes."""
        return 0 if self.frames is None else self.frames.numel() * self.frames.element_size()


class TextSystem:
    """The LLM on reference transcripts.

    Args:
        responder: An LLM with its chat format and decoding.
    """

    def __init__(self, responder: Responder):
        self.responder = responder

    def slots(self, clips: Sequence[Clip]) -> Slots:
        """Return the contents of the audio slot for some utterances."""
        return Slots([clip.transcript or "" for clip in clips])

    def ask(
        self, slots: Slots, requests: Sequence[tuple[str, int]], on_bad_audio: str, progress: Progress
    ) -> list[Reply]:
        """Return the answers to (prompt, index of an utterance) pairs, in order.

        Args:
            slots: Of the utterances.
            requests: The pairs.
            on_bad_audio: ``raise``, or ``abstain``: an empty answer.
            progress: Called with the number of questions answered.

        Raises:
            BadAudioError: an utterance can't be used, or is too long for the LLM beside the prompt.
        """
        replies: dict[int, Reply] = {}
        layouts: dict[int, list[int]] = {}
        for index, (prompt, clip) in enumerate(requests):
            layout = self._layout(prompt, slots.values[clip])
            if isinstance(layout, BadAudioError):
                if on_bad_audio == "raise":
                    raise layout
                replies[index] = Reply("", 0, False, layout.reason)
                progress(1)
            else:
                layouts[index] = layout
        if layouts:
            answers = self.responder.layouts(list(layouts.values()), slots.frames, progress)
            for index, answer in zip(layouts, answers, strict=True):
                text = self.responder.chat.decode(answer.ids)
                replies[index] = Reply(text, len(answer.ids) + (not answer.truncated), answer.truncated)
        return [replies[index] for index in range(len(requests))]

    def divergences(
        self, slots: Slots, requests: Sequence[tuple[str, int]], transcripts: Sequence[str], answers: Sequence[Reply]
    ) -> list[Divergence]:
        """Return the divergence of this system from its own LLM on the transcript, at the tokens of an answer.

        There is no value where the LLM itself was trained: its predictions before the training are not known any more.

        Args:
            slots: Of the utterances.
            requests: (prompt, index of an utterance) pairs.
            transcripts: The transcript of each request.
            answers: The LLM's answers to the transcripts.
        """
        chat, rows, compared = self.responder.chat, [], []
        divergences = [Divergence(None, 0)] * len(requests)
        if not self.responder.model.llm_state.has_original_weights:
            return divergences
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
            divergences[index] = Divergence(value, len(row.response))
        return divergences

    def _layout(self, prompt: str, slot: SlotValue) -> list[int] | BadAudioError:
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
    """An MTBI model on speech.

    Args:
        responder: As for :class:`TextSystem`, with a speech LLM.

    Raises:
        ValueError: the model of the responder is an LLM alone.
    """

    def __init__(self, responder: Responder):
        super().__init__(responder)
        if not isinstance(responder.model, SpeechLLM):
            raise ValueError("a speech system needs a speech LLM: take the responder of an MTBI model")
        self._frame_counter = responder.model.frame_counter

    def slots(self, clips: Sequence[Clip]) -> Slots:
        """Load and encode some utterances, all at once."""
        counter = self._frame_counter
        loaded = [load_clip(clip, counter) for clip in clips]
        samples = [x for x in loaded if not isinstance(x, BadAudioError)]
        offsets = iter([0, *accumulate(counter(len(x)) for x in samples)])
        values: list[SlotValue] = [
            x if isinstance(x, BadAudioError) else speech(next(offsets), counter(len(x))) for x in loaded
        ]
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
        """Load and transcribe some utterances."""
        frames = self._recognizer.frames
        loaded = [load_clip(clip, frames) for clip in clips]
        good = [x for x in loaded if not isinstance(x, BadAudioError)]
        texts = iter(self._recognizer.transcribe(good))
        values: list[SlotValue] = [x if isinstance(x, BadAudioError) else next(texts) for x in loaded]
        return Slots(values, None, sum(map(len, good)) / frames.sample_rate)


class HypothesesSystem(TextSystem):
    """Transcripts made elsewhere, then the LLM on their text.

    Args:
        responder: As for :class:`TextSystem`.
        hypotheses: The transcripts, with one for each utterance; see ``Hypotheses.check``.
    """

    def __init__(self, responder: Responder, hypotheses: Hypotheses):
        super().__init__(responder)
        self._hypotheses = hypotheses

    def slots(self, clips: Sequence[Clip]) -> Slots:
        """Return the transcripts of some utterances.

        Raises:
            ValueError: an utterance has none.
        """
        texts = {clip.id: self._hypotheses.text(clip) for clip in clips}
        values: list[SlotValue] = [text for text in texts.values() if text is not None]
        if len(values) < len(clips):
            missing = next(name for name, text in texts.items() if text is None)
            raise ValueError(f"{self._hypotheses.key} has no text for utterance {missing}: add a line with it")
        return Slots(values)


def with_limits(responder: Responder, max_new_tokens: int | None, batch_tokens: int | None) -> Responder:
    """Return the responder with other decoding limits, where they are given."""
    given: Mapping[str, int | None] = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    config = replace(responder.config, **{key: value for key, value in given.items() if value is not None})
    return replace(responder, config=config)
