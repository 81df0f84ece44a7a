# SPDX-License-Identifier: Apache-2.0
"""Steps of any size, to find the largest that fits into memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_mtbi.data.frames import FrameCounter
from nemo_mtbi.data.layout import Row, StepBatch, collate, make_row, speech
from nemo_mtbi.modules.llm_training import build_llm_optimizer

if TYPE_CHECKING:
    from nemo_mtbi.models.mtbi_model import MTBIModel


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
        """
        Args:
            audio: ``[U, N]`` samples.
            responses: ``[U, T]`` token ids.
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
        """Positions of an utterance, over all its rows."""
        return self.rows * (self.frames(samples) + answer - 1)


def step_maker(model: MTBIModel, rows: int = 1) -> StepMaker:
    """That of a model."""
    config = model.config
    return StepMaker(model.speech_llm.frame_counter, rows, config.micro_batch_tokens, config.loss.uses_teacher)


def largest(fits: Callable[[int], bool], start: int = 8, tolerance: float = 0.05) -> int:
    """The largest size that fits, found by doubling and then halving the gap.

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


def fits_in_memory(model: MTBIModel, make: StepMaker, samples: int, answer: int) -> Callable[[int], bool]:
    """Whether a step of so many utterances can be trained on: forward, backward and the optimizer's states.

    Args:
        model: on its device.
        make: of the steps.
        samples: of each utterance.
        answer: tokens of each answer.
    """
    optimizer, llm = torch.optim.AdamW(model.trained, lr=0.0), None
    if model.speech_llm.decoder.trains:
        llm = build_llm_optimizer(model.speech_llm.chunks, model.config.llm, optimizer.defaults)

    def attempt(utterances: int) -> bool:
        audio = 0.1 * torch.randn(utterances, samples)
        batch = make(audio, torch.ones(utterances, answer, dtype=torch.int64)).to(model.device)
        try:
            model.speech_llm.train_step(batch, batch.num_targets)
            optimizer.step()
            if llm is not None:
                llm.zero_grad()
                llm.reduce()
                llm.step(0.0)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            del batch
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return attempt
