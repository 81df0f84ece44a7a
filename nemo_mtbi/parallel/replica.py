# SPDX-License-Identifier: Apache-2.0
"""One data reader for each model replica; its processes get the same steps, and all replicas end in the same step."""

from __future__ import annotations

import gc
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from nemo_mtbi.data.passes import passes
from nemo_mtbi.layouts.layout import StepBatch
from nemo_mtbi.parallel import groups

# Lightning asks for a step before the one in hand is trained on, to know which is the last.
MAX_AHEAD = 2
STATE = ("epoch", "batches", "replicas", "workers")  # keys of a loader's state


@dataclass(frozen=True)
class _Header:
    """Message of the reader to its replica about a step.

    Attributes:
        stop: some process of the world was asked to stop.
        failure: why reading failed; then there is nothing else.
        batch: without its audio; ``None``: the data of all replicas have ended.
        shape: of the audio, ``[U, N]``.
        pinned: the audio lies in page-locked memory.
    """

    stop: bool = False
    failure: str | None = None
    batch: StepBatch | None = None
    shape: tuple[int, ...] = (0, 0)
    pinned: bool = False


class ReplicaLoader:
    """Read steps on the first process of each model replica, and hand them to the others.

    Every process of a replica gets the same :class:`StepBatch`; only those of the first stage get its audio (elsewhere
    ``[U, 0]``). The readers agree on every step: a replica whose data have ended gets empty steps until all have
    ended, and if one reader fails, all processes of the world raise in that step. A single process has no collective.

    Lightning takes it as a data loader: it has ``sampler.set_epoch`` and keeps its state in checkpoints. A pass that
    was interrupted is read again from its start, unless :meth:`load_state_dict` said where to go on.

    Building one, each step, and nothing else, are collective over the world.

    Args:
        loader: what ``build_dataloader`` returns on readers (``groups.is_reader()``), ``None`` elsewhere.
        stop: asked before each step, on any process: true where a signal asked the run to stop.
        limit: steps after which a pass ends, for data without an end: what ``trainer.limit_train_batches`` is. A pass
            that Lightning breaks off, it does not continue in the right place.

    Attributes:
        stop_requested: some process was asked to stop when the last step was read; equal on all processes.
        began_at: step with which the pass in hand began: 0, unless a run goes on within a pass.

    Raises:
        ValueError: on every process, if one that reads has no loader, or one that does not read has one.
    """

    def __init__(self, loader: DataLoader | None, stop: Callable[[], bool] | None = None, limit: int | None = None):
        self._loader = loader
        self._stop = stop
        self._limit: float = math.inf if limit is None else limit
        self._alone = dist.get_world_size() == 1
        reads = groups.is_reader()
        everyone: list[Any] = [
            (reads, reads == (loader is not None), _length(loader), _stream_workers(loader), stop is not None)
        ]
        if not self._alone:
            everyone = groups.gather_objects(everyone[0])
        if not all(fits for _, fits, *_ in everyone):
            raise ValueError("ReplicaLoader needs a loader where groups.is_reader() is true, and None elsewhere")
        lengths = [length for reads, _, length, *_ in everyone if reads]
        self._length: int | None = None if None in lengths else min(max(lengths), self._limit)
        self._workers = max(workers for *_, workers, _ in everyone)
        self._may_stop = any(stops for *_, stops in everyone)
        self.stop_requested = False
        self._epoch = self._handed = self._trained = self.began_at = 0
        self._next = (0, 0)  # pass, and the first of its steps, with which the next iteration begins

    @classmethod
    def build(
        cls, make: Callable[[], DataLoader], stop: Callable[[], bool] | None = None, limit: int | None = None
    ) -> ReplicaLoader:
        """Build the loader on the readers only.

        Args:
            make: builds it, as in ``lambda: build_dataloader(...)``.
            stop: see the class.
            limit: see the class.

        Raises:
            RuntimeError: on every process, if ``make`` failed on one (in a single process: whatever it raised).
        """
        if dist.get_world_size() == 1:
            return cls(make(), stop, limit)
        loader: DataLoader | None = None
        error: Exception | None = None
        failure: str | None = None
        if groups.is_reader():
            try:
                loader = make()
            except Exception as caught:  # of any kind: the others wait for the outcome
                error = caught
            failure = _share_failure(error)
        failure = groups.broadcast_object(failure)
        if failure:
            raise RuntimeError(failure) from error
        return cls(loader, stop, limit)

    # ----- iteration

    def __len__(self) -> int:
        """Return the steps of a pass: those of the replica that has most.

        Raises:
            TypeError: if a reader's loader has no length.
        """
        if self._length is None:
            raise TypeError("the data have no known length")
        return self._length

    def __iter__(self) -> Iterator[StepBatch]:
        epoch, skip = self._next
        self._next = (epoch, 0)
        self._epoch, self._handed, self._trained, self.began_at = epoch, skip, skip, skip
        source = None if self._loader is None else self._read(self._loader, epoch, skip)
        while self._handed < self._limit and (batch := self._step(source)) is not None:
            self._handed += 1
            yield batch
        self._next = (epoch + 1, 0)

    def _read(self, loader: DataLoader, epoch: int, skip: int) -> Iterator[StepBatch]:
        """Yield a pass of the reader's own loader. A generator: an error at its start is raised within a step too."""
        position = passes(loader)
        position.set_epoch(epoch)
        position.resume(skip)
        with _garbage_stays_here(), _signals_stay_here():
            steps = iter(loader)  # workers are forked here
        yield from steps

    def _step(self, source: Iterator[StepBatch] | None) -> StepBatch | None:
        """Return the next step, or ``None`` when the data of all replicas have ended."""
        stop = self._stop is not None and bool(self._stop())
        if self._alone and source is not None:
            self.stop_requested = stop
            return next(source, None)
        stop = self._ask_replica(stop)
        header: _Header | None = None
        batch: StepBatch | None = None
        error: Exception | None = None
        if source is not None:
            try:
                batch = next(source, None)
            except Exception as caught:  # of any kind: the others wait for the outcome
                error = caught
            header, batch = _agree(batch, error, stop)
        header = groups.broadcast_object(header)
        self.stop_requested = header.stop
        if header.failure:
            raise RuntimeError(header.failure) from error
        return None if header.batch is None else _with_audio(header.batch, header, batch)

    def _ask_replica(self, stop: bool) -> bool:
        """Return, on the reader, whether any process of its replica was asked to stop."""
        group = groups.control_group("replica")
        if not self._may_stop or group.size() == 1:
            return stop
        flag = torch.tensor([stop], dtype=torch.int64)
        dist.reduce(flag, dist.get_global_rank(group, 0), dist.ReduceOp.MAX, group=group)
        return bool(flag)

    # ----- position

    @property
    def sampler(self) -> ReplicaLoader:
        """This loader: Lightning looks here for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration pass ``epoch``, from the loaded position if that is in the same pass."""
        if epoch != self._next[0]:
            self._next = (epoch, 0)

    def mark_trained(self) -> None:
        """Count the oldest step that was handed out as trained on: call it at the end of each training step.

        Raises:
            RuntimeError: if there is no such step.
        """
        if self._trained == self._handed:
            raise RuntimeError(
                "mark_trained() was called more often than steps were handed out: call it once for each"
            )
        self._trained += 1

    def state_dict(self) -> dict[str, int]:
        """Return the position: pass, steps of it that were trained on, replicas, and workers of a stream (0 if none).

        Raises:
            RuntimeError: if :meth:`mark_trained` was not called: the position would be wrong.
        """
        if self._handed - self._trained > MAX_AHEAD:
            raise RuntimeError(
                f"{self._handed} steps were handed out, but {self._trained} marked: call mark_trained() at the end of "
                "each training step"
            )
        return dict(zip(STATE, (self._epoch, self._trained, groups.data_parallel_size(), self._workers), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the next iteration at a position; no audio is decoded for the steps before it.

        The steps that follow are those of an undisturbed run, if replicas and workers are as many as they were.
        Otherwise it goes on after about as much data, in another order, and warns.

        Raises:
            ValueError: if it is not the state of a loader.
        """
        if state.keys() != set(STATE) or not all(type(value) is int and value >= 0 for value in state.values()):
            raise ValueError(
                f"no position of a data loader: {dict(state)} must have whole numbers for {', '.join(STATE)}: resume "
                "from a checkpoint that this version wrote"
            )
        replicas, batches = groups.data_parallel_size(), state["batches"]
        if (state["replicas"], state["workers"]) != (replicas, self._workers):
            warnings.warn(
                f"the checkpoint was written with {state['replicas']} data-parallel replicas and {state['workers']} "
                f"workers for each stream, now there are {replicas} and {self._workers}: the order of the data is "
                "another from here on",
                stacklevel=2,
            )
            batches = batches * state["replicas"] // replicas
        self._epoch, self._handed, self._trained = state["epoch"], batches, batches
        self._next = (state["epoch"], batches)


def _agree(batch: StepBatch | None, error: Exception | None, stop: bool) -> tuple[_Header, StepBatch | None]:
    """Agree among the readers; return the header of a step, and this replica's batch with its audio."""
    group = groups.control_group("data")
    flags = torch.tensor([batch is not None, error is not None, stop], dtype=torch.int64)
    if group.size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    more, failed, stop = (bool(flag) for flag in flags)
    if failed:
        return _Header(stop, _share_failure(error)), None
    if not more:
        return _Header(stop), None
    batch = StepBatch.empty({}) if batch is None else batch
    light = replace(batch, audio=batch.audio.new_empty(len(batch.audio), 0))
    return _Header(stop, None, light, tuple(batch.audio.shape), batch.audio.is_pinned()), batch


def _with_audio(light: StepBatch, header: _Header, batch: StepBatch | None) -> StepBatch:
    """Return the step of this process; the reader's ``batch`` goes to the processes of the first stage.

    Args:
        light: the step without audio, from ``header``.
        header: it has the shape of the audio.
        batch: the step with audio, on the reader.
    """
    if not groups.is_first_stage():
        return light
    if batch is None:
        audio = torch.empty(header.shape, dtype=light.audio.dtype, pin_memory=header.pinned)
    else:
        audio = batch.audio.contiguous()
    group = groups.control_group("tensor")
    if group.size() > 1 and audio.numel():
        dist.broadcast(audio, dist.get_global_rank(group, 0), group=group)
    return replace(light, audio=audio)


def _share_failure(error: Exception | None) -> str | None:
    """Share failures among the readers; return one line for each different failure, or ``None`` without any."""
    text = None if error is None else _cause(error)
    ranks: dict[str, list[str]] = {}
    for rank, failure in enumerate(groups.gather_objects(text, "data")):
        if failure is not None:
            ranks.setdefault(failure, []).append(str(rank))
    lines = [f"reading data failed on data-parallel rank {', '.join(of)}: {text}" for text, of in ranks.items()]
    return "\n".join(lines) or None


def _cause(error: Exception) -> str:
    """Return type and message of an error; of a data loader's worker, those at the end of its traceback."""
    text = str(error).strip()
    lines = text.splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
    if frames and "in DataLoader worker process" in lines[0]:
        return "\n".join(lines[frames[-1] + 1 :])
    return f"{type(error).__name__}: {text}"


@contextmanager
def _garbage_stays_here() -> Iterator[None]:
    """Keep processes forked in the body from collecting the garbage of this one.

    It may hold process groups, whose threads a forked process does not have: it would hang or crash.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _signals_stay_here() -> Iterator[None]:
    """Keep from processes forked in the body the signals that stop a run after its step.

    A terminal sends Ctrl-C to all processes, and Slurm its warning. A worker would end, and with it the run, which is
    to save first. Workers end when this process does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # it has none
        return None


def _stream_workers(loader: Any) -> int:
    """Return the number of processes that each read a stream in an order of their own."""
    dataset = getattr(loader, "dataset", None)
    return loader.num_workers if isinstance(dataset, torch.utils.data.IterableDataset) else 0
