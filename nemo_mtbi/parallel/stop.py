# SPDX-License-Identifier: Apache-2.0
"""Clean ends: a signal saves and stops all processes at one step; whatever else ends a run is told with a remedy."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from nemo_mtbi.parallel.checkpoint import files

GO_ON = "Start again with exp_manager.resume_if_exists=true to go on from the last checkpoint"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Kubernetes and torchrun; Slurm's --signal=USR1@120


class StopOnSignal(Callback):
    """Ends training after the step in which a signal came; NeMo's checkpoint callback then saves the last state.

    The signal may reach some processes only, or each in another step: they agree before each step, where the reader of
    each replica hands out the data (``agreed``).

    Args:
        agreed: says whether the processes have agreed to stop; the same answer on all of them after each step.

    Attributes:
        requested: name of the signal that this process got, or ``None``.
        stopped: whether training has ended because of a signal.
    """

    def __init__(self, agreed: Callable[[], bool]):
        self.requested: str | None = None
        self.stopped = False
        self._agreed = agreed
        self._before: dict[int, object] = {}

    def on_train_start(self, trainer: Trainer, module) -> None:
        """Takes the signals from Lightning, whose own handler would end this process alone, without a checkpoint."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame) -> None:
        if self.requested is None:
            _tell(
                f"{signal.Signals(number).name}: {_myself()} saves and stops after this step. If that is because "
                "another process has failed, its own last lines say why"
            )
        self.requested = signal.Signals(number).name

    def on_train_batch_end(self, trainer: Trainer, module, *unused) -> None:
        if self._agreed() and not self.stopped:
            self.stopped = trainer.should_stop = True
            trainer.fit_loop.min_epochs = 0  # Lightning would first end the epoch

    def on_train_end(self, trainer: Trainer, module) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def explained() -> Iterator[None]:
    """Says what has ended the run and what to do: another process is gone, the disk is full, or a signal has come.

    Signals that come while training are those of :class:`StopOnSignal`.

    Raises:
        RuntimeError: in the place of an error of gloo or NCCL, or of the file system.
        SystemExit: after a signal.
    """
    try:
        with _signals_are_told():
            yield
    except OSError as error:
        if error.errno not in files.CAUSES:
            raise
        raise RuntimeError(f"{_myself()} could not go on: {files.explain(error)}. {GO_ON}") from error
    except RuntimeError as error:
        if _place()[1] == 1 or not _is_lost(error):
            raise
        raise RuntimeError(
            f"{_myself()} has lost another one, which died or did not answer within model.dist_timeout "
            f"({_reason(error)}). Its own last lines say why; if there are none, look for a full memory (dmesg) or a "
            f"lost machine. {GO_ON}"
        ) from error


@contextmanager
def _signals_are_told() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame) -> None:
    if sys.exc_info()[0] is not None:
        return  # this process is about to end with a reason of its own, which must not be lost
    _tell(
        f"{signal.Signals(number).name} has ended {_myself()} outside of training. If that is because another process "
        f"has failed, its own last lines say why. {GO_ON}"
    )
    raise SystemExit(128 + number)


def _tell(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # a signal may come while something else is being printed


def _place() -> tuple[int, int]:
    """Rank and number of processes, also before they have found each other."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _myself() -> str:
    rank, count = _place()
    return f"process {rank} of {count}"


def _reason(error: RuntimeError) -> str:
    """What the transport says, without where in its source it does and what it advises."""
    return re.sub(r"^\[[^]]*\.\w+:\d+\] *", "", str(error).splitlines()[0]).split(". ")[0]


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # gloo's errors have no type
