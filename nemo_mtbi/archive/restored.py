# SPDX-License-Identifier: Apache-2.0
"""A ``.nemo`` that is open while a model is restored from it, and messages about one that can't be restored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig

from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.io.nemo_tar import NemoFile
from nemo_mtbi.parallel.agreement import agreed

Value = TypeVar("Value")


@dataclass(frozen=True)
class OpenArchive:
    """A ``.nemo`` that a model is restored from.

    Attributes:
        file: open for reading.
        stored: its configuration, before it was overridden.
        strict: whether all of its weights must be those of the model.
    """

    file: NemoFile
    stored: DictConfig
    strict: bool = True

    @property
    def path(self) -> Path:
        """The file, or the directory it was unpacked to."""
        return self.file.path


def restore_error(path: Path, error: Exception) -> str:
    """Return the message about an archive that can't be restored.

    Args:
        path: of the archive.
        error: a :class:`DamageError`, or why the file is not an MTBI ``.nemo``.
    """
    if isinstance(error, DamageError):
        return f"{path} is damaged and was not loaded: {error}. Copy it again from where it was saved, or save it anew"
    return f"{path} can't be restored: it is not a .nemo of an MTBI model ({error})"


def read_checked(work: Callable[[], Value], path: Path) -> Value:
    """Read from an archive in all processes of a replica, each of which compares what it reads itself.

    Args:
        work: reads, and communicates with nobody.
        path: of the archive.

    Raises:
        ValueError: in all of them, if one has read damaged data; names the archive.
    """

    def named() -> Value:
        try:
            return work()
        except DamageError as error:
            raise ValueError(restore_error(path, error)) from error

    return agreed(named)
