# SPDX-License-Identifier: Apache-2.0
"""Opens text files for Lhotse's and NeMo's readers, as editors on every system write them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

from lhotse.serialization import IOBackend, get_default_io_backend
from lhotse.utils import is_valid_url
from lhotse.workarounds import gzip_open_robust

from nemo_mtbi.io.text import GZIP, why_not_utf8


class UnreadableTextError(ValueError):
    """A text file that can't be read; the message names it, the line and the remedy."""


class TextOpener(IOBackend):
    """Backend that opens local text files for Lhotse; everything else is left to another backend.

    Lhotse's own opener keeps a byte order mark, which no JSON reader takes, and its readers stop at an empty line.

    Args:
        other: opens pipes, addresses, binary files, and what is written; Lhotse's default where it is left out.
    """

    def __init__(self, other: IOBackend | None = None):
        self.other = get_default_io_backend() if other is None else other

    def open(self, identifier: str | Path, mode: str):
        """Return an open file, as the method of Lhotse that it overrides."""
        name = str(identifier)
        if mode not in ("r", "rt") or name == "-" or name.startswith("pipe:") or is_valid_url(name):
            return self.other.open(identifier, mode)
        return TextFile(identifier)

    def is_applicable(self, identifier: str | Path) -> bool:
        """Return whether one of the two can open it."""
        return True


class TextFile(io.TextIOWrapper):
    """A UTF-8 file, compressed with gzip or not, without its byte order mark; of JSON lines, without empty ones.

    Args:
        path: of the file.

    Raises:
        UnreadableTextError: while it is read, if it is not UTF-8 or is damaged.
        OSError: if it can't be opened.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self._raw = open(path, "rb")  # noqa: SIM115 (closed with this file)
        packed = self._raw.peek(2).startswith(GZIP)
        super().__init__(gzip_open_robust(self._raw, "rb") if packed else self._raw, encoding="utf-8-sig")
        self._json: bool | None = None  # lines of JSON? unknown before the first one
        self.line_number = 0  # of the line given last, from 1, with those that were left out

    def __next__(self) -> str:  # type: ignore[override]  # io.TextIOWrapper, too, overrides bytes by str
        line = self._next_line()
        while self._json is not False and not line.strip():
            line = self._next_line()
        if self._json is None:
            self._json = line.lstrip().startswith("{")
        return line

    def _next_line(self) -> str:
        line = self._checked(super().__next__)
        self.line_number += 1
        return line

    def read(self, size: int | None = -1, /) -> str:
        """Return the next characters, as any text file."""
        return self._checked(super().read, size)

    def close(self) -> None:
        """Close both this file and the compressed one under it."""
        try:
            super().close()
        finally:
            self._raw.close()

    def _checked(self, read, *args) -> str:
        try:
            return read(*args)
        except UnicodeDecodeError as error:
            raise UnreadableTextError(_bad_line(self._path, error)) from error
        except (EOFError, zlib.error, OSError) as error:
            raise UnreadableTextError(
                f"{self._path} can't be read to its end ({error}): give a whole copy of it"
            ) from error


def _bad_line(path: str | Path, error: UnicodeDecodeError) -> str:
    """Return the message about a file that is not UTF-8; the decoder, which reads ahead, does not know the line."""
    with open(path, "rb") as raw:
        packed = raw.peek(2).startswith(GZIP)
        for number, line in enumerate(gzip_open_robust(raw, "rb") if packed else raw, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as of_line:
                return f"line {number} of {path} {why_not_utf8(of_line)}"
    return f"{path} {why_not_utf8(error)}"
