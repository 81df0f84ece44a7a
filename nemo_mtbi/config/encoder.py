# SPDX-License-Identifier: Apache-2.0
"""The section ``model.encoder``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from omegaconf import MISSING

from nemo_mtbi.config.checks import Section, above, at_least
from nemo_mtbi.config.freezing import check_freeze

WINDOW = 30.0  # seconds


@dataclass
class EncoderConfig(Section):
    """Settings of an encoder.

    Attributes:
        freeze: ``true``: none of its weights train; ``false``: all do; or patterns (Python's ``re``) of the names that
            stay frozen, while the others train. They are kept in float32 then, like the connector.
        layers: of a Hugging Face encoder, hidden states that are given side by side, by the number of the layer (0:
            what enters the first one; negative numbers count from the end); empty: the output of the last one.
        pad: whether Whisper gets silence up to its 30 s, as in its own training. Without, short utterances cost less.
        window_seconds: longer audio is cut into windows; for Whisper at most 30. ``null``: 30 for encoders of Hugging
            Face, none for those of NeMo, which take every utterance as a whole.
        overlap_seconds: of neighboring windows. Each gives the frames up to the middle of the overlap.
    """

    SECTION: ClassVar[str] = "model.encoder"

    freeze: Any = True
    layers: list[int] = field(default_factory=list)
    pad: bool = True
    window_seconds: Annotated[float | None, above(0)] = None
    overlap_seconds: Annotated[float, at_least(0)] = 2.0

    def __post_init__(self):
        super().__post_init__()
        check_freeze(self.freeze, self.SECTION)
        if self.overlap_seconds >= self.window / 2:
            raise ValueError(
                f"{self.SECTION}.overlap_seconds is {self.overlap_seconds}; it must be below half of "
                f"window_seconds, {self.window / 2:g}"
            )

    @property
    def window(self) -> float:
        """Seconds of a window, for an encoder that takes windows."""
        return WINDOW if self.window_seconds is None else self.window_seconds


@dataclass
class SecondEncoder(EncoderConfig):
    """An encoder whose frames stand beside those of the first one.

    Attributes:
        path: NeMo ASR ``.nemo``, or directory of a Hugging Face encoder.
    """

    SECTION: ClassVar[str] = "model.encoder.beside"

    path: str = MISSING


@dataclass
class EncoderSection(EncoderConfig):
    """The section ``model.encoder``: how the encoder is used, and a second one beside it.

    Attributes:
        beside: a second encoder; ``null``: there is none.
    """

    beside: SecondEncoder | None = None
