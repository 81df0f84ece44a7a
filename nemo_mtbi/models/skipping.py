# SPDX-License-Identifier: Apache-2.0
"""Counts of skipped cuts by reason, and of skipped steps, which must not go on without end."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_mtbi.data.draw import SkipCounter
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.replica import ReplicaLoader

MAX_NONFINITE = 100  # steps in a row; each of them costs as much as one that teaches
MAX_UNUSABLE = 1000  # steps in a row without a usable cut; a stretch of damaged data may be long
MIN_OF_PASS = 10  # steps in a row that end a run when they are a whole pass: one of a few steps may have bad luck
NONFINITE = "nonfinite_steps"


class Skips:
    """Counts what is left out. All processes call its methods together."""

    def __init__(self):
        self._cuts = SkipCounter()  # of this replica
        self._nonfinite = 0  # steps of the pass, the same on all processes
        self._message = ""  # about the last of them
        self._row = self._nonfinite_row = 0  # steps since the last update
        self._updates = 0  # of the pass
        self._loader: ReplicaLoader | None = None

    def begin(self, loader: ReplicaLoader) -> None:
        """Begin a run."""
        self._loader, self._row, self._nonfinite_row, self._updates = loader, 0, 0, 0

    def count(self, skipped: Mapping[str, int]) -> None:
        """Add what a batch of this replica has left out."""
        self._cuts.update(skipped)

    def nonfinite(self, message: str) -> None:
        """Note that the loss or gradient of the step in hand is not finite; ``message`` names its cuts."""
        self._nonfinite += 1
        self._nonfinite_row += 1
        self._message = message

    def end_step(self, left_out: bool) -> None:
        """Note what became of a step.

        Raises:
            RuntimeError: if too many were left out in a row.
        """
        if not left_out:
            self._updates += 1
            self._row = self._nonfinite_row = 0
            return
        self._row += 1
        if self._nonfinite_row >= MAX_NONFINITE or self._row >= MAX_UNUSABLE:
            raise RuntimeError(self._endless(f"the last {self._row} steps in a row were left out"))

    def end_pass(self, stopping: bool) -> str:
        """Return the message about all that was left out in a pass, on all replicas, and begin to count anew.

        Args:
            stopping: the pass ends before its data do.

        Raises:
            RuntimeError: if every one of its steps was left out.
        """
        whole = not stopping and not self._updates and self._loader is not None and not self._loader.began_at
        if whole and self._row >= MIN_OF_PASS:
            raise RuntimeError(self._endless("every step of a whole pass over the data was left out"))
        reasons = self._reasons()
        self._cuts.clear()
        self._nonfinite = self._updates = 0
        return reasons

    def check_end(self, updates: int) -> None:
        """Check that a run which has reached its end has trained at all.

        Args:
            updates: of the weights, since the first run.

        Raises:
            RuntimeError: if all of its steps were left out.
        """
        if not updates and self._row:
            raise RuntimeError(self._endless(f"all {self._row} steps of the run were left out"))

    def _reasons(self) -> str:
        total = SkipCounter()
        for cuts in groups.gather_objects(dict(self._cuts), "data"):
            total.update(cuts)
        if self._nonfinite:
            total[NONFINITE] += self._nonfinite
        return total.message()

    def _endless(self, what: str) -> str:
        reasons = self._reasons() or "see the warnings of the former passes"
        if self._nonfinite_row:
            remedy = (
                "the weights may be spoiled: start again from an earlier checkpoint or from scratch with a lower "
                f"model.optim.lr. The last of these steps: {self._message}"
            )
        else:
            remedy = "no cut was usable: set model.on_bad_audio=raise to see what is wrong with the first one"
        return f"{what}, so nothing is learned any more ({reasons}); {remedy}"
