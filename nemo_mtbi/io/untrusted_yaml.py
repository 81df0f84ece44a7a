# SPDX-License-Identifier: Apache-2.0
"""Reads YAML from archives of unknown origin: the parsed tree is checked before anyone uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from nemo_mtbi.io.tensor_file import ArchiveError

TEXT_LIMIT = 2**18  # bytes of a configuration; those of ours have a few thousand
_LONGEST = 2**21  # bytes of any YAML
_MAX_DEPTH = 50  # of settings within settings
_LARGEST = 2**63  # no size, count or seed is larger, and longer numbers can't be printed
_TAG = "tag:yaml.org,2002:"
_REFERENCE = "${"  # all that OmegaConf replaces contains it, escaped or not


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one, where libyaml is there


class _Loader(_Base):
    """YAML as OmegaConf reads it: ``1e-5`` is a number, dates are text, no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return mapping


_UNWANTED = (f"{_TAG}timestamp", f"{_TAG}merge", f"{_TAG}value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if tag not in _UNWANTED]
    for first, entries in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*(?:[eE][-+]?\d+)?)$"),
    list("-+0123456789."),
)


def read_yaml(content: bytes, name: str, limit: int = _LONGEST) -> dict[str, Any]:
    """Return the keys and values of a YAML text from an archive: plain values, with nothing to be resolved.

    Args:
        content: the text in UTF-8.
        name: of the file, for messages.
        limit: bytes that it may have.

    Raises:
        ArchiveError: if there is anything else in it: references within the text, which can unfold to gigabytes, a
            ``${...}`` in a value or key, however it is written, which would read this machine's environment, or tags.
    """
    if len(content) > limit:
        raise ArchiveError(f"{name} has {len(content)} bytes, more than it can need")
    try:
        text = content.decode()
        _check_events(text, name)
        if _REFERENCE in text:
            raise ArchiveError(f"{name} refers to values outside of it")
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader)
    except ArchiveError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ArchiveError(f"{name} is not YAML ({error})") from error
    if not isinstance(values, dict):
        raise ArchiveError(f"{name} holds no keys and values")
    check_plain(values, name)
    return values


def _check_events(text: str, name: str) -> None:
    """Refuse what takes a parser of YAML more time and memory than the text is long."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ArchiveError(f"{name} refers to parts of itself")
        depth += isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent))
        depth -= isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent))
        if depth > _MAX_DEPTH:
            raise ArchiveError(f"{name} is nested too deep")


def check_plain(values: dict[Any, Any], name: str) -> None:
    """Refuse a tree that holds more than text, numbers, truth values, lists, and mappings with plain keys.

    Raises:
        ArchiveError: names the place.
    """
    for place, value in walk(values):
        if isinstance(value, str):
            if _REFERENCE in value:
                raise ArchiveError(f"{name} refers to values outside of it, at {place[:100]!r}")
        elif isinstance(value, int):
            if abs(value) >= _LARGEST:
                raise ArchiveError(f"{name} has a number of {value.bit_length()} bits at {place[:100]!r}")
        elif not isinstance(value, (float, dict, list, type(None))):
            raise ArchiveError(f"{name} holds a {type(value).__name__} at {place[:100]!r}, which is not a plain value")


def walk(values: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a tree with its place, keys among them."""
    if isinstance(values, dict):
        for key, value in values.items():
            inner = f"{place}.{_short(key)}".lstrip(".")
            yield inner, key
            yield inner, value
            yield from walk(value, inner)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield f"{place}[{number}]", value
            yield from walk(value, f"{place}[{number}]")


def _short(key: Any) -> str:
    """Return a key for a message; a number may be too long to be printed."""
    return shown(key, 100) if isinstance(key, str) else type(key).__name__


def shown(value: Any, longest: int = 200) -> str:
    """Return an untrusted text for a message: of bounded length, and without what a terminal would obey."""
    text = str(value)[:longest]
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def entries(values: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the place, the key and the value of all entries of a tree."""
    if isinstance(values, dict):
        for key, value in values.items():
            inner = f"{place}.{key}".lstrip(".")
            yield inner, key, value
            yield from entries(value, inner)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from entries(value, f"{place}[{number}]")
