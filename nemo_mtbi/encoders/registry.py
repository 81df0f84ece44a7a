# SPDX-License-Identifier: Apache-2.0
"""The kinds of speech encoders: which class reads the file or directory that the configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from nemo_mtbi.encoders.base import SpeechEncoder
from nemo_mtbi.encoders.hf import HFSpeechEncoder
from nemo_mtbi.encoders.nemo import NemoEncoder

NEMO = "nemo"
ENCODERS: dict[str, type[SpeechEncoder]] = {
    NEMO: NemoEncoder,
    "hf": HFSpeechEncoder,  # type: ignore[type-abstract]  # its load() and empty() pick the concrete class
}
Kind = TypeVar("Kind", bound=type[SpeechEncoder])


def register_encoder(name: str, kind: Kind) -> Kind:
    """Make a kind of encoder available to ``model.pretrained_asr`` and ``model.encoder.beside.path``.

    Args:
        name: of the kind; a full ``.nemo`` stores it.
        kind: its class, which is tried before those that were registered earlier.

    Returns:
        ``kind``.

    Raises:
        ValueError: if the name is taken.
    """
    if name in ENCODERS:
        raise ValueError(f"the encoder kind {name!r} is registered already: choose another name")
    ENCODERS[name] = kind
    return kind


def kind_of(path: Path) -> type[SpeechEncoder]:
    """Return the class that reads a file or directory: NeMo's where none recognizes it, which says what is wrong."""
    return next((kind for kind in reversed(ENCODERS.values()) if kind.recognizes(path)), NemoEncoder)


def name_of(kind: type[SpeechEncoder]) -> str:
    """Return the name under which an encoder's class, or a base of it, was registered last."""
    return next(name for name, known in reversed(ENCODERS.items()) if issubclass(kind, known))
