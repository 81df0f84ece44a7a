# SPDX-License-Identifier: Apache-2.0
"""Text answers to prompts about transcripts or speech: what validation, the benchmark and users share.

Under tensor or pipeline parallelism all processes of a model replica ask the same, and each gets all answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.inference.generate import Generated, check_prompts, evaluating, generate
from nemo_mtbi.layouts.layout import group_by_length, speech
from nemo_mtbi.llm.lora import without_lora
from nemo_mtbi.parallel.agreement import agreed
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.model import SpeechLLM


@dataclass(frozen=True)
class Responder:
    """Answers with one model, chat format and decoding configuration.

    Attributes:
        model: the speech LLM; a `LayoutDecoder` alone answers text only.
        chat: its chat format.
        config: decoding parameters.
        encode_seconds: longest padded audio, in seconds, that is encoded at once.
        adapted: whether what the LLM has learned is on; without its adapters it is the text LLM that it was.
    """

    model: SpeechLLM | LayoutDecoder
    chat: ChatFormat
    config: GenerationConfig
    encode_seconds: float = 300.0
    adapted: bool = True

    @property
    def speech_llm(self) -> SpeechLLM:
        """The speech LLM.

        Raises:
            ValueError: if the model is a text LLM.
        """
        if not isinstance(self.model, SpeechLLM):
            raise ValueError("this model is a text LLM without a speech encoder: ask it about text")
        return self.model

    def layouts(
        self, layouts: Sequence[Sequence[int]], frames: Tensor | None = None, progress: Callable | None = None
    ) -> list[Generated]:
        """Return answers to finished prompt layouts; without ``frames`` they are text only.

        Off the first stage ``frames`` are not read: what :meth:`encode` returns there will do.
        """
        frames = self.model.no_frames() if frames is None else frames
        with self.adaptation():
            return generate(self.model, layouts, frames, self.chat.end_ids, self.config, progress)

    def without_adapters(self) -> Responder:
        """Return a responder with the text LLM as it was before training."""
        return replace(self, adapted=False)

    def adaptation(self) -> AbstractContextManager:
        """Return a context in which the LLM's adapters are on, or off if not ``adapted``.

        Raises:
            ValueError: if the LLM itself was trained, and is to be what it was.
        """
        if not self.adapted and not self.model.llm_state.has_original_weights:
            raise ValueError(
                "this model's LLM itself was trained, so that it can't answer as it did before: ask the LLM that it "
                "was, by its path"
            )
        return nullcontext() if self.adapted else without_lora(self.model.chunks)

    def text(self, requests: Sequence[tuple[str, str]], progress: Callable | None = None) -> list[str]:
        """Return answers to (prompt, transcript) pairs."""
        layouts = [self.chat.prompt(prompt, transcript) for prompt, transcript in requests]
        return [self.chat.decode(answer.ids) for answer in self.layouts(layouts, progress=progress)]

    def speech(
        self, audio: Sequence[Tensor], requests: Sequence[tuple[str, int]], progress: Callable | None = None
    ) -> list[str]:
        """Return answers to (prompt, index of an utterance) pairs.

        Args:
            audio: ``[n]`` samples of each utterance, at the encoder's rate. Each is encoded once.
            requests: prompt, and index in ``audio`` of the utterance that it is about.
            progress: called with the number of rows answered.

        Raises:
            ValueError: if an utterance is too short to own a frame, or too long for the LLM.
        """
        counts = [self.speech_llm.frame_counter(len(samples)) for samples in audio]
        offsets = [0, *accumulate(counts)][:-1]
        layouts = []
        for prompt, index in requests:
            if not counts[index]:
                raise ValueError(f"utterance {index} has {len(audio[index])} samples: too short for one speech frame")
            layouts.append(self.chat.prompt(prompt, speech(offsets[index], counts[index])))
        # before hours of audio, which the LLM could not take anyway, fill the memory of the encoder
        check_prompts(self.model, layouts, sum(counts), self.config)
        return [self.chat.decode(answer.ids) for answer in self.layouts(layouts, self.encode(audio), progress)]

    def encode(self, audio: Sequence[Tensor]) -> Tensor:
        """Return connector frames ``[F, H]`` of all utterances in order; off the first stage ``[0, H]``.

        Raises:
            RuntimeError: if an utterance can't be encoded. All processes of a replica raise.
        """
        return agreed(lambda: self._encode(audio))

    @torch.no_grad()
    def _encode(self, audio: Sequence[Tensor]) -> Tensor:
        model = self.speech_llm
        if model.encoder is None or model.connector is None:
            return model.no_frames()
        counter, device = model.frame_counter, model.device
        counts = [counter(len(samples)) for samples in audio]
        parts: dict[int, Tensor] = {}
        with evaluating([model.connector]):  # frames must not be dropped out, and not differently on each process
            for group in group_by_length([len(x) for x in audio], int(self.encode_seconds * counter.sample_rate)):
                lengths = torch.tensor([len(audio[i]) for i in group])
                padded = torch.nn.utils.rnn.pad_sequence([audio[i] for i in group], batch_first=True)
                expected = torch.tensor([counts[i] for i in group])
                frames = model.encode_audio(padded.to(device), lengths.to(device), expected)
                parts.update(zip(group, frames.split(expected.tolist()), strict=True))
        return torch.cat([model.no_frames(), *(parts[i] for i in range(len(audio)))])
