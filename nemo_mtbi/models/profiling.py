# SPDX-License-Identifier: Apache-2.0
"""Steps of any size, to find the largest that fits into memory: by trying, or by NeMo's OOMptimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType, NeuralType
from torch import Tensor

from nemo_mtbi.archive.speech_model import SpeechModel
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.layouts.layout import Row, StepBatch, collate, make_row, speech
from nemo_mtbi.llm.full_finetune import build_llm_optimizer


@dataclass(frozen=True)
class StepMaker:
    """Builds a step of utterances of one length, each with the same number of rows and equally long answers.

    Attributes:
        frames: the frame counter of the model.
        rows: of each utterance.
        micro_batch_tokens: bound on rows times longest row of a microbatch.
        twins: whether the loss compares with text.
    """

    frames: FrameCounter
    rows: int
    micro_batch_tokens: int
    twins: bool

    def __call__(self, audio: Tensor, responses: Tensor) -> StepBatch:
        """Build a step.

        Args:
            audio: ``[U, N]`` samples.
            responses: ``[U, T]`` token ids.

        Raises:
            ValueError: if the audio is too short for a frame.
        """
        count = self.frames(audio.shape[1])
        if not count:
            raise ValueError(f"{audio.shape[1]} samples own no speech frame: profile longer audio")
        made = []
        for utterance, tokens in enumerate(responses.tolist()):
            row = make_row(speech(0, count), tokens, utterance)
            twin = make_row(tokens, tokens) if self.twins else None
            made += [Row(row.layout, row.labels, utterance, twin)] * self.rows
        return collate(list(audio.cpu()), [count] * len(audio), made, self.micro_batch_tokens)

    def cost(self, samples: int, answer: int) -> int:
        """Return positions of an utterance, over all its rows."""
        return self.rows * (self.frames(samples) + answer - 1)


def step_maker(model: SpeechModel, rows: int = 1) -> StepMaker:
    """Return the :class:`StepMaker` of a model."""
    config = model.config
    return StepMaker(model.speech_llm.frame_counter, rows, config.micro_batch_tokens, config.loss.uses_teacher)


@dataclass
class ProfilingBatch:
    """Batch that :func:`oomptimizer_schema` describes: noise in the place of utterances and answers.

    Attributes:
        audio: ``[U, N]`` samples.
        audio_lens: ``[U]``, all of them N.
        responses: ``[U, T]`` token ids.
    """

    audio: Tensor
    audio_lens: Tensor
    responses: Tensor


def oomptimizer_schema(model: SpeechModel) -> dict[str, Any]:
    """Return how NeMo's ``oomptimizer.py`` makes batches: inputs as long as samples, outputs as answer tokens."""
    vocabulary = model.speech_llm.decoder.architecture.vocab_size
    labels = {"seq_length": "output", "vocab_size": vocabulary}
    return {
        "cls": ProfilingBatch,
        "inputs": [
            {"name": "audio", "type": NeuralType(("B", "T"), AudioSignal()), "seq_length": "input"},
            {"name": "audio_lens", "type": NeuralType(("B",), LengthsType()), "seq_length": "input"},
            {"name": "responses", "type": NeuralType(("B", "T"), LabelsType()), **labels},
        ],
    }


def profile_step(model: SpeechModel, batch: ProfilingBatch, rows: int = 1) -> Tensor:
    """Run forward and backward of a step of noise; gradients stay on what trains.

    Args:
        model: on its device.
        batch: of noise.
        rows: of each utterance.

    Returns:
        The loss, on which ``backward`` may be called once more and does nothing.
    """
    step = step_maker(model, rows)(batch.audio.float(), batch.responses).to(model.device)
    if model.llm_optimizer is not None:
        model.llm_optimizer.zero_grad()
    loss, _ = model.speech_llm.train_step(step, step.num_targets)
    if model.llm_optimizer is not None:
        model.llm_optimizer.reduce()
    return loss.detach().requires_grad_()


def largest(fits: Callable[[int], bool], start: int = 8, tolerance: float = 0.05) -> int:
    """Return the largest size that fits, searched by doubling and then halving the gap.

    Args:
        fits: whether a size does; every size below one that fits fits too.
        start: where to begin.
        tolerance: ends when the gap is smaller than this share of the size that did not fit.

    Returns:
        0 if nothing fits.
    """
    good, bad = 0, None
    size = max(start, 1)
    while bad is None or (bad - good > 1 and bad - good > tolerance * bad):
        if fits(size):
            good = size
        else:
            bad = size
        size = 2 * good if bad is None else (good + bad) // 2 if good else bad // 2
        if not size:
            break
    return good


def fits_in_memory(model: SpeechModel, rows: int, samples: int, answer: int) -> Callable[[int], bool]:
    """Whether a step of so many utterances can be trained on: forward, backward and the optimizer's states.

    Args:
        model: on its device.
        rows: of each utterance.
        samples: of each utterance.
        answer: tokens of each answer.
    """
    optimizer = torch.optim.AdamW(model.trained, lr=0.0)
    if model.speech_llm.llm_state.weights_train and model.llm_optimizer is None:
        model.llm_optimizer = build_llm_optimizer(model.speech_llm.chunks, model.config.llm, optimizer.defaults)

    def attempt(utterances: int) -> bool:
        audio, lengths = 0.1 * torch.randn(utterances, samples), torch.full((utterances,), samples)
        batch = ProfilingBatch(audio, lengths, torch.ones(utterances, answer, dtype=torch.int64))
        try:
            profile_step(model, batch, rows)
            optimizer.step()
            if model.llm_optimizer is not None:
                model.llm_optimizer.step(0.0)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return attempt
