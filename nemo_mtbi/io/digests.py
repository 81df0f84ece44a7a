# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of files in blocks: computed in the pass that writes them, checked in the pass that reads them.

Blocks, and not whole files, since a tensor-parallel process reads a share of a file that may have 140 GB: it checks
what it reads, and the block at each end of it, and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any, BinaryIO, Protocol, cast


class DamageError(ValueError):
    """Content that is not what was written. The message is one clause that names the file."""


class _Reader(Protocol):
    """Methods of a binary file that are used here; the hints of ``BinaryIO`` lack ``readinto``."""

    def seek(self, offset: int, /) -> int:
        """Go to a position."""
        ...

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the beginning of a buffer; return the number of bytes, 0 at the end."""
        ...


def sha256(content: bytes | memoryview) -> str:
    """Return the SHA-256 of a content, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


class HashingWriter:
    """Writer that hashes what it writes to a file.

    Args:
        file: open for writing; written from where it stands.
        block: bytes that have a digest of their own.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, file: BinaryIO, block: int):
        self._file, self._block = file, block
        self._finished: list[str] = []
        self._current = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Write a bytes-like object, whole; returns its length."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        first = 0
        while first < len(view):
            piece = view[first : first + self._block - self.size % self._block]
            self._current.update(piece)
            self.size += len(piece)
            first += len(piece)
            if self.size % self._block == 0:
                self._finished.append(self._current.hexdigest())
                self._current = hashlib.sha256()
        return len(view)

    def digests(self) -> list[str]:
        """Return the SHA-256 of each block; the last one may be shorter."""
        return [*self._finished, *([self._current.hexdigest()] if self.size % self._block else [])]

    # What else writers of torch and pickle call.

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def fileno(self) -> int:
        """Return the file's descriptor, for what was written to be synchronized with the device."""
        self._file.flush()  # torch synchronizes without it
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CheckedFile(io.RawIOBase):
    """A part of an open file, none of whose bytes is given out before its block was compared with its digest.

    Args:
        file: open for reading as long as this is used; closed with it only by who opened it.
        name: for messages.
        start: where the part begins in ``file``, in bytes.
        size: its length in bytes.
        digests: SHA-256 of each block; ``None``: nothing is compared.
        block: bytes of a block.

    Raises:
        DamageError: if there are not as many digests as blocks.
    """

    def __init__(self, file: BinaryIO, name: str, start: int, size: int, digests: Sequence[str] | None, block: int):
        super().__init__()
        self._file = cast(_Reader, file)  # files that are open for reading bytes have it
        self._name, self._start, self._size = name, start, size
        self._digests, self._block = digests, block
        self._position = 0
        self._kept: tuple[int, bytes] = (-1, b"")  # number and content of a block of which only a part was wanted
        if digests is not None and len(digests) != -(-size // block):
            raise DamageError(f"{name} has {size} bytes, and digests of {len(digests)} blocks of {block}")

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that the position can be changed."""
        return True

    def tell(self) -> int:
        """Return the position in the part, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in the part, as any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes.

        Raises:
            DamageError: if a block is not what its digest says, or the file ends early.
        """
        view = memoryview(buffer).cast("B")
        view = view[: max(min(len(view), self._size - self._position), 0)]
        done = 0
        while done < len(view):
            count = self._read_some(view[done:])
            done += count
            self._position += count
        return done

    def _read_some(self, view: memoryview) -> int:
        """Fill the beginning of ``view`` from the position on, up to the end of a block."""
        digests = self._digests
        if digests is None:
            self._read_exactly(self._position, view)
            return len(view)
        number, within = divmod(self._position, self._block)
        first = number * self._block
        length = min(self._block, self._size - first)
        if not within and len(view) >= length:  # into its place, without a copy
            self._check(number, digests[number], self._read_exactly(first, view[:length]))
            return length
        if self._kept[0] != number:
            content = bytearray(length)
            self._check(number, digests[number], self._read_exactly(first, memoryview(content)))
            self._kept = number, bytes(content)
        count = min(len(view), length - within)
        view[:count] = self._kept[1][within : within + count]
        return count

    def _read_exactly(self, first: int, view: memoryview) -> memoryview:
        self._file.seek(self._start + first)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise DamageError(f"{self._name} ends at byte {first + done} of {self._size}")
            done += count
        return view

    def _check(self, number: int, digest: str, content: memoryview) -> None:
        """Compare a block with its digest."""
        if sha256(content) != digest.lower():
            first = number * self._block
            raise DamageError(
                f"{self._name} is not as it was written: the SHA-256 of its bytes {first} to {first + len(content)} "
                "is another"
            )


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value, with sorted keys and no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, as hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
