# SPDX-License-Identifier: Apache-2.0
"""The section ``model.encoder``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_mtbi.config.freezing import check_freeze

WINDOW = 30.0  # seconds


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
