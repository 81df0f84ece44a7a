# SPDX-License-Identifier: Apache-2.0
"""Progress of target generation: a bar in a terminal, else lines in a log, also while one batch takes long."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nemo_mtbi.io.heartbeat import Heartbeat, is_live, time_text


class TargetsMeter:
    """Progress of this process in cuts, with rows per second and the time left, from new work alone.

    A context manager.

    Args:
        total: cuts to make targets for.
        show: whether anything is shown.
        console: where; ``None``: standard output.
    """

    def __init__(self, total: int, show: bool, console: Console | None = None):
        console = console or Console()
        self._total = total
        self._done, self._cuts, self._rows, self._seconds = 0.0, 0.0, 0, 0.0
        self._asked, self._begun = 0, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not (show and is_live(console)))
        self._task = self._bar.add_task("behavior targets", total=total, state=self._state())
        self._heartbeat = Heartbeat(self._line, console, show, last=True)

    def __enter__(self) -> TargetsMeter:
        self._begun = time.monotonic()
        self._bar.start()
        self._heartbeat.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._heartbeat.__exit__(*error)
        self._bar.stop()

    def ask(self, rows: int) -> None:
        """Say that the LLM is about to answer ``rows``."""
        self._asked = rows
        self._bar.update(self._task, state=self._state())

    def advance(self, cuts: float, rows: int = 0, seconds: float = 0.0) -> None:
        """Add ``cuts`` that are done: in ``seconds`` if the LLM answered ``rows`` for them, else by a former run."""
        self._done += cuts
        if rows:
            self._cuts, self._rows, self._seconds = self._cuts + cuts, self._rows + rows, self._seconds + seconds
        self._bar.update(self._task, advance=cuts, state=self._state())

    def _state(self) -> str:
        left = (self._total - self._done) / self._cuts * self._seconds if self._cuts else 0.0
        parts = [f"{self._done:.0f}/{self._total} cuts"]
        if self._rows:
            parts += [f"{self._rows} rows", row_speed_text(self._rows, self._seconds, left)]
        elif self._asked:
            parts.append(f"the LLM is at its first {self._asked} rows")
        return ", ".join(parts)

    def _line(self) -> str:
        return f"behavior targets · {self._state()}, {time_text(time.monotonic() - self._begun)} so far"


def row_speed_text(rows: int, seconds: float, left: float) -> str:
    """Return rows per second and the time left (seconds) as they are shown."""
    return f"{rows / seconds:.1f} rows/s, {time_text(left)} left" if seconds else "…"
