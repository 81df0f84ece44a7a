# SPDX-License-Identifier: Apache-2.0
"""Clean ends: a signal saves and stops all processes at one step; other ends are reported with a remedy."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from nemo_mtbi.compat.lightning import end_within_pass
from nemo_mtbi.parallel import peers
from nemo_mtbi.parallel.checkpoint import files

# Kubernetes and torchrun; Slurm's --signal=USR1@120; Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FORWARDED_SECONDS = 1.0  # within which a second SIGINT under torchrun is the first one, which torchrun passes on
ENDING_SECONDS = 1.0  # from the end of a connection to that of its process


@dataclass
class Remedies:
    """Advice in the message about the end of a run.

    Attributes:
        go_on: how to continue after it.
        place: key of the folder that may be full or not writable, if the system does not name a file.
        places: folder -> key, for a file in it.
        patience: key that bounds the wait for another process.
        work: part of the run in which a signal ended it.
    """

    go_on: str = "Start again with exp_manager.resume_if_exists=true to go on from the last checkpoint"
    place: str = "exp_manager.exp_dir"
    places: dict[str, str] = field(default_factory=dict)
    patience: str = "model.dist_timeout"
    work: str = "outside of training"

    def about(self, error: OSError) -> str:
        """Return cause and remedy of an error of the file system, with the key of the folder that is concerned."""
        # not what came before it: making a folder fails first since its parent is missing
        number = error.errno
        alone = OSError(*error.args) if number is None else OSError(number, os.strerror(number), error.filename)
        text = files.explain_system_error(alone)
        key = self.place
        if error.filename is not None:
            path = Path(os.fsdecode(error.filename)).absolute()
            inside = [key for folder, key in self.places.items() if path.is_relative_to(Path(folder).absolute())]
            # a folder that could not be made may be a parent of the one that is configured
            above = [key for folder, key in self.places.items() if Path(folder).absolute().is_relative_to(path)]
            key = next(iter([*inside, *above]), self.place if not self.places else "")
        return text.replace(" (exp_manager.exp_dir)", f" ({key})" if key else "")


class StopOnSignal(Callback):
    """End training after the step in which a signal came; NeMo's checkpoint callback then saves the last state.

    The signal may reach some processes only, or each in another step: they agree before each step, where the reader of
    each replica hands out the data (``agreed``). A second Ctrl-C ends the process at once.

    Args:
        agreed: returns whether the processes have agreed to stop; the same answer on all of them after each step.

    Attributes:
        requested: name of the signal that this process got, or ``None``.
        stopped: whether training has ended because of a signal.
    """

    def __init__(self, agreed: Callable[[], bool]):
        self.requested: str | None = None
        self.stopped = False
        self._agreed = agreed
        self._before: dict[int, Any] = {}
        self._interrupted: float | None = None  # when Ctrl-C came

    def on_train_start(self, trainer: Trainer, module) -> None:
        """Replace Lightning's signal handlers, which would end this process alone, without a checkpoint."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and self._interrupted is not None:
            if time.monotonic() - self._interrupted >= FORWARDED_SECONDS:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return
        if self.requested is None:
            why = "If that is because another process has failed, its own last lines say why"
            if number == signal.SIGINT:
                why = "Press Ctrl-C again to end at once, without saving"
            _tell(f"{signal.Signals(number).name}: {_myself()} saves and stops after this step. {why}")
        self.requested = signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupted = time.monotonic()
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                # a handler of Python's would wait for the end of what runs now, which may be a collective
                signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_train_batch_end(self, trainer: Trainer, module, *unused) -> None:
        """End training if the processes have agreed to stop."""
        if self._agreed() and not self.stopped:
            self.stopped = trainer.should_stop = True
            end_within_pass(trainer)

    def on_train_end(self, trainer: Trainer, module) -> None:
        """Restore the signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, module, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore()

    def teardown(self, trainer: Trainer, module, stage: str) -> None:
        """Restore the signal handlers: a time limit of NeMo's ends a fit without another hook."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def explained(remedies: Remedies | None = None) -> Iterator[Remedies]:
    """Report what ended the run and what to do: another process is gone, the disk is full, or a signal came.

    Signals that come while training are those of :class:`StopOnSignal`.

    Args:
        remedies: what to advise; the body may change it.

    Raises:
        RuntimeError: in the place of an error of gloo or NCCL, or of the file system.
        SystemExit: after a signal.
    """
    remedies = remedies or Remedies()
    try:
        with _signals_end_with_a_reason(remedies):
            yield remedies
    except OSError as error:
        if error.errno not in files.CAUSES:
            raise
        raise RuntimeError(f"{_myself()} could not go on: {remedies.about(error)}. {remedies.go_on}") from error
    except RuntimeError as error:
        if _place()[1] == 1 or not _is_lost(error):
            raise
        raise RuntimeError(
            f"{_myself()} has lost another one, which died or did not answer within {remedies.patience} "
            f"({_reason(error)}){_ended()}. Its own last lines say why; if there are none, look for a full memory "
            f"(dmesg) or a lost machine. {remedies.go_on}"
        ) from error


@contextmanager
def _signals_end_with_a_reason(remedies: Remedies) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame) -> None:
        if sys.exc_info()[0] is not None:
            return  # this process is about to end with a reason of its own, which must not be lost
        name = signal.Signals(number).name
        why = (
            ""
            if number == signal.SIGINT
            else " If that is because another process has failed, its own last lines say why."
        )
        _tell(f"{name} has ended {_myself()} {remedies.work}.{why} {remedies.go_on}")
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # a signal may come while something else is being printed


def _place() -> tuple[int, int]:
    """Return rank and number of processes, also before they are connected."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _myself() -> str:
    rank, count = _place()
    return f"process {rank} of {count}"


def _ended() -> str:
    """Return the part of a message that names the ended processes; empty where none is known."""
    deadline = time.monotonic() + ENDING_SECONDS
    while not (ranks := peers.ended()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return f": process {', '.join(map(str, ranks))} has ended" if ranks else ""


def _reason(error: RuntimeError) -> str:
    """Return the message of the transport without its source line and its advice."""
    return re.sub(r"^\[[^]]*\.\w+:\d+\] *", "", str(error).splitlines()[0]).split(". ")[0]


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # gloo's errors have no type
