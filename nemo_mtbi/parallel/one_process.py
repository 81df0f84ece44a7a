# SPDX-License-Identifier: Apache-2.0
"""A process group for a run of one process: no thread, no socket, and collectives that move nothing.

Megatron-core and Lightning want their groups to exist, also where a run has one process. A group of gloo has threads
that poll, and one of NCCL holds memory of the GPU. A backend of this package is registered with ``torch.distributed``
in their place. A collective that it does not define raises an error, so that none is silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_mtbi.compat.torch import add_old_collectives

BACKEND = "one_process"
# Without the hints of torch, which are those of its Python bindings: torch.distributed calls a backend with options.
_ProcessGroup: Any = dist.ProcessGroup


class _Done(dist.Work):
    """A collective that ended when it was called."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


@add_old_collectives
class OneProcessGroup(_ProcessGroup):
    """The group of a single process, whose collectives give each process its own value.

    A sum, a mean, a maximum or a product over one process is the value itself, and a gathering is a copy of it. The
    arguments are those of ``torch.distributed.ProcessGroup``, for tensors on any device; a copy runs on the current
    stream, so that the order of kernels is kept.
    """

    def getBackendName(self) -> str:  # noqa: N802 (torch calls it so)
        """Return the name that the backend is registered with."""
        return BACKEND

    def barrier(self, opts: Any = None) -> dist.Work:
        """Return at once: there is no other process to wait for."""
        return _Done()

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        """Keep the tensors of the only source."""
        return _Done()

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        """Keep the tensors.

        Raises:
            NotImplementedError: for ``PREMUL_SUM``, which scales also the value of a single process.
        """
        operation = getattr(opts, "reduceOp", None)
        if operation is not None and operation == dist.ReduceOp.PREMUL_SUM:
            raise NotImplementedError("a group of one process has no PREMUL_SUM: scale the tensor, and sum it")
        return _Done()

    allreduce_coalesced = reduce = allreduce

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        """Copy each input to its list of one output."""
        return self._copy([output for (output,) in outputs], inputs)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        """Copy each input to its list of one output."""
        return self.allgather(outputs, inputs)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> dist.Work:
        """Copy the one input of each list to its output."""
        return self._copy(outputs, [value for (value,) in inputs])

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> dist.Work:
        """Copy the one input of each list to its output."""
        self.allreduce(outputs, opts)
        return self.scatter(outputs, inputs)

    def all_gather_single(self, output: Tensor, value: Tensor, opts: Any = None) -> dist.Work:
        """Copy the input to the output."""
        return self._copy([output], [value])

    def reduce_scatter_single(self, output: Tensor, value: Tensor, opts: Any = None) -> dist.Work:
        """Copy the input to the output."""
        self.allreduce([output], opts)
        return self._copy([output], [value])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        """Copy each input to its output."""
        return self._copy(outputs, inputs)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        """Copy each input to its output."""
        self.allreduce(outputs, opts)
        return self._copy(outputs, inputs)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        """Copy each input to its output."""
        return self._copy(outputs, inputs)

    def alltoall_base(
        self, output: Tensor, value: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> dist.Work:
        """Copy the input to the output."""
        return self._copy([output], [value])

    all_to_all_single = alltoall_base

    def shutdown(self) -> None:
        """Do nothing: the group has no thread and no connection."""

    abort = shutdown

    @staticmethod
    @torch.no_grad()
    def _copy(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> dist.Work:
        for output, value in zip(outputs, inputs, strict=True):
            output.copy_(value.view_as(output))  # Megatron gathers in place: then it is one tensor, and stays
        return _Done()


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> OneProcessGroup:
    """Make a group; torch calls it."""
    if size != 1:
        raise ValueError(f"the backend {BACKEND} serves one process, not {size}: start the run with torchrun")
    return OneProcessGroup(rank, size)


def register_backend() -> None:
    """Make ``torch.distributed`` know the backend. Safe to call again."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])


def new_world() -> None:
    """Start ``torch.distributed`` for this process alone, without a port or a variable of the environment."""
    register_backend()
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
