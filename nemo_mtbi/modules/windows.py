# SPDX-License-Identifier: Apache-2.0
"""Long audio in windows that overlap, encoded one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from nemo_mtbi.data.frames import FrameCounter
from nemo_mtbi.modules.freezing import check_freeze

WINDOW = 30.0  # seconds
AT_ONCE = 300  # seconds of windows that are encoded at once: what a convolution gives of an hour fills 25 GB
Window = tuple[int, int, int]  # utterance, first sample, the one behind the last


@dataclass
class EncoderConfig:
    """How an encoder is used.

    Attributes:
        freeze: ``true``: none of its weights train; ``false``: all do; or patterns (Python's ``re``) of the names that
            stay frozen, while the others train. They are kept in float32 then, like the connector.
        layers: of a Hugging Face encoder, hidden states that are given side by side, by the number of the layer (0:
            what enters the first one; negative numbers count from the end); empty: the output of the last one.
        pad: whether Whisper hears silence up to its 30 s, as in its own training. Without, short utterances cost less.
        window_seconds: longer audio is cut into windows; for Whisper at most 30. ``null``: 30 for encoders of Hugging
            Face, none for those of NeMo, which hear every utterance as a whole.
        overlap_seconds: of neighboring windows. Each gives the frames up to the middle of the overlap.
    """

    freeze: Any = True
    layers: list[int] = field(default_factory=list)
    pad: bool = True
    window_seconds: float | None = None
    overlap_seconds: float = 2.0

    def __post_init__(self):
        check_freeze(self.freeze, self.key)
        if not 0 <= self.overlap_seconds < self.window / 2:
            raise ValueError(
                f"{self.key}.overlap_seconds is {self.overlap_seconds}; it must be at least 0 and below half of "
                f"window_seconds, {self.window / 2:g}"
            )

    @property
    def key(self) -> str:
        """Where it stands in the configuration."""
        return "model.encoder"

    @property
    def window(self) -> float:
        """Seconds of a window, where there are any."""
        return WINDOW if self.window_seconds is None else self.window_seconds


@dataclass
class SecondEncoder(EncoderConfig):
    """An encoder whose frames stand beside those of the first one.

    Attributes:
        path: NeMo ASR ``.nemo``, or directory of a Hugging Face encoder.
    """

    path: str = MISSING

    @property
    def key(self) -> str:
        return "model.encoder.beside"


@dataclass
class EncoderSection(EncoderConfig):
    """What stands under ``model.encoder``.

    Attributes:
        beside: a second encoder; ``null``: there is none.
    """

    beside: SecondEncoder | None = None


class Windows:
    """Cuts audio into windows, and joins their frames in the middle of what they share.

    An utterance is encoded as if it were alone: only windows that are heard at equal length share a batch, since not
    every encoder is indifferent to padding.

    Args:
        counter: of the encoder's frames.
        config: their length and overlap.
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
                f"{config.key}.overlap_seconds is {config.overlap_seconds}; windows of this encoder must overlap by "
                f"{2 * missing * step / rate:g} s or more"
            )

    def hold(self, samples: int) -> bool:
        """Whether an utterance fits into one of them."""
        return samples <= self._window

    def of(self, samples: int) -> list[tuple[int, int]]:
        """Where the windows of an utterance begin and end."""
        hop = self._window - self._overlap
        starts = range(0, max(samples - self._overlap, 1), hop)
        return [(start, min(start + self._window, samples)) for start in starts if self._counter(samples - start)]

    def encode(
        self,
        audio: Tensor,
        lengths: Tensor,
        encode: Callable[[Sequence[Tensor]], Tensor],
        heard: Callable[[int], int] = lambda samples: samples,
    ) -> tuple[Tensor, Tensor]:
        """Encodes utterances of any length.

        Args:
            audio: ``[U, N]``.
            lengths: ``[U]`` valid samples.
            encode: frames ``[W, E, D]`` of windows that are heard at equal length; ``E`` may exceed their count.
            heard: samples that the encoder hears of a window: more than it has where it is padded.

        Returns:
            ``[U, E, D]`` frames and their ``[U]`` valid lengths.

        Raises:
            RuntimeError: if the encoder gives fewer frames than are counted.
        """
        windows = [(u, *window) for u, size in enumerate(lengths.tolist()) for window in self.of(size)]
        found: dict[Window, Tensor] = {}
        for batch in self._batches(windows, heard):
            for window, own in zip(batch, encode([audio[u, a:b].float() for u, a, b in batch]), strict=True):
                count = self._counter(window[2] - window[1])
                if len(own) < count:
                    raise RuntimeError(
                        f"the encoder gives {len(own)} frames for {window[2] - window[1]} samples, but its "
                        f"configuration says {count}: this kind of encoder is not supported"
                    )
                found[window] = own[:count]
        return self._join(found, audio, lengths)

    def _batches(self, windows: Sequence[Window], heard: Callable[[int], int]) -> Iterator[list[Window]]:
        """As many as memory allows."""
        for size in sorted({heard(stop - start) for _, start, stop in windows}):
            chosen = [window for window in windows if heard(window[2] - window[1]) == size]
            most = max(AT_ONCE * self._counter.sample_rate // size, 1)
            yield from (chosen[first : first + most] for first in range(0, len(chosen), most))

    def _join(self, found: dict[Window, Tensor], audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        counts = [self._counter(size) for size in lengths.tolist()]
        dtype = next((frames.dtype for frames in found.values()), torch.float32)
        shape = len(counts), self._counter(audio.shape[1]), self._size
        encoded = torch.zeros(shape, dtype=dtype, device=audio.device)
        step, half = self._counter.samples_per_frame, self._overlap // 2
        for utterance, count in enumerate(counts):
            own = sorted(window for window in found if window[0] == utterance)  # none if it is too short for a frame
            edges = [0, *((start + half) // step for _, start, _ in own[1:]), count]
            for window, (first, last) in zip(own, pairwise(edges), strict=False):
                offset = window[1] // step
                encoded[utterance, first:last] = found[window][first - offset : last - offset]
        return encoded, torch.tensor(counts, device=audio.device)
