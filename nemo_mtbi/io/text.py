# SPDX-License-Identifier: Apache-2.0
"""Reads text files as editors write them: with a byte order mark, with CRLF, with every character of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"  # how a compressed file begins
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path, key: str = "") -> str:
    r"""Return the content of a UTF-8 file, without its byte order mark and with ``\n`` at the end of each line.

    Args:
        path: of the file.
        key: configuration key or command-line option that named it, for messages.

    Raises:
        ValueError: if it is a folder, compressed, not UTF-8 or can't be read; names the file and the remedy.
    """
    named = f"{key}={path}" if key else str(path)
    try:
        content = Path(path).read_bytes()
    except IsADirectoryError:
        raise ValueError(f"{named} is a folder: name a file") from None
    except (OSError, ValueError) as error:  # a name may hold a null character
        raise ValueError(f"{named} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if content.startswith(GZIP):
        raise ValueError(f"{named} is compressed: unpack it with gunzip, and name what comes out")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} {why_not_utf8(error)}") from error


def why_not_utf8(error: UnicodeDecodeError) -> str:
    """Return the rest of a message that begins with the name of a file: what it is instead, and the remedy."""
    if error.object.startswith(_UTF_16):
        return "is UTF-16: convert it with iconv -f utf-16 -t utf-8"
    byte = error.object[error.start]
    return f"is not UTF-8 (byte {error.start} is 0x{byte:02x}): convert it, for example with iconv -f latin1 -t utf-8"


def read_lines(path: str | Path, key: str = "") -> list[str]:
    """Return the lines of a UTF-8 file without their ends. Only a line feed ends a line.

    ``str.splitlines`` would also cut at U+0085, U+2028 and U+2029, which JSON allows inside a string.

    Raises:
        ValueError: as :func:`read_text`.
    """
    lines = read_text(path, key).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json_lines(path: str | Path, key: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the object of each line of a JSONL file that is not blank.

    Raises:
        ValueError: as :func:`read_text`, or if a line is not a JSON object; names the line.
    """
    for number, line in enumerate(read_lines(path, key), start=1):
        if line.strip():
            yield number, parse_json_object(line, f"line {number} of {path}")


def parse_json_object(text: str, place: str) -> dict[str, Any]:
    """Return the JSON object in a text.

    Raises:
        ValueError: if it is not one; begins with ``place``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): write one JSON object a line") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not a JSON object: write one a line, in braces")
    return value


def read_json_object(path: str | Path, key: str = "", limit: int = 2**24) -> dict[str, Any]:
    """Return the JSON object in a file that others have written.

    Args:
        path: of the file.
        key: configuration key that named it, for messages.
        limit: bytes that it may have.

    Raises:
        ValueError: as :func:`read_text`, or if it is larger, or not a JSON object.
    """
    named = f"{key}={path}" if key else str(path)
    try:
        size = Path(path).stat().st_size
    except (OSError, ValueError) as error:
        raise ValueError(f"{named} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if size > limit:
        raise ValueError(f"{named} can't be read: it has {size} bytes, more than it can need")
    try:
        value = json.loads(read_text(path, key))
    except RecursionError:
        raise ValueError(f"{named} can't be read: it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{named} can't be read: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{named} can't be read: it is not a JSON object")
    return value


def is_writable_text(text: str) -> bool:
    """Return whether a text can be written as UTF-8: half a surrogate pair, or a name that is not UTF-8, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def in_one_line(error: Exception) -> str:
    """Return Lhotse's message about a file that it cannot load, without hints to developers and dump of the cut."""
    lines = str(error).split("\n[extra info]")[0].splitlines()
    return " ".join(line.strip() for line in lines if not line.startswith("Set LHOTSE_"))
