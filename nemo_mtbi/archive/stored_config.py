# SPDX-License-Identifier: Apache-2.0
"""The configuration in an MTBI ``.nemo``, which may be anyone's: what of it is used, and what is refused."""

from __future__ import annotations

import re
from typing import Any

from nemo_mtbi.config.model import RUN_KEYS
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.io.untrusted_yaml import entries, shown

DATA_KEYS = ("train_ds", "validation_ds", "test_ds")  # paths of the machine that trained
# Where NeMo's optimizers and schedules are named by class, and which classes those may be.
_TARGETS = ("optim._target_", "optim.sched._target_")
_OPTIMIZERS = re.compile(r"(torch\.optim(\.lr_scheduler)?|nemo\.core\.optim(\.[a-z_]+)?)\.[A-Z][A-Za-z0-9]*")
# Largest numbers of what takes memory or time without a weight to compare it with.
_LARGEST = {"generation.max_new_tokens": 2**16, "generation.batch_tokens": 2**24, "micro_batch_tokens": 2**24}


def check_stored(conf: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of an archive without what belongs to a run and to a machine.

    Data, layout and folders are those of whoever restores a model: what an archive says of them is not used.

    Args:
        conf: plain values, see :func:`nemo_mtbi.io.untrusted_yaml.read_yaml`.

    Raises:
        ArchiveError: if it names code, or sizes that would fill the memory.
    """
    kept = {key: value for key, value in conf.items() if key not in (*DATA_KEYS, *RUN_KEYS)}
    for place, key, value in entries(kept):
        if not isinstance(key, str):
            raise ArchiveError(f"its configuration has the key {shown(key)!r} at {shown(place)}")
        if place in _TARGETS:
            if not isinstance(value, str) or not _OPTIMIZERS.fullmatch(value):
                raise ArchiveError(f"its {place} is {shown(value)}, which is not an optimizer or schedule")
        elif key.startswith("_") or (key in ("target", "cls") and place != key):
            raise ArchiveError(f"its configuration has {shown(place)}, which could call other code")
        most = _LARGEST.get(place)
        if most is not None and isinstance(value, (int, float)) and not value <= most:
            raise ArchiveError(f"its {place} is {value}, more than {most}")
    return kept
