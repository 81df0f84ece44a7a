# SPDX-License-Identifier: Apache-2.0
"""Answers of a restored or trained model: `generate` for utterances, `converse` for conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.inference.audio import load_audio
from nemo_mtbi.inference.converse import Message, answer
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.parallel.agreement import agreed
from nemo_mtbi.speech_llm.model import SpeechLLM


class GenerationMixin:
    """Answers of a model, to utterances and to conversations."""

    speech_llm: SpeechLLM
    chat: ChatFormat
    config: ModelConfig

    def responder(self) -> Responder:
        """Return a responder with this model, its chat format and its decoding parameters."""
        return Responder(self.speech_llm, self.chat, self.config.generation)

    def generate(
        self,
        audio: Sequence[str | Path | Tensor],
        prompts: Sequence[str] | str,
        sample_rate: int = 16000,
    ) -> list[str]:
        """Return answers to spoken utterances.

        Args:
            audio: paths, or arrays ``[n]``, ``[channels, n]`` or ``[n, channels]`` at ``sample_rate``; any rate,
                channels are averaged.
            prompts: one for each utterance, or one for all; ``""`` is the empty prompt.
            sample_rate: of arrays, in hertz; files know theirs.

        Raises:
            ValueError: if the numbers differ, or audio is empty, silent, not finite, unreadable or too long.
        """
        if isinstance(audio, (str, Path)) or hasattr(audio, "shape"):
            raise ValueError("audio must be a list of paths or arrays, also for one utterance: audio=[...]")
        prompts = [prompts] * len(audio) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(audio):
            raise ValueError(f"{len(audio)} utterances, but {len(prompts)} prompts: give one each, or one for all")
        samples = self._samples(audio, sample_rate)
        return self.responder().speech(samples, list(zip(prompts, range(len(samples)), strict=True)))

    def converse(self, conversations: Sequence[Sequence[Message]], sample_rate: int = 16000) -> list[str]:
        """Return answers to the last turn of conversations: several turns, several audios or none.

        Args:
            conversations: lists of messages ``{role, content}``, user and assistant in turn, the user last. A content
                is text, or a list of ``{type: text, text: ...}`` and ``{type: audio, audio: path or array}``.
            sample_rate: of arrays, in hertz; files know theirs.

        Raises:
            ValueError: for what is not a conversation, an LLM that knows single turns only, or audio as in
                :meth:`generate`.
        """
        return answer(self.responder(), conversations, lambda sources: self._samples(sources, sample_rate))

    def _samples(self, audio: Sequence[Any], sample_rate: int) -> list[Tensor]:
        """Return samples ``[n]`` of each audio; if one process can't read a file, all raise and none waits."""
        counter = self.speech_llm.frame_counter
        longest = self.speech_llm.decoder.max_sequence_length - self.config.generation.max_new_tokens
        return agreed(lambda: [load_audio(item, counter, sample_rate, longest) for item in audio])
