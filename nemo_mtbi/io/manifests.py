# SPDX-License-Identifier: Apache-2.0
"""Manifests as people have them: what Lhotse's and NeMo's readers open, and cuts with messages that name the file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.lazy import LazyManifestIterator
from lhotse.serialization import IOBackend, get_current_io_backend, get_default_io_backend, set_current_io_backend
from lhotse.utils import is_valid_url
from lhotse.workarounds import gzip_open_robust

from nemo_mtbi.io.text import GZIP, parse_json_object, why_not_utf8

_MAKE = "make cuts of NeMo manifests with scripts/prepare/corpus.py manifest"


class UnreadableTextError(ValueError):
    """A text file that can't be read; the message names it, the line and the remedy."""


class TextOpener(IOBackend):
    """Opens local text files for Lhotse; everything else is left to another backend.

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

    def __next__(self) -> str:
        line = self._checked(super().__next__)
        while self._json is not False and not line.strip():
            line = self._checked(super().__next__)
        if self._json is None:
            self._json = line.lstrip().startswith("{")
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
    """The message about a file that is not UTF-8; the decoder, which reads ahead, does not know the line."""
    with open(path, "rb") as raw:
        packed = raw.peek(2).startswith(GZIP)
        for number, line in enumerate(gzip_open_robust(raw, "rb") if packed else raw, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                return f"line {number} of {path} {why_not_utf8(found)}"
    return f"{path} {why_not_utf8(error)}"


def register_opener() -> None:
    """Make Lhotse, and with it NeMo, open text files with :class:`TextOpener`; may be called again and again."""
    current = get_current_io_backend()
    if not isinstance(current, TextOpener):
        set_current_io_backend(TextOpener(current))


def check_manifest(path: str | Path, key: str, kind: str) -> None:
    """Refuse what can't be a manifest, by its first line.

    Args:
        path: a local file.
        key: configuration key or option that named it, for messages; may be empty.
        kind: what is wanted: ``cuts`` of Lhotse, entries of a ``nemo`` manifest, or any JSON ``lines``.

    Raises:
        ValueError: a folder, an empty file, the other kind of manifest, or not JSON lines; names the file and the
            remedy.
    """
    named = f"{key}={path}" if key else str(path)
    if Path(path).is_dir():
        raise ValueError(f"{named} is a folder: name the manifest in it")
    if not Path(path).exists():
        raise ValueError(f"{named} does not exist: give a manifest")
    try:
        with TextFile(path) as file:
            line = next(file, None)
    except OSError as error:
        raise ValueError(f"{named} can't be read: {error.strerror or error}") from error
    if line is None:
        raise ValueError(f"{named} holds no {'cuts' if kind == 'cuts' else 'entries'}: it is empty")
    if kind == "cuts" and ".jsonl" not in Path(path).suffixes and "audio_filepath" not in line:
        return  # one JSON or YAML document, which Lhotse reads as a whole
    entry = parse_json_object(line, f"the first line of {named}")
    if kind == "cuts" and "audio_filepath" in entry:
        raise ValueError(f"{named} is a NeMo manifest and holds no cuts: give it as manifest_filepath, or {_MAKE}")
    if kind == "nemo" and "audio_filepath" not in entry:
        cuts = "recording" in entry or "tracks" in entry
        why = "it is a Lhotse cut: give the file as cuts_path" if cuts else "it must have the key audio_filepath"
        raise ValueError(f"the first line of {named} is not an entry of a NeMo manifest: {why}")


class _Checked:
    """The cuts of a JSONL manifest, which name the file where one can't be read."""

    def __init__(self, path: Path, named: str):
        self._source, self._named = LazyManifestIterator(path), named

    def __iter__(self) -> Iterator[Cut]:
        cuts, last = iter(self._source), None
        while True:
            try:
                cut = next(cuts)
            except StopIteration:
                return
            except UnreadableTextError:
                raise
            except Exception as error:  # Lhotse has no kinds of its own for entries that are not what they should be
                where = "its first entry" if last is None else f"the entry after {last}"
                raise ValueError(
                    f"{self._named} can't be read at {where} ({type(error).__name__}: {error}): correct it"
                ) from error
            if not isinstance(cut, Cut):
                raise ValueError(f"{self._named} holds {type(cut).__name__}s, not cuts: {_MAKE}")
            last = cut.id
            yield cut

    def __len__(self) -> int:
        return len(self._source)


def read_cuts(path: str | Path, key: str = "") -> CutSet:
    """Return the cuts of a manifest; those of JSON lines are read lazily, each time anew.

    Args:
        path: of Lhotse's cuts.
        key: configuration key or command-line option that named it, for messages.

    Raises:
        ValueError: if it is a folder, missing, empty, unreadable or holds something else, now or while the cuts are
            read; names the file and the remedy.
    """
    path = Path(path).expanduser()
    named = f"{key}={path}" if key else str(path)
    check_manifest(path, key, "cuts")
    register_opener()
    if ".jsonl" in path.suffixes:
        cuts = CutSet(_Checked(path, named))
    else:
        try:
            cuts = CutSet.from_file(path)
        except Exception as error:  # each form has its own kinds
            raise ValueError(f"{named} can't be read as cuts ({type(error).__name__}: {error}): {_MAKE}") from error
    if next(iter(cuts), None) is None:
        raise ValueError(f"{named} holds no cuts: it is empty")
    return cuts
