# SPDX-License-Identifier: Apache-2.0
"""The key ``freeze`` of a pretrained part: ``true``, ``false``, or patterns of the names that stay frozen."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

import regex
from nemo.utils import logging

_SECONDS = 1.0  # for the patterns of a key and all names, together; sensible ones take milliseconds
_LONGEST = 1000  # characters of a pattern


def check_pattern(pattern: Any) -> None:
    """Check that a value is a regular expression of at most 1000 characters.

    Raises:
        ValueError: if it is not; the message is the reason alone.
    """
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (TypeError, re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern)} characters")


def matching(patterns: Iterable[str], names: Iterable[str], key: str) -> dict[str, set[str]]:
    """Return for each pattern the names in which it matches.

    A pattern may come from a model file of others, and can be made to take years: the search has a limit of time.

    Args:
        patterns: regular expressions.
        names: of weights or modules.
        key: of the configuration, for the message.

    Raises:
        ValueError: if the search takes too long; names the pattern.
    """
    names, end = list(names), time.monotonic() + _SECONDS
    matches: dict[str, set[str]] = {}
    for pattern in patterns:
        compiled = regex.compile(pattern)
        try:
            matches[pattern] = {
                name for name in names if compiled.search(name, timeout=max(end - time.monotonic(), 1e-3))
            }
        except TimeoutError:
            raise ValueError(
                f"{key} has {pattern!r}, which takes too long to be searched for: make it simpler, without a "
                "repetition within a repetition"
            ) from None
    return matches


def check_freeze(freeze: Any, key: str) -> None:
    """Check the value of a key ``freeze``.

    Args:
        freeze: ``True``: nothing trains; ``False``: everything does; or a list of regular expressions.
        key: of the section, for the message.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(freeze, bool):
        return
    reason = None if isinstance(freeze, (list, tuple)) else "it is not a list"
    try:
        for pattern in () if reason else freeze:
            check_pattern(pattern)
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(f"{key}.freeze is {freeze!r}; it must be true, false or a list of patterns ({reason})")
    if not freeze:
        raise ValueError(f"{key}.freeze is an empty list: set it to false to train all of its weights")


def unfrozen(names: Iterable[str], freeze: Any, key: str, warn: bool = True) -> set[str]:
    """Return the names of the weights that train.

    Args:
        names: of all weights.
        freeze: as :func:`check_freeze` takes it; a pattern is searched for in each name.
        key: of the section, for warnings.
        warn: whether patterns that match nothing, or all, give a warning.
    """
    names = set(names)
    if isinstance(freeze, bool):
        return set() if freeze else names
    frozen: set[str] = set()
    for pattern, matches in matching(freeze, names, f"{key}.freeze").items():
        if warn and not matches:
            logging.warning(f"{key}.freeze: {pattern!r} matches none of its weights")
        frozen |= matches
    if warn and frozen == names:
        logging.warning(f"{key}.freeze: all of its weights match, so it does not train")
    return names - frozen
