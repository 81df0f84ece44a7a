# SPDX-License-Identifier: Apache-2.0
"""Reads weights that torch has pickled: tensors only, and without calling anything."""

from __future__ import annotations

import pickle
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nemo_mtbi.io.tensor_file import ArchiveError

_MAX_RECORDS = 2**20


def load_pickled(file: BinaryIO, name: str, map_location: Any = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a file that ``torch.save`` has written.

    Args:
        file: open, at its beginning.
        name: for messages.
        map_location: where the tensors go.

    Raises:
        ArchiveError: if it is damaged, packed, or holds anything but named tensors.
    """
    try:
        _check_records(file, name)
        file.seek(0)
        content = torch.load(file, map_location=map_location or "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArchiveError(f"{name} holds more than tensors, and is not read: {_line(error)}") from error
    except ArchiveError:
        raise
    except Exception as error:  # a damaged file raises what torch happens to meet
        raise ArchiveError(f"{name} is damaged: {_line(error)}; copy or save the archive again") from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ArchiveError(f"{name} holds more than named tensors, and is not read")
    return dict(content)


def _check_records(file: BinaryIO, name: str) -> None:
    """Refuse a file whose content is larger than itself: torch packs nothing, and would unpack whatever is there."""
    try:
        with zipfile.ZipFile(file) as records:
            entries = records.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise ArchiveError(
            f"{name} is damaged, or torch before 1.6 has written it: {error}; copy or save the archive again"
        ) from error
    if len(entries) > _MAX_RECORDS or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ArchiveError(f"{name} is packed, as torch packs nothing, and is not read")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
