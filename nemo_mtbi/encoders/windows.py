# SPDX-License-Identifier: Apache-2.0
"""Long audio in windows that overlap, encoded one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.layouts.frames import FrameCounter

AT_ONCE = 300  # seconds of windows that are encoded at once: the output of a convolution for an hour takes 25 GB
Window = tuple[int, int, int]  # utterance, first sample, end


class Windows:
    """Cuts audio into windows, and joins their frames in the middle of each overlap.

    An utterance is encoded as if it were alone: only windows of equal padded length share a batch, since padding
    changes the output of some encoders.

    Args:
        counter: of the encoder's frames.
        config: length and overlap of the windows.
        size: width of a frame, ``D``.

    Raises:
        ValueError: if they overlap by less than what frames at their ends need.
    """

    def __init__(self, counter: FrameCounter, config: EncoderConfig, size: int):
        self._counter, self._size = counter, size
        rate, step = counter.sample_rate, counter.samples_per_frame
        self._window = int(config.window * rate) // step * step
        self._overlap = int(config.overlap_seconds * rate) // (2 * step) * 2 * step
        missing = self._window // step - counter(self._window)  # frames that reach beyond the end of a window
        if self._overlap // 2 < missing * step:
            raise ValueError(
                f"{config.SECTION}.overlap_seconds is {config.overlap_seconds}; windows of this encoder must overlap "
                f"by {2 * missing * step / rate:g} s or more"
            )

    def hold(self, samples: int) -> bool:
        """Return whether an utterance fits into one window."""
        return samples <= self._window

    def of(self, samples: int) -> list[tuple[int, int]]:
        """Return where the windows of an utterance begin and end, in samples."""
        hop = self._window - self._overlap
        starts = range(0, max(samples - self._overlap, 1), hop)
        return [(start, min(start + self._window, samples)) for start in starts if self._counter(samples - start)]

    def encode(
        self,
        audio: Tensor,
        lengths: Tensor,
        encode: Callable[[Sequence[Tensor]], Tensor],
        padded_samples: Callable[[int], int] = lambda samples: samples,
    ) -> tuple[Tensor, Tensor]:
        """Encode utterances of any length.

        Args:
            audio: ``[U, N]``.
            lengths: ``[U]`` valid samples.
            encode: gives frames ``[W, E, D]`` of windows of equal padded length; ``E`` may exceed their count.
            padded_samples: gives the padded length of a window of so many samples.

        Returns:
            ``[U, E, D]`` frames and their ``[U]`` valid lengths.

        Raises:
            RuntimeError: if the encoder gives fewer frames than are counted.
        """
        windows = [(u, *window) for u, size in enumerate(lengths.tolist()) for window in self.of(size)]
        frames: dict[Window, Tensor] = {}
        for batch in self._batches(windows, padded_samples):
            for window, own in zip(batch, encode([audio[u, a:b].float() for u, a, b in batch]), strict=True):
                count = self._counter(window[2] - window[1])
                if len(own) < count:
                    raise RuntimeError(
                        f"the encoder gives {len(own)} frames for {window[2] - window[1]} samples, but its "
                        f"configuration says {count}: this kind of encoder is not supported"
                    )
                frames[window] = own[:count]
        return self._join(frames, audio, lengths)

    def _batches(self, windows: Sequence[Window], padded_samples: Callable[[int], int]) -> Iterator[list[Window]]:
        """Yield windows of equal padded length, as many at once as memory allows."""
        for size in sorted({padded_samples(stop - start) for _, start, stop in windows}):
            chosen = [window for window in windows if padded_samples(window[2] - window[1]) == size]
            most = max(AT_ONCE * self._counter.sample_rate // size, 1)
            yield from (chosen[first : first + most] for first in range(0, len(chosen), most))

    def _join(self, frames: dict[Window, Tensor], audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return frames ``[U, E, D]`` of whole utterances and their ``[U]`` valid lengths."""
        counts = [self._counter(size) for size in lengths.tolist()]
        dtype = next((own.dtype for own in frames.values()), torch.float32)
        shape = len(counts), self._counter(audio.shape[1]), self._size
        encoded = torch.zeros(shape, dtype=dtype, device=audio.device)
        step, half = self._counter.samples_per_frame, self._overlap // 2
        for utterance, count in enumerate(counts):
            own = sorted(window for window in frames if window[0] == utterance)  # none if it is too short for a frame
            edges = [0, *((start + half) // step for _, start, _ in own[1:]), count]
            for window, (first, last) in zip(own, pairwise(edges), strict=False):
                offset = window[1] // step
                encoded[utterance, first:last] = frames[window][first - offset : last - offset]
        return encoded, torch.tensor(counts, device=audio.device)
