#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Breaks training runs on purpose and checks how they end: `python scripts/experiments/faults.py --out NEW_FOLDER`.

For each fault a real run of two or more processes is started with torchrun. All its processes must end within the
bar, with a nonzero exit status, and the last line of its first process (of the next one, if that is the one that was
killed) must name cause and remedy. Whatever was saved before must still be whole, and the run of the next fault goes
on from it. Prints a table, and ends with status 1 if a bar is missed. Needs Linux with user namespaces.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from small_disk import SmallDisk
from small_runs import (
    LAYOUTS,
    LONGEST_RUN,
    ROOT,
    STARTED,
    Tail,
    TorchRun,
    arguments,
    checkpoints_of,
    has_saved,
    saved,
    wait_for,
)

sys.path.insert(0, str(ROOT))
from nemo_mtbi.parallel.checkpoint import files  # noqa: E402

DIST_TIMEOUT = 20  # seconds; torchrun gives a process that does not answer 30 more
DISK = 64  # megabytes; a checkpoint has 7
LARGEST_FILE = 200_000  # bytes, of what a run may write under a file-size limit
EVERY = 2  # steps between checkpoints
LOST = r"process \d of \d has lost another one, which died or did not answer.*last lines say why.*resume_if_exists"


class Bench:
    """Where the runs of one experiment leave their checkpoints, data and output.

    Attributes:
        cache: of the data, of which an audio file is broken for a while.
        disk: what is filled and locked.
        folder: of the experiment, as seen from outside of the disk's namespace.
    """

    def __init__(self, out: Path, cache: Path, extra: Sequence[str]):
        self.out, self.cache, self._extra = out, cache, extra
        self.disk = SmallDisk(out / "disk", DISK)
        self.folder = self.disk.outside / "runs"

    def start(self, fault: Fault, name: str) -> tuple[TorchRun, Tail]:
        """A run that goes on where the one before it has stopped."""
        layout = fault.layout if fault.layout in LAYOUTS else "dp2"
        log = self.out / f"{name}.log"
        keys = arguments(layout, self.disk.folder / "runs", 10_000, EVERY)
        keys += ["data.train_utterances=60", "data.validation_utterances=1", f"data.cache_dir={self.cache}"]
        keys += [f"model.dist_timeout={DIST_TIMEOUT}", *fault.keys, *self._extra]
        processes = fault.processes or LAYOUTS[layout][0]
        log.touch()
        tail = Tail(log)
        return TorchRun(keys, processes, log, self.out / "ranks" / name, self.disk.prefix), tail

    def checkpoints(self) -> list[Path]:
        """Whole ones, the newest last."""
        return sorted(saved(self.folder), key=lambda path: files.read_marker(path).serial)

    def newest_step(self) -> int:
        """Of the newest whole checkpoint.

        Raises:
            ValueError: if there are checkpoints and none is whole.
        """
        last = files.find_last_whole(checkpoints_of(self.folder))
        return 0 if last is None else files.read_marker(last).step


