# SPDX-License-Identifier: Apache-2.0
"""Seeds and random generators that depend on their keys alone: the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from nemo_mtbi.io.digests import canonical_json


def stable_seed(*parts: Any) -> int:
    """Return a 64-bit seed made of ints and strings: the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(canonical_json(parts)).digest()[:8], "big")


# Only these have a repr that is the same in every process and with every library version.
_KEY_TYPES = (str, int, float, bool, bytes, type(None))


def stable_rng(*key: Any) -> random.Random:
    """Return a random generator that depends on ``key`` alone: the same in every process and on every machine.

    Args:
        key: strings, numbers, bools, bytes, None, or tuples of these, such as ``(seed, epoch, cut_id)``.

    Raises:
        ValueError: if a part has another type, whose repr might differ between processes.
    """
    _check_key(key)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _check_key(key: tuple) -> None:
    for part in key:
        if type(part) is tuple:
            _check_key(part)
        elif type(part) not in _KEY_TYPES:
            raise ValueError(
                f"a key part of type {type(part).__name__} ({part!r}) has no stable text form; make it a str or int"
            )
