# SPDX-License-Identifier: Apache-2.0
"""Passes over the data, and how a run goes on in the middle of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from lhotse import CutSet
from lhotse.utils import fix_random_seed

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.layouts.layout import StepBatch


class Passes:
    """Position in the data: the number of the next pass (from 0), and how many of its batches are left out.

    Args:
        fixed: every pass is pass 0, for validation.
    """

    def __init__(self, fixed: bool = False):
        self.fixed = fixed
        self.epoch = 0
        self.consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be pass ``epoch``."""
        self.epoch = 0 if self.fixed else epoch

    def resume(self, batches: int) -> None:
        """Let the next iteration leave out ``batches``, which were trained on before; no audio is read for them."""
        self.consumed = batches

    def take(self) -> tuple[int, int]:
        """Return the pass that begins now, and how many of its batches it leaves out; the next one will be whole."""
        taken, self.consumed = (self.epoch, self.consumed), 0
        return taken

    def ended(self, epoch: int) -> None:
        """Go on to the next pass, unless another was set meanwhile."""
        if self.epoch == (0 if self.fixed else epoch):
            self.set_epoch(epoch + 1)


class BatchSource(Protocol):
    """Source of the batches of cuts of a pass, for the main process or for each worker of a stream."""

    def seed_of(self, epoch: int, worker: int) -> int:
        """Return the seed of a worker in a pass."""
        ...

    def sampler(self, epoch: int, worker: int) -> Iterable[CutSet]:
        """Return the batches of cuts of a worker in a pass."""
        ...


class EpochSampler(Passes, torch.utils.data.Sampler):
    """Sampler of batches of cuts, pass by pass; Lightning calls ``set_epoch``.

    Args:
        source: the data.
        fixed: every pass is pass 0, for validation.
    """

    def __init__(self, source: BatchSource, fixed: bool):
        super().__init__(fixed)
        self.source = source

    def __iter__(self) -> Iterator[CutSet]:
        epoch, consumed = self.take()
        yield from islice(self.source.sampler(epoch, 0), consumed, None)
        self.ended(epoch)


@dataclass(frozen=True)
class SkippedBatches:
    """Report of a worker before its first batch of a resumed pass: how many batches it has left out."""

    batches: int


class StreamDataset(Passes, torch.utils.data.IterableDataset):
    """Steps of data that can only be read in order: every worker opens them anew for each pass and samples itself.

    Torch takes one batch of each worker in turn. So of the first ``n`` batches of a pass, worker ``w`` of ``W`` gave
    those number ``w``, ``w + W``, ... and leaves out just these when the pass is resumed at batch ``n``.

    The training must go on with worker ``n % W``, but torch asks worker 0 first. So every worker first yields a
    :class:`SkippedBatches`, and those before worker ``n % W``, whose turn in the round of batch ``n`` is over, yield a
    second one in its place. :class:`StreamLoader` takes these items out again.

    Args:
        source: the batches of cuts.
        dataset: turns them into steps.
    """

    def __init__(self, source: BatchSource, dataset: MTBIDataset):
        super().__init__()
        self.source = source
        self.dataset = dataset

    def __iter__(self) -> Iterator[StepBatch | SkippedBatches]:
        return self._read(*self.take())

    def _read(self, epoch: int, consumed: int) -> Iterator[StepBatch | SkippedBatches]:
        worker = torch.utils.data.get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:  # not in the main process, whose random state is the training's
            fix_random_seed(self.source.seed_of(epoch, index))
        batches = (cuts for cuts in self.source.sampler(epoch, index))  # iter() of a Lhotse sampler starts it again
        if consumed:
            share = len(range(index, consumed, workers))  # of the consumed batches, those of this worker
            yield SkippedBatches(sum(1 for _ in islice(batches, share)))  # fewer, if its data end before
            if index < consumed % workers:
                yield SkippedBatches(0)  # its turn in the round that was broken off is over
        for cuts in batches:
            yield self.dataset[cuts]


class StreamLoader(torch.utils.data.DataLoader):
    """Data loader of a :class:`StreamDataset`, which takes its workers' reports out."""

    @property
    def stream(self) -> StreamDataset:
        """The data set.

        Raises:
            TypeError: if the loader was made of another.
        """
        if not isinstance(self.dataset, StreamDataset):
            raise TypeError(f"a StreamLoader reads a StreamDataset, not a {type(self.dataset).__name__}")
        return self.dataset

    def __iter__(self) -> Iterator[StepBatch]:  # type: ignore[override]  # torch names its private iterator here
        epoch, consumed = self.stream.epoch, self.stream.consumed
        items = super().__iter__()  # the workers copy the stream here
        self.stream.resume(0)
        return self._batches(items, epoch, consumed)

    def _batches(self, items: Iterator[StepBatch | SkippedBatches], epoch: int, missing: int) -> Iterator[StepBatch]:
        for item in items:
            if isinstance(item, SkippedBatches):
                missing -= item.batches
            elif missing:  # the data of a worker had ended before its turn, and others had gone on
                missing -= 1
            else:
                yield item
        self.stream.ended(epoch)


def passes(loader: torch.utils.data.DataLoader) -> Passes:
    """Return the object by which a data loader is set to a pass, and to a place in it.

    Args:
        loader: of :func:`nemo_mtbi.data.loader.build_dataloader`.

    Raises:
        TypeError: if it is another loader.
    """
    for part in (loader.dataset, loader.sampler):
        if isinstance(part, Passes):
            return part
    raise TypeError(f"a loader of {type(loader.dataset).__name__} was not made by build_dataloader")
