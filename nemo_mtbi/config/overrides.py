# SPDX-License-Identifier: Apache-2.0
"""Values on the command line: remedies where Hydra can't read one, and text that looks like a number."""

from __future__ import annotations

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException

TEXT, TEXTS = "text", "texts"
_COMMA = re.compile(r""",(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")  # outside of quotes


def read_overrides(given: Iterable[str], multirun: bool = False) -> dict[str, Override]:
    """Return overrides ``key=value`` as Hydra parses them, by their text.

    Args:
        given: overrides of the command line.
        multirun: whether lists of values separated by commas are legal.

    Raises:
        ValueError: if Hydra can't read one; the message says how to quote it.
    """
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    for text in given:
        try:
            parsed[text] = parser.parse_override(text)
        except HydraException as error:
            raise ValueError(_how_to_quote(text, str(error).splitlines()[0])) from error
        if parsed[text].is_sweep_override() and not multirun:
            raise ValueError(_how_to_quote(text, "a comma separates values there"))
    return parsed


def keep_text(overrides: Mapping[str, Override], schema: Any) -> dict[str, str]:
    """Return overrides quoted so that Hydra leaves text as it was typed: ``prompt=1e5`` is not a number.

    Args:
        overrides: as :func:`read_overrides` returns them.
        schema: a dataclass, or a mapping of keys to types.

    Returns:
        The overrides that change, by their text. ``null`` stays what it is: it unsets a key.

    Raises:
        ValueError: if a list or a mapping is given where the schema has a text; the message says how to quote it.
    """
    quoted = {}
    for text, override in overrides.items():
        key, equals, raw = text.partition("=")
        kind = _kind(schema, override.key_or_group) if equals and override.type is not OverrideType.DEL else None
        value = override.value() if kind else None
        if kind == TEXT and isinstance(value, (list, dict)):
            raise ValueError(_how_to_quote(text, "brackets and braces make a list or a mapping there"))
        if kind == TEXT and isinstance(value, (bool, int, float)):
            quoted[text] = f"{key}={_quoted(raw)}"
        elif kind == TEXTS and isinstance(value, (bool, int, float)):
            quoted[text] = f"{key}=[{_quoted(raw)}]"
        elif kind == TEXTS and isinstance(value, list) and any(isinstance(x, (bool, int, float)) for x in value):
            quoted[text] = f"{key}={_quoted_list(raw)}"
    return quoted


def _kind(schema: Any, key: str) -> str | None:
    """Return whether a key takes a text or a list of texts; ``None`` if neither."""
    for part in key.split("."):
        schema = _without_none(schema)
        if isinstance(schema, Mapping):
            schema = schema.get(part)
        elif dataclasses.is_dataclass(schema):
            schema = typing.get_type_hints(schema).get(part)
        elif typing.get_origin(schema) is dict:
            schema = typing.get_args(schema)[1]
        else:
            return None
    kind = _without_none(schema)
    return TEXT if kind is str else TEXTS if kind == list[str] else None


def _without_none(kind: Any) -> Any:
    """Return ``X`` for the type ``X | None``, and any other type as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _how_to_quote(text: str, why: str) -> str:
    key, _, raw = text.partition("=")
    message = f"{text!r} can't be read ({why}): quote the value twice, for Hydra and for the shell: "
    message += shlex.quote(f"{key}={_quoted(raw)}")
    if raw.startswith("[") and raw.endswith("]"):
        message += f", or the items of a list: {shlex.quote(f'{key}={_quoted_list(raw)}')}"
    elif "," in raw:
        message += f"; a list stands in brackets: {shlex.quote(f'{key}={_quoted_list(raw)}')}"
    if key.split(".")[-1] == "prompt":
        message += "; or write it into a file and give prompts_file=FILE"
    return message


def _quoted(raw: str) -> str:
    return QuotedString(raw.strip(), Quote.double).with_quotes()


def _quoted_list(raw: str) -> str:
    inner = raw[1:-1] if raw.startswith("[") and raw.endswith("]") else raw
    items = [item.strip() for item in _COMMA.split(inner)]
    return "[" + ",".join(item if item[:1] in "'\"" and item else _quoted(item) for item in items) + "]"