@dataclass(frozen=True)
class Fault:
    """One way in which a run can fail.

    Attributes:
        name: short.
        layout: one of ``small_runs.LAYOUTS``, or what the table says in its place (then of ``processes``).
        says: regular expression of the last line, or of the log of a run that goes on.
        before: breaks something before the start.
        during: breaks something in a run that has just saved a checkpoint.
        after: mends it.
        keys: of the command line.
        processes: if not those of the layout.
        rank: whose last line counts.
        fails: ``False``: the run must go on, from an earlier checkpoint.
    """

    name: str
    layout: str
    says: str
    before: Callable[[Bench], None] | None = None
    during: Callable[[Bench, TorchRun], None] | None = None
    after: Callable[[Bench], None] | None = None
    keys: tuple[str, ...] = ()
    processes: int | None = None
    rank: int = 0
    fails: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a run has ended; ``wrong`` says what is not as it must be."""

    seconds: float
    status: int | None
    line: str
    wrong: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------- faults


def signalled(rank: int, number: int) -> Callable[[Bench, TorchRun], None]:
    """Return a fault: one process gets a signal."""
    return lambda bench, run: os.kill(run.pids()[rank], number)


def limit_files(bench: Bench, run: TorchRun) -> None:
    """Limit the size of files that the first process may write."""
    for pid in run.pids().values():
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, hard))


def an_audio_file(bench: Bench) -> Path:
    """Return one audio file of the training corpus."""
    return sorted(bench.cache.glob("synthetic-train-*/audio/**/*.flac"))[0]


def break_audio(bench: Bench) -> None:
    """Make an audio file of the corpus unreadable."""
    path = an_audio_file(bench)
    path.rename(path.with_suffix(".whole"))
    path.write_text("no audio")


def mend_audio(bench: Bench) -> None:
    """Put the audio file back that :func:`break_audio` broke."""
    path = an_audio_file(bench)
    path.with_suffix(".whole").rename(path)


def truncate(folder: Path) -> None:
    """Cut a file of a checkpoint short."""
    os.truncate(max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size), 10)


def unmark(folder: Path) -> None:
    """Remove the marker that says that a checkpoint is whole."""
    (folder / files.MARKER).unlink()


def newest(breaks: Callable[[Path], None]) -> Callable[[Bench], None]:
    """Return a fault that breaks the newest checkpoint."""
    return lambda bench: breaks(bench.checkpoints()[-1])


def each(breaks: Callable[[Path], None]) -> Callable[[Bench], None]:
    """Return a fault that breaks every checkpoint."""
    return lambda bench: [breaks(path) for path in bench.checkpoints()] and None


def fill(bench: Bench, run: TorchRun) -> None:
    """Fill the disk of the run."""
    bench.disk.fill()


def lock(bench: Bench, run: TorchRun) -> None:
    """Make the disk of the run read-only."""
    bench.disk.lock()


FAULTS = [
    Fault("rank killed", "dp2", LOST, during=signalled(1, signal.SIGKILL)),
    Fault("first rank killed", "tp2", LOST, during=signalled(0, signal.SIGKILL), rank=1),
    Fault("stage killed", "pp2", LOST, during=signalled(1, signal.SIGKILL)),
    Fault("rank hangs", "dp2", LOST, during=signalled(1, signal.SIGSTOP)),
    Fault("disk full", "tp2", r"no space left on the device.*free space", during=fill, after=lambda b: b.disk.free()),
    Fault("file-size limit", "dp2", r"larger than the limit.*ulimit -f", during=limit_files),
    Fault("read-only", "pp2", r"read-only.*mounted for writing", during=lock, after=lambda b: b.disk.unlock()),
    Fault(
        "broken audio",
        "dp2",
        r"reading data failed on data-parallel rank \d: .*the audio of cut .*on_bad_audio: skip",
        before=break_audio,
        after=mend_audio,
    ),
    Fault(
        "truncated shard",
        "dp2",
        r"no whole checkpoint: \S+ has 10 of \d+ bytes; \S+ is used instead",
        before=newest(truncate),
        fails=False,
    ),
    Fault(
        "missing marker",
        "tp2",
        r"no whole checkpoint: it has no checkpoint.json.*; \S+ is used instead",
        before=newest(unmark),
        fails=False,
    ),
    Fault(
        "heads by TP",
        "tp3",
        r"2 query groups, which 3 tensor-parallel.*choose a tensor_model_parallel_size",
        keys=("trainer.devices=3", "model.tensor_model_parallel_size=3"),
        processes=3,
    ),
    Fault(
        "layers by PP",
        "pp3",
        r"4 layers, which 3 pipeline stages.*choose a pipeline_model_parallel_size",
        keys=("trainer.devices=3", "model.pipeline_model_parallel_size=3"),
        processes=3,
    ),
    Fault(
        "world by TP",
        "3 of tp2",
        r"3 processes do not divide by tensor x pipeline = 2 x 1: start a multiple of 2",
        keys=("trainer.devices=3", "model.tensor_model_parallel_size=2"),
        processes=3,
    ),
    Fault(
        "devices differ",
        "2 of 1",
        r"torchrun has started 2 processes.*trainer.devices",
        keys=("trainer.devices=1",),
        processes=2,
    ),
    Fault(
        "read-only at start",
        "dp2",
        r"read-only.*mounted for writing",
        before=lambda b: b.disk.lock(),
        after=lambda b: b.disk.unlock(),
    ),
    Fault("all truncated", "dp2", r"has 10 of \d+ bytes.*Restore one of them, or remove", before=each(truncate)),
    Fault("all unmarked", "pp2", r"it has no checkpoint.json.*Restore one of them, or remove", before=each(unmark)),
]


# --------------------------------------------------------------------------------------------------------------- runs


def needs_start(fault: Fault) -> bool:
    """Whether training begins before the fault shows."""
    return fault.during is not None or fault.after is mend_audio or not fault.fails


def examine(fault: Fault, bench: Bench, bar: float) -> Outcome:
    """Starts a run, breaks it, and waits for its end."""
    name = fault.name.replace(" ", "-")
    goes_on = fault.during is not None or fault.after is mend_audio  # what was saved before must stay whole
    step = bench.newest_step() if goes_on else 0
    if fault.before:
        fault.before(bench)
    before = saved(bench.folder)
    began = time.monotonic()
    run, tail = bench.start(fault, name)
    deadline = began + LONGEST_RUN
    try:
        if needs_start(fault) and wait_for(lambda: tail.has(STARTED), run, deadline):
            began = time.monotonic()
        if fault.during or not fault.fails:
            # the best and the last: one of them may be broken next
            wait_for(lambda: has_saved(bench.folder, before) and len(saved(bench.folder)) > 1, run, deadline)
        broken = fault.during is not None and run.status is None
        if broken:
            step = bench.newest_step()
            fault.during(bench, run)
            began = time.monotonic()
        if not fault.fails:
            outcome = judge_going_on(fault, run, tail)
        else:
            while (run.status is None or run.left()) and time.monotonic() < began + bar + 30:
                time.sleep(0.1)
            outcome = judge_end(fault, run, tail, time.monotonic() - began, bar)
    finally:
        run.kill()
        if fault.after:
            fault.after(bench)
    wrong = [*outcome.wrong]
    if fault.during and not broken:
        wrong.append("ended before the fault")
    if goes_on:
        if step and before and not tail.has("resuming · from"):
            wrong.append("did not resume from what was saved before")
        if bench.newest_step() < step:
            wrong.append("what was saved before is not whole any more")
    return Outcome(outcome.seconds, outcome.status, outcome.line, tuple(wrong))


def judge_end(fault: Fault, run: TorchRun, tail: Tail, seconds: float, bar: float) -> Outcome:
    """Compare the end of a broken run with what the fault must lead to."""
    left, status = run.left(), run.status
    line = run.last_line(fault.rank)
    wrong = []
    if left:
        wrong.append(f"{len(left)} processes are left")
    if seconds > bar:
        wrong.append(f"took longer than {bar:g} s")
    if not status:
        wrong.append(f"exit status {status}")
    if not re.search(fault.says, line):
        wrong.append("last line")
    return Outcome(seconds, status, line, tuple(wrong))


def judge_going_on(fault: Fault, run: TorchRun, tail: Tail) -> Outcome:
    """Of a run that has had the time to save a checkpoint of its own."""
    match = re.search(fault.says, tail.text())
    wrong = [] if match else ["the broken checkpoint is not named"]
    if run.status is not None:
        wrong.append("ended")
    if not tail.has("resuming · from"):
        wrong.append("did not resume")
    line = next((line for line in tail.text().splitlines() if re.search(fault.says, line)), "")
    return Outcome(0.0, run.status, line, tuple(wrong))


def show(results: dict[Fault, Outcome], console: Console) -> None:
    """Print the outcome of each fault."""
    table = Table("fault", "layout", "seconds", "status", "last line", "verdict", show_lines=True)
    for fault, outcome in results.items():
        seconds = f"{outcome.seconds:.1f}" if fault.fails else "goes on"
        verdict = "[red]" + ", ".join(outcome.wrong) if outcome.wrong else "[green]ok"
        line = outcome.line.replace("[", "\\[")
        table.add_row(fault.name, fault.layout, seconds, str(outcome.status), line, verdict)
    console.print(table)


def main() -> int:
    """Break runs one after the other; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", nargs="*", metavar="NAME", help="; ".join(fault.name for fault in FAULTS))
    parser.add_argument("--seconds", type=float, default=60, help="that a run may take to end")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--cache", type=Path, help="of the data; a folder in --out unless given")
    parser.add_argument("--keys", nargs="*", default=[], help="further keys for examples/mtbi_train.py")
    args = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    unknown = set(args.faults or ()) - known.keys()
    if unknown:
        parser.error(f"unknown faults {', '.join(unknown)}; known are {', '.join(known)}")
    (args.out / "ranks").mkdir(parents=True)
    console, out = Console(width=max(140, Console().width)), args.out.absolute()
    bench = Bench(out, (args.cache or out / "cache").absolute(), args.keys)
    results: dict[Fault, Outcome] = {}
    try:
        chosen = [known[name] for name in args.faults or known]
        if not chosen[0].during:  # something to break, and the data
            examine(FAULTS[0], bench, args.seconds)
        for fault in chosen:
            results[fault] = examine(fault, bench, args.seconds)
            outcome = results[fault]
            console.print(
                f"{fault.name} ({fault.layout}): {outcome.seconds:.1f} s, status {outcome.status}, "
                f"{', '.join(outcome.wrong) or 'ok'}",
                highlight=False,
            )
    finally:
        bench.disk.close()
    show(results, console)
    return 1 if any(outcome.wrong for outcome in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
