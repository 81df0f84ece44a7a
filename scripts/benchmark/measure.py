# SPDX-License-Identifier: Apache-2.0
"""CPU time of systems that take turns on the same work, and peak memory of a step."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Work = TypeVar("Work")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Times:
    """CPU seconds of each system, one value a round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Return the median of a system, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> dict[str, float]:
        """Return the ratio of medians of two systems, with the smallest and largest ratio of a single round."""
        rounds = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return {"ratio": self.median(name) / self.median(base), "low": min(rounds), "high": max(rounds)}


def take_turns(systems: Mapping[str, Callable[[Work], Callable[[], Any]]], works: Sequence[Work], title: str) -> Times:
    """Run every system on every work; another one begins in each round, and the first round warms up.

    Args:
        systems: by name what prepares a work, whose result is timed.
        works: one for each round, the first for warming up.
        title: for the lines that show what is done.
    """
    names = list(systems)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number, work in enumerate(works):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            run = systems[name](work)
            begun = time.process_time()
            run()
            spent = time.process_time() - begun
            if number:
                seconds[name].append(spent)
        if number:
            shown = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
            print(f"{title} {number}/{len(works) - 1}: {shown}", file=sys.stderr, flush=True)
    return Times(seconds)


def peak_above_rest(run: Callable[[], Any]) -> float:
    """Return how far the resident memory of this process rises in ``run`` above what it had before, in GiB (Linux).

    Raises:
        RuntimeError: where the system does not let a process reset its peak.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError(f"peak memory can't be measured here ({error}): run it on Linux, as the owner") from error
    rest = _resident("VmRSS")
    run()
    return _resident("VmHWM") - rest


def _resident(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20
