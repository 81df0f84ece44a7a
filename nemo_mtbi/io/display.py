# SPDX-License-Identifier: Apache-2.0
"""Text of models and manifests as a terminal may show it."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
# They turn the direction of what follows them, so that a line reads as another one.
_DIRECTION = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    r"""Return a text that moves no cursor, sets no color and sends the terminal no command.

    Control characters (escape, carriage return, backspace, C1, …), changes of direction and halves of surrogate pairs,
    which can't be printed at all, become Python's escapes, such as ``\x1b``. Line feeds and tabs stay. A text without
    any of them is returned as it is.
    """
    if text.isprintable():
        return text
    return "".join(_escape(character) if _is_command(character) else character for character in text)


def _is_command(character: str) -> bool:
    if character in _KEPT:
        return False
    return character in _DIRECTION or unicodedata.category(character) in ("Cc", "Cs")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
