# SPDX-License-Identifier: Apache-2.0
"""Two encoders side by side, such as one for words and one for all other sounds (SALMONN, arXiv 2310.13289)."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from nemo_mtbi.encoders.base import EncoderShape, SpeechEncoder
from nemo_mtbi.layouts.frames import FrameCounter


class PairedEncoder(nn.Module):
    """Frames of a first encoder, each with what a second one gives in the same time.

    Frames of a faster second encoder are stacked, those of a slower one repeated; where it has none, at the end of an
    utterance, they are zero.

    Raises:
        ValueError: if sample rates differ, or neither frame rate is a multiple of the other.
    """

    def __init__(self, first: SpeechEncoder, second: SpeechEncoder):
        super().__init__()
        self.first, self.second = first, second
        self.shape: EncoderShape
        self.shape, self._stack, self._repeat = paired_shape(first.shape, second.shape)

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances by both.

        Args:
            audio: ``[U, N]`` samples at ``shape.sample_rate``.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` frames and their ``[U]`` valid lengths.
        """
        frames, counts = self.first(audio, lengths)  # [U, E, D1]
        others, other_counts = self.second(audio, lengths)  # [U, F, D2]
        steps = torch.arange(others.shape[1], device=others.device)
        others = others.masked_fill((steps >= other_counts[:, None])[..., None], 0.0)
        others = others.repeat_interleave(self._repeat, 1)
        steps_needed = frames.shape[1] * self._stack
        others = nn.functional.pad(others, (0, 0, 0, max(steps_needed - others.shape[1], 0)))[:, :steps_needed]
        others = others.reshape(*frames.shape[:2], -1)  # [U, E, stack * D2]
        return torch.cat([frames, others.to(frames.dtype)], -1), counts


AnyEncoder = SpeechEncoder | PairedEncoder


def paired_shape(first: EncoderShape, second: EncoderShape) -> tuple[EncoderShape, int, int]:
    """Return the shape of both together, how many frames of the second are stacked, and how often each is repeated.

    Args:
        first: shape of the encoder that gives the frame rate.
        second: shape of the other one.

    Raises:
        ValueError: if they can't be brought together.
    """
    if first.sample_rate != second.sample_rate:
        raise ValueError(
            f"model.encoder.beside takes {second.sample_rate} Hz, and model.pretrained_asr {first.sample_rate} Hz: "
            "give encoders of one sample rate"
        )
    steps = (FrameCounter(shape.stages, shape.sample_rate).samples_per_frame for shape in (first, second))
    ratio = Fraction(*steps)
    if 1 not in (ratio.numerator, ratio.denominator):
        raise ValueError(
            f"model.encoder.beside gives {second.frame_rate:g} frames per second, and model.pretrained_asr "
            f"{first.frame_rate:g}: one must be a multiple of the other"
        )
    size = first.size + second.size * ratio.numerator
    return EncoderShape(size, first.sample_rate, first.stages), ratio.numerator, ratio.denominator
