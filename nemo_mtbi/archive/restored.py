# SPDX-License-Identifier: Apache-2.0
"""The ``.nemo`` that a model in the making comes from, and messages about one that can't be restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig

from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.io.nemo_tar import NemoFile
from nemo_mtbi.parallel.agreement import agreed

Value = TypeVar("Value")


@dataclass(frozen=True)
class Restored:
    """A ``.nemo`` that is being restored.

    Attributes:
        file: open.
        stored: its configuration, before it was overridden.
        strict: whether all of its weights must be those of the model.
    """

    file: NemoFile
    stored: DictConfig
    strict: bool = True


_current: ContextVar[Restored | None] = ContextVar("restored", default=None)


@contextmanager
def restoring(restored: Restored) -> Iterator[None]:
    """Models that are built in the body come from an archive."""
    token = _current.set(restored)
    try:
        yield
    finally:
        _current.reset(token)


def refusal(path: Path, error: Exception) -> str:
    """Return the message about an archive that is not as it must be."""
    if isinstance(error, DamageError):
        return f"{path} is damaged and was not loaded: {error}. Copy it again from where it was saved, or save it anew"
    return f"{path} can't be restored: it is no .nemo of an MTBI model ({error})"


def read_checked(work: Callable[[], Value], path: Path) -> Value:
    """Read from an archive in all processes of a replica, each of which compares what it reads itself.

    Args:
        work: reads, and communicates with nobody.
        path: of the archive.

    Raises:
        ValueError: in all of them, if one has found damage; names the archive.
    """

    def named() -> Value:
        try:
            return work()
        except DamageError as error:
            raise ValueError(refusal(path, error)) from error

    return agreed(named)


def current() -> Restored | None:
    """Return the archive that the model in the making comes from; ``None``: it is a new one."""
    return _current.get()
