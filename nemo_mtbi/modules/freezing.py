# SPDX-License-Identifier: Apache-2.0
"""``freeze`` of a pretrained part: ``true``, ``false``, or patterns of the names that stay frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from nemo.utils import logging


def check_freeze(freeze: Any, key: str) -> None:
    """Checks the value of a key.

    Args:
        freeze: ``True``: nothing trains; ``False``: everything does; or a list of regular expressions.
        key: of the section, for the message.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(freeze, bool):
        return
    reason = None if isinstance(freeze, (list, tuple)) else "it is no list"
    try:
        for pattern in () if reason else freeze:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        reason = str(error)
    if reason:
        raise ValueError(f"{key}.freeze is {freeze!r}; it must be true, false or a list of patterns ({reason})")
    if not freeze:
        raise ValueError(f"{key}.freeze is an empty list: set it to false to train all of its weights")


def unfrozen(names: Iterable[str], freeze: Any, key: str, warn: bool = True) -> set[str]:
    """Names of the weights that train.

    Args:
        names: of all weights.
        freeze: as :func:`check_freeze` takes it; a pattern is searched for in each name.
        key: of the section, for warnings.
        warn: whether there are any.
    """
    names = set(names)
    if isinstance(freeze, bool):
        return set() if freeze else names
    frozen: set[str] = set()
    for pattern in freeze:
        found = {name for name in names if re.search(pattern, name)}
        if warn and not found:
            logging.warning(f"{key}.freeze: {pattern!r} matches none of its weights")
        frozen |= found
    if warn and frozen == names:
        logging.warning(f"{key}.freeze: all of its weights match, so it does not train")
    return names - frozen
