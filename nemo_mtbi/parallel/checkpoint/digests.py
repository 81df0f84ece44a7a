# SPDX-License-Identifier: Apache-2.0
"""Digests of a checkpoint's files: computed while torch writes them, compared while it reads them.

Every saving process hashes what it writes, in the thread that writes it, and every loading process compares the blocks
that it reads: no file is read a second time. SHA-256 takes about 0.6 s for a gigabyte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from nemo_mtbi.io.digests import CheckedFile, HashingWriter, sha256

BLOCK = 2**24  # bytes of a file that have a digest of their own
_OWN_DIGEST = "sha256"  # key of the marker's own digest


@dataclass(frozen=True)
class FileMark:
    """The size and digests that a file must have.

    Attributes:
        size: in bytes.
        sha256: of the content; of a file of several blocks, of each of them; ``None`` for a large file that was saved
            in format 1.
    """

    size: int
    sha256: str | Sequence[str] | None = None

    @property
    def digests(self) -> Sequence[str] | None:
        """SHA-256 of each block; ``None`` where format 1 has only that of a whole file, or none."""
        if isinstance(self.sha256, str):
            return [self.sha256] if self.size <= BLOCK else None
        return self.sha256

    def fits(self, path: Path) -> bool:
        """Return whether a file is as it was saved; reads it."""
        if self.sha256 is None:
            return True
        if self.digests is None:
            return self.sha256 == sha256(path.read_bytes())
        return list(self.digests) == list(measure(path).digests or ())


def mark_of(file: HashingWriter) -> FileMark:
    """Return the mark of a file that was written."""
    digests = file.digests()
    return FileMark(file.size, digests[0] if len(digests) == 1 else digests)


def measure(path: Path) -> FileMark:
    """Read a file, and return its mark."""
    with open(path, "rb") as file, open(os.devnull, "wb") as nowhere:
        hashed = HashingWriter(nowhere, BLOCK)
        shutil.copyfileobj(file, hashed, BLOCK)
    return mark_of(hashed)


@contextmanager
def open_checked(folder: Path, name: str, marks: Mapping[str, FileMark]) -> Iterator[CheckedFile]:
    """Open a file of a checkpoint, each block of which is compared with its digest when it is read.

    Args:
        folder: the checkpoint.
        name: of the file.
        marks: of all files.

    Raises:
        DamageError: in the body, where something is read that is not what was saved.
        ValueError: if there is no mark of the file.
    """
    if name not in marks:
        raise ValueError(f"{folder} is not a whole checkpoint: its marker does not name {name}")
    with open(folder / name, "rb") as file:
        yield CheckedFile(file, name, 0, marks[name].size, marks[name].digests, BLOCK)


class HashedFiles(FileSystem):
    """The file that torch's writer of checkpoints writes to.

    Attributes:
        marks: of the files that were written, by name.
    """

    def __init__(self):
        self._written: dict[str, HashingWriter] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """Open a file for writing whose bytes are hashed on their way."""
        if mode != "wb":
            raise ValueError(f"a checkpoint's writer opens {path} with mode {mode!r}")
        with super().create_stream(path, mode) as stream:
            file = self._written[Path(path).name] = HashingWriter(cast(BinaryIO, stream), BLOCK)  # by its mode
            yield file

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file; its mark goes by the new name."""
        super().rename(path, new_path)
        self._written[Path(new_path).name] = self._written.pop(Path(path).name)

    @property
    def marks(self) -> dict[str, FileMark]:
        """Size and digest of each written file, by name."""
        return {name: mark_of(file) for name, file in self._written.items()}


class CheckedFiles(FileSystem):
    """The file that torch's reader of checkpoints reads from.

    Args:
        folder: the checkpoint.
        marks: of its files.
    """

    def __init__(self, folder: Path, marks: Mapping[str, FileMark]):
        self._folder, self._marks = folder, marks

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """Open a file for reading; bytes that differ from its mark are an error."""
        if mode != "rb":
            raise ValueError(f"a checkpoint's reader opens {path} with mode {mode!r}")
        with open_checked(self._folder, Path(path).name, self._marks) as file:
            yield file


# ------------------------------------------------------------------------------------------------------------ marker


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a marker, with its SHA-256."""
    return {**values, _OWN_DIGEST: sha256(json.dumps(values, sort_keys=True).encode())}


def check_signed(content: dict[str, Any]) -> None:
    """Compare a marker with its own digest, which is taken out of ``content``. Format 1 has none.

    Raises:
        ValueError: if it is not what was written, or has no digest of a file.
        KeyError, TypeError, AttributeError: if it is not a marker.
    """
    if content["format"] == 1:
        return
    if type(content["format"]) is not int or content["format"] < 1:
        raise ValueError(f"its format is {content['format']!r}")
    digest = content.pop(_OWN_DIGEST)
    if digest != signed(content)[_OWN_DIGEST]:
        raise ValueError("it is not as it was written: its SHA-256 is another")
    for name, mark in content["files"].items():
        if Path(name).name != name or mark["sha256"] is None:
            raise ValueError(f"it names {name!r} without a digest, or outside of the folder")
