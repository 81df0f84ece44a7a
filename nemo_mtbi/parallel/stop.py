# SPDX-License-Identifier: Apache-2.0
"""Clean ends: a signal saves and stops all processes at the same step, and a lost process ends the others at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

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
    """Says what to do when another process is gone, in the place of what the transport says.

    Raises:
        RuntimeError: in the place of an error of gloo or NCCL.
    """
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or dist.get_world_size() == 1 or not _is_lost(error):
            raise
        raise RuntimeError(
            f"process {dist.get_rank()} of {dist.get_world_size()} has lost another one, which died or did not "
            f"answer within model.dist_timeout ({str(error).splitlines()[0]}). Its own last lines say why; if there "
            "are none, look for a full memory (dmesg) or a lost machine. Start again with "
            "exp_manager.resume_if_exists=true to go on from the last checkpoint"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # gloo's errors have no type
