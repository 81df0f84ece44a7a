# SPDX-License-Identifier: Apache-2.0
"""The number of connector frames of an utterance, computed without running a model.

Every stage between the waveform and the connector's output (short-time Fourier transform, strided convolutions, frame
stacking) maps a length ``n`` to ``floor((n + padding - kernel) / stride) + 1``. The data side chains the stages
to know the exact number of frames of an utterance before it is encoded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LengthStage:
    """One strided stage.

    Attributes:
        kernel: width, in values of the stage's input.
        stride: values of the input from one output to the next.
        padding: sum of both sides.
        ceil: round up instead of down.
    """

    kernel: int
    stride: int
    padding: int = 0
    ceil: bool = False

    def __call__(self, length: int) -> int:
        """Return the length of the output for an input of ``length``; at least 0."""
        span = length + self.padding - self.kernel
        steps = -(-span // self.stride) if self.ceil else span // self.stride
        return max(steps + 1, 0)


@dataclass(frozen=True)
class FrameCounter:
    """Counts connector frames. Picklable, so that data workers carry it.

    Attributes:
        stages: from the waveform to the connector's output.
        sample_rate: in hertz.
    """

    stages: tuple[LengthStage, ...]
    sample_rate: int

    @property
    def samples_per_frame(self) -> int:
        """Product of the strides."""
        product = 1
        for stage in self.stages:
            product *= stage.stride
        return product

    @property
    def frame_seconds(self) -> float:
        """Time from one frame to the next, in seconds."""
        return self.samples_per_frame / self.sample_rate

    def __call__(self, num_samples: int) -> int:
        """Return the number of frames of ``num_samples`` samples; 0 if the audio is too short to own one."""
        length = num_samples
        for stage in self.stages:
            length = stage(length)
            if length <= 0:
                return 0
        return length
