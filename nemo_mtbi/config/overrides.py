# SPDX-License-Identifier: Apache-2.0
"""Values on the command line: how to quote what Hydra can't read, and text that looks like a number."""

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
    """Parse ``key=value`` as Hydra does.

    Args:
        given: of the command line.
        multirun: whether lists of values separated by commas are legal.

    Raises:
        ValueError: if Hydra can't read one; says how to quote it.
    """
    parser, found = OverridesParser.create(), {}
    for text in given:
        try:
            found[text] = parser.parse_override(text)
        except HydraException as error:
            raise ValueError(_how_to_quote(text, str(error).splitlines()[0])) from error
        if found[text].is_sweep_override() and not multirun:
            raise ValueError(_how_to_quote(text, "a comma separates values there"))
    return found


def keep_text(overrides: Mapping[str, Override], schema: Any) -> dict[str, str]:
    """Return overrides as they must be given for Hydra to leave text as it was typed: ``prompt=1e5`` is no number.

    Args:
        overrides: what :func:`read_overrides` has read.
        schema: a dataclass, or a mapping of keys to types.

    Returns:
        Only what changes. ``null`` stays what it is: it unsets a key.

    Raises:
        ValueError: if a list or a mapping is given where the schema has a text; says how to quote it.
    """
    found = {}
    for text, override in overrides.items():
        key, equals, raw = text.partition("=")
        kind = _kind(schema, override.key_or_group) if equals and override.type is not OverrideType.DEL else None
        value = override.value() if kind else None
        if kind == TEXT and isinstance(value, (list, dict)):
            raise ValueError(_how_to_quote(text, "brackets and braces make a list or a mapping there"))
        if kind == TEXT and isinstance(value, (bool, int, float)):
            found[text] = f"{key}={_quoted(raw)}"
        elif kind == TEXTS and isinstance(value, (bool, int, float)):
            found[text] = f"{key}=[{_quoted(raw)}]"
        elif kind == TEXTS and isinstance(value, list) and any(isinstance(x, (bool, int, float)) for x in value):
            found[text] = f"{key}={_quoted_list(raw)}"
    return found


def _kind(schema: Any, key: str) -> str | None:
    """Whether a key takes a text or a list of texts."""
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
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _how_to_quote(text: str, why: str) -> str:
    key, _, raw = text.partition("=")
    said = f"{text!r} can't be read ({why}): quote the value twice, for Hydra and for the shell: "
    said += shlex.quote(f"{key}={_quoted(raw)}")
    if raw.startswith("[") and raw.endswith("]"):
        said += f", or the items of a list: {shlex.quote(f'{key}={_quoted_list(raw)}')}"
    elif "," in raw:
        said += f"; a list stands in brackets: {shlex.quote(f'{key}={_quoted_list(raw)}')}"
    if key.split(".")[-1] == "prompt":
        said += "; or write it into a file and give prompts_file=FILE"
    return said


def _quoted(raw: str) -> str:
    return QuotedString(raw.strip(), Quote.double).with_quotes()


def _quoted_list(raw: str) -> str:
    inner = raw[1:-1] if raw.startswith("[") and raw.endswith("]") else raw
    items = [item.strip() for item in _COMMA.split(inner)]
    return "[" + ",".join(item if item[:1] in "'\"" and item else _quoted(item) for item in items) + "]"
