# SPDX-License-Identifier: Apache-2.0
"""Progress lines in logs: bars are drawn in terminals alone, and a run of hours would be silent elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress

from nemo_mtbi.io.display import printable

EVERY = 30.0  # seconds between two lines


class Heartbeat:
    """Prints a line at least every :data:`EVERY` seconds while its body runs, where the console is not a terminal.

    Args:
        state: returns how far the work is, as text; called in a thread of its own.
        console: where the line is printed.
        show: whether anything is printed.
        last: whether a line is printed at the end, too.
    """

    def __init__(self, state: Callable[[], str], console: Console, show: bool = True, last: bool = False):
        self._state, self._console, self._last = state, console, last
        self._shown = show and not is_live(console)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if not self._shown:
            return
        self._ended.set()
        self._thread.join()
        if self._last:
            self._print()

    def _beat(self) -> None:
        while not self._ended.wait(EVERY):
            self._print()

    def _print(self) -> None:
        self._console.print(printable(self._state()), highlight=False, markup=False, soft_wrap=True)
        self._console.file.flush()


def is_live(console: Console) -> bool:
    """Return whether bars can be drawn anew in place."""
    return console.is_terminal and not console.is_dumb_terminal


def bar_text(bar: Progress) -> str:
    """Return the tasks of a bar in one line: how many are done, in what time, and the time left."""
    parts = []
    for task in bar.tasks:
        left = "" if task.time_remaining is None else f", {time_text(task.time_remaining)} left"
        total = "" if task.total is None else f"/{task.total:.0f}"
        parts.append(f"{task.description}: {task.completed:.0f}{total} in {time_text(task.elapsed or 0.0)}{left}")
    return " · ".join(parts)


def time_text(seconds: float) -> str:
    """Return ``h:mm:ss``."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
