#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Kills a training run again and again, resumes it, and compares its last weights with those of an undisturbed run.

The kills are SIGKILL to all processes of the run: some at random moments of the training, some while a checkpoint is
being written. Prints one line for each kill, and ends with status 1 if a single bit of the connector differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from small_runs import (
    LAUNCHERS,
    LAYOUTS,
    LONGEST_RUN,
    STARTED,
    Tail,
    arguments,
    checkpoints_of,
    has_saved,
    saved,
    wait_for,
)

# What a kill waits for before its random moment; the first one shows that there is something to resume from.
KINDS = ("checkpoint", "start", "save")


def weights(folder: Path) -> bytes:
    """The connector's weights as they stand in the ``.nemo`` of a run."""
    with tarfile.open(folder / "mtbi_demo" / "mtbi_demo.nemo") as archive:
        (member,) = (item for item in archive if item.name.endswith("model_weights.safetensors"))
        return archive.extractfile(member).read()


class Attempts:
    """Starts and resumes one run.

    Args:
        launcher: one of :data:`small_runs.LAUNCHERS`.
        layout: one of :data:`small_runs.LAYOUTS`.
        folder: of the experiment.
        keys: its command line.
        rng: decides the moments.
    """

    def __init__(self, launcher: str, layout: str, folder: Path, keys: Sequence[str], rng: random.Random):
        self._launch, self._processes = LAUNCHERS[launcher], LAYOUTS[layout][0]
        self._folder, self._keys, self._rng = folder, keys, rng
        self.log = folder.with_suffix(".log")
        self.began = 0.0  # when training began last

    def go(self, kind: str | None = None, longest: float = 0.0) -> str | None:
        """One attempt.

        Args:
            kind: what the kill waits for, one of :data:`KINDS`; ``None``: there is none.
            longest: seconds from then to the latest random moment; a save is hit within 0.3 s.

        Returns:
            How the run was killed; ``None`` if it came to its end.
        """
        self.log.touch()
        tail, before, deadline = Tail(self.log), saved(self._folder), time.monotonic() + LONGEST_RUN
        run = self._launch(self._keys, self._processes, self.log)
        marks = {
            "start": lambda: True,
            "checkpoint": lambda: has_saved(self._folder, before),
            "save": lambda: any((checkpoints_of(self._folder) / ".saving").glob("*")),
        }
        try:
            wait_for(lambda: tail.has(STARTED), run, deadline)
            self.began = time.time()
            if kind and wait_for(marks[kind], run, deadline):
                after = self._rng.uniform(0.0, 0.3 if kind == "save" else longest)
                until = time.monotonic() + after
                if wait_for(lambda: time.monotonic() >= until, run, deadline):
                    return f"{after:.2f} s after a {kind}"
            wait_for(lambda: False, run, deadline)
            if run.status:
                raise SystemExit(f"the run failed with status {run.status}: see {self.log}")
            return None
        finally:
            if run.status is None:
                run.kill()

    def seconds(self) -> float:
        """How long the last attempt, which came to its end, has trained."""
        return max(saved(self._folder).values()) / 1e9 - self.began


def main(argv: Sequence[str] | None = None) -> int:
    """Kill and resume a run; return 0 if its weights are those of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="dp2")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="torchrun", help="fork: quick, from one process")
    parser.add_argument("--out", type=Path, required=True, help="new folder for both runs and their logs")
    parser.add_argument("overrides", nargs="*", help="further keys for examples/mtbi_train.py")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    rng, kills = random.Random(args.seed), 0
    whole, killed = (
        Attempts(
            args.launcher,
            args.layout,
            args.out / name,
            arguments(args.layout, args.out / name, args.steps, args.every, args.overrides),
            rng,
        )
        for name in ("undisturbed", "killed")
    )
    whole.go()
    share = 0.1 if args.kills == 1 else 1.5 / max(args.kills, 3)  # so that the last kill still finds the run at work
    longest = share * whole.seconds()
    while (ending := killed.go(None if kills == args.kills else KINDS[kills % 3], longest)) is not None:
        kills += 1
        print(f"{args.layout}: kill {kills}, {ending}", flush=True)
    same = weights(args.out / "undisturbed") == weights(args.out / "killed")
    resumed = killed.log.read_text(errors="replace").count("resuming ·")
    print(
        f"{args.layout}: {kills} kills, resumed {resumed} times from a checkpoint, "
        f"last weights {'bitwise equal' if same else 'DIFFERENT'}",
        flush=True,
    )
    if kills < args.kills:
        print(f"{args.layout}: at its end before kill {kills + 1} of {args.kills}: give it more --steps", flush=True)
    return 0 if same and kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
