# SPDX-License-Identifier: Apache-2.0
"""Training runs that are small enough to be started, broken and killed many times; for the experiments beside this."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "mtbi_train.py"
LAYOUTS = {
    "single": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["model.tensor_model_parallel_size=2"]),
    "pp2": (2, ["model.pipeline_model_parallel_size=2"]),
}
STARTED = "training ·"  # what a run prints before its first step
LONGEST_RUN = 900  # seconds, of one attempt
_MARK = "SMALL_RUN"  # environment variable by which all processes of a run are found
_POLL = 0.02  # seconds


def arguments(layout: str, folder: Path, steps: int, every: int, extra: Sequence[str] = ()) -> list[str]:
    """Arguments of the command line after the name of the script.

    Args:
        layout: one of :data:`LAYOUTS`.
        folder: of the experiment; the run goes on where one in it has stopped.
        steps: of the whole run.
        every: steps between validations, which is also when checkpoints are written.
        extra: further keys; those that come later win.
    """
    processes, sizes = LAYOUTS[layout]
    return [
        f"trainer.devices={processes}",
        *sizes,
        "data.train_utterances=300",
        "data.validation_utterances=4",
        "data.test_utterances=1",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={every}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.resume_if_exists=true",
        *extra,
    ]


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of an experiment are."""
    return folder / "mtbi_demo" / "checkpoints"


def saved(folder: Path) -> dict[Path, int]:
    """Whole checkpoints of an experiment, each with the time of its marker in nanoseconds."""
    return {path.parent: path.stat().st_mtime_ns for path in checkpoints_of(folder).glob("[!.]*/checkpoint.json")}


def has_saved(folder: Path, before: Mapping[Path, int]) -> bool:
    """Whether an experiment has a whole checkpoint that it did not have when :func:`saved` was called."""
    return bool(saved(folder).items() - before.items())


class TorchRun:
    """A run under torchrun, whose output goes to a log.

    Args:
        keys: see :func:`arguments`.
        processes: how many.
        log: file that is added to; lines are marked with the rank if there is more than one process.
        ranks: folder for a file of each process's output besides, or ``None``.
        prefix: what stands before the command, such as one that enters a namespace.
    """

    def __init__(
        self,
        keys: Sequence[str],
        processes: int,
        log: Path,
        ranks: Path | None = None,
        prefix: Sequence[str] = (),
    ):
        self._mark = uuid.uuid4().hex
        self._ranks = ranks
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        launcher += [f"--nproc-per-node={processes}"]
        if ranks is not None:
            launcher += ["--tee=3", f"--log-dir={ranks}"]
        run = [*prefix, *(launcher if processes > 1 else [sys.executable]), str(SCRIPT), *keys]
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                run,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, _MARK: self._mark},
            )

    @property
    def status(self) -> int | None:
        """Exit status of torchrun, ``None`` while it runs."""
        return self._process.poll()

    def pids(self) -> dict[int, int]:
        """Rank -> process, of those that train."""
        return {int(env["RANK"]): pid for pid, env in self._members() if "TORCHELASTIC_RUN_ID" in env}

    def left(self) -> list[int]:
        """All processes of the run that there are, also those that nobody waits for any more."""
        return [pid for pid, _ in self._members()]

    def _members(self) -> Iterator[tuple[int, dict[str, str]]]:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                entries = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has ended, or is another user's
                continue
            env = dict(entry.partition("=")[::2] for entry in entries)
            if env.get(_MARK) == self._mark and state != "Z":
                yield int(path.name), env

    def last_line(self, rank: int) -> str:
        """Return what a process has written last, on standard error if there is anything."""
        (folder,) = self._ranks.glob(f"*/attempt_0/{rank}")
        for name in ("stderr.log", "stdout.log"):
            lines = [line for line in (folder / name).read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return ""

    def kill(self) -> None:
        """SIGKILL to all processes of the run."""
        while members := self.left():  # also those that were just being started
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()


class ForkedRun:
    """A run whose processes are forked from one that has imported everything: they start in no time.

    They run the same script in the same environment as under torchrun, on the CPU. Args as for :class:`TorchRun`.
    """

    def __init__(self, keys: Sequence[str], processes: int, log: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nemo_mtbi.commands.train", "nemo.collections.asr.models"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        common["CUDA_VISIBLE_DEVICES"] = ""
        self._processes = [
            context.Process(target=_run_rank, args=(keys, {**common, "RANK": str(i), "LOCAL_RANK": str(i)}, str(log)))
            for i in range(processes)
        ]
        for process in self._processes:
            process.start()

    @property
    def status(self) -> int | None:
        """Worst exit status, ``None`` while a process runs."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else max(codes, key=abs)

    def kill(self) -> None:
        """SIGKILL to all processes of the run."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _run_rank(keys: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """Main function of a process of a :class:`ForkedRun`."""
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    sys.argv = [str(SCRIPT), *keys]
    runpy.run_path(str(SCRIPT), run_name="__main__")


LAUNCHERS = {"torchrun": TorchRun, "fork": ForkedRun}


def wait_for(condition: Callable[[], bool], run: TorchRun | ForkedRun, deadline: float) -> bool:
    """Whether a condition came true before the run ended.

    Raises:
        TimeoutError: if neither has happened at the deadline; the run is killed.
    """
    while run.status is None:
        if condition():
            return True
        if time.monotonic() > deadline:
            run.kill()
            raise TimeoutError("a run took too long: see its log")
        time.sleep(_POLL)
    return False


class Tail:
    """The lines that are added to a log from now on."""

    def __init__(self, log: Path):
        self._log = log
        self._start = log.stat().st_size if log.exists() else 0

    def text(self) -> str:
        """Return what was added so far."""
        with open(self._log, "rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def has(self, pattern: str) -> bool:
        """Whether a regular expression is found in it."""
        return re.search(pattern, self.text()) is not None
