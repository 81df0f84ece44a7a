# SPDX-License-Identifier: Apache-2.0
"""Functions of Lhotse that are replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_obeys_nemo_mtbi"


def check_before_loading(check: Callable[[Any], None]) -> None:
    """Replace ``AudioSource.load_audio`` by one that first calls ``check`` with the source. Safe to call again.

    Lhotse lets audio be read by other backends, but a source of type ``command`` is run by ``load_audio`` itself,
    without any of them. A setting of Lhotse that forbids such sources would replace this.

    Args:
        check: raises an error for a source that must not be read.
    """
    from lhotse import AudioSource

    load_audio = AudioSource.load_audio
    if getattr(load_audio, _MARK, False):
        return

    @functools.wraps(load_audio)
    def load(source: Any, *args: Any, **kwargs: Any) -> Any:
        check(source)
        return load_audio(source, *args, **kwargs)

    setattr(load, _MARK, True)
    AudioSource.load_audio = load
