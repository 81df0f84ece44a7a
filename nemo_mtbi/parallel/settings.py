# SPDX-License-Identifier: Apache-2.0
"""Processes of one run must have been started with one configuration."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from nemo_mtbi.parallel import groups

NAMED = 10  # keys in a message
OWN = ("model.encoder_cache",)  # a folder of each machine's own


def check_same(settings: Mapping[str, Any], own: Collection[str] = OWN) -> None:
    """Compare the configuration of all processes; they call this together, before they depend on it.

    Args:
        settings: plain containers.
        own: dotted keys that may differ.

    Raises:
        ValueError: in all processes, if they differ; names the keys and their values.
    """
    flat = {key: value for key, value in flatten(settings).items() if key not in own}
    everyone = groups.gather_objects(flat)
    differing = []
    for key in sorted({key for one in everyone for key in one}):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks.setdefault(one.get(key, "not set"), []).append(rank)
        if len(ranks) > 1:
            differing.append(f"{key} is " + " and ".join(f"{value} in {_named(who)}" for value, who in ranks.items()))
    if differing:
        more = f"; and {len(differing) - NAMED} more keys" if len(differing) > NAMED else ""
        raise ValueError(
            f"the processes of this run have different configurations: {'; '.join(differing[:NAMED])}{more}. Start "
            "all of them with the same command and the same files"
        )


def flatten(settings: Any, prefix: str = "") -> dict[str, str]:
    """Return dotted key -> JSON value of nested mappings; lists are values."""
    if not isinstance(settings, Mapping) or not settings:
        return {prefix: json.dumps(settings, default=str)}
    flat: dict[str, str] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"process {shown}"
