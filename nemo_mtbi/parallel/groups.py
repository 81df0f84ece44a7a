# SPDX-License-Identifier: Apache-2.0
"""Megatron's process groups. The only file that reads ``megatron.core.parallel_state``."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import one_process, peers

_layout: ParallelConfig | None = None
_PATIENCE = timedelta(days=2)  # for work that one process does while the others wait; one that dies is noticed at once
_CONTROL_GROUPS = ("world", "replica", "tensor", "data", "patient", "patient_replica")
_control: dict[str, dist.ProcessGroup] = {}  # gloo groups for Python objects, apart from NCCL's


def initialize(
    layout: ParallelConfig | None = None, timeout: float | None = None, check: Callable[[], None] | None = None
) -> ParallelConfig:
    """Start ``torch.distributed`` (from torchrun's environment, or alone) and Megatron's groups. Safe to call again.

    Args:
        layout: parallel sizes of the model; ``None``: those in force, or a single process for each replica.
        timeout: seconds after which a collective that another process does not join is an error; torch's default.
        check: called when the processes are connected, before anything depends on their layout.

    Returns:
        The layout in force.

    Raises:
        ValueError: if the groups already exist with another layout, or the world does not divide by TP x PP.
    """
    global _layout
    from megatron.core import parallel_state

    from nemo_mtbi.parallel.cpu import megatron_device

    if parallel_state.is_initialized() and _layout is not None:
        if layout not in (None, _layout):
            raise ValueError(
                f"Megatron's groups were started as {_layout}, now {layout} is wanted: one process serves one layout, "
                "start another process"
            )
        if check is not None:
            check()
        return _layout
    layout = layout or ParallelConfig()
    limit = None if timeout is None else timedelta(seconds=timeout)
    if not dist.is_initialized():
        _start(limit)
    if "world" not in _control:
        _control["world"] = _new_control_group(limit)
        peers.remember(gather_objects(peers.Peer.here()))
    if check is not None:
        check()
    layout.replicas(dist.get_world_size())  # raises if they do not divide
    with megatron_device("cuda" if torch.cuda.is_available() else "cpu"):
        parallel_state.initialize_model_parallel(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,  # ours are below; each idle one has threads that poll
            **({} if timeout is None else {"distributed_timeout_minutes": timeout / 60}),
        )
    _start_control(limit)
    _seed_tracker()
    _layout = layout
    return layout


def _seed_tracker() -> None:
    """Seed the random states from which Megatron draws initial weights on CUDA; it builds no model without them.

    A run seeds them anew when it begins: see :func:`nemo_mtbi.parallel.strategy.seed_processes`.
    """
    if torch.cuda.is_available():
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)


def start_one_replica(tensor: int, pipeline: int, check: Callable[[], None] | None = None) -> None:
    """Start the groups for work that takes exactly one model replica.

    Args:
        tensor: tensor-parallel size.
        pipeline: pipeline-parallel size.
        check: see :func:`initialize`.

    Raises:
        ValueError: if more processes were started than one replica has, or the groups exist with another layout.
    """
    initialize(ParallelConfig(tensor, pipeline), check=check)
    if data_parallel_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes were started, but one replica of the model does this, with "
            f"tensor_model_parallel_size x pipeline_model_parallel_size = {tensor} x {pipeline} processes: start as "
            "many, and give other work to other runs"
        )


def _start(limit: timedelta | None) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        one_process.new_world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=limit)


def _new_control_group(limit: timedelta | None) -> dist.ProcessGroup:
    """Return a group of all processes on gloo, or one without threads where there is one process."""
    if dist.get_world_size() == 1:
        one_process.register_backend()  # who started torch.distributed may have chosen another backend
        return dist.new_group(backend=one_process.BACKEND)
    return dist.new_group(backend="gloo", timeout=limit)


def _start_control(limit: timedelta | None) -> None:
    """Create the control groups (headers, object lists, flags), on gloo so that none of it waits for the GPU."""
    from megatron.core import parallel_state

    if dist.get_world_size() == 1:
        _control.update(dict.fromkeys(_CONTROL_GROUPS, _control["world"]))
        return

    def mine(ranks: list[int], limit: timedelta | None = limit) -> dist.ProcessGroup:
        everyone: list[Any] = [None] * dist.get_world_size()  # of ranks
        dist.all_gather_object(everyone, ranks, group=_control["world"])
        made = {}
        for group in everyone:  # every process takes part in making every group, in the same order
            if tuple(group) not in made:
                made[tuple(group)] = dist.new_group(group, backend="gloo", timeout=limit)
        return made[tuple(ranks)]

    _control["patient"] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    replica = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    _control["replica"], _control["patient_replica"] = mine(replica), mine(replica, _PATIENCE)
    _control["tensor"] = mine(dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()))
    _control["data"] = mine(dist.get_process_group_ranks(parallel_state.get_data_parallel_group()))


def shut_down() -> None:
    """End Megatron's groups and ``torch.distributed``, so that this process can start another layout."""
    global _layout
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _control.clear()
    peers.remember([])
    _layout = None
    if "nemo.utils" in sys.modules:  # set by the strategy; NeMo would save a model of one process as a share
        from nemo.utils import AppState

        state = AppState()
        state.model_parallel_size = None
        state.tensor_model_parallel_group = state.pipeline_model_parallel_group = state.data_parallel_group = None
    gc.collect()  # a group that a cycle still holds keeps its threads, which poll a hundred times a second


def layout() -> ParallelConfig:
    """Return the parallel layout in force; that of a single process if none was started."""
    return _layout or ParallelConfig()


def control_group(name: str) -> dist.ProcessGroup:
    """Return a group for small CPU messages: ``world``, ``replica`` (TP x PP), ``tensor`` or ``data``."""
    return _control[name]


# ------------------------------------------------------------------------------------------------- where this rank is


def is_first_stage(chunk: int = 0) -> bool:
    """Return whether a model chunk of this process is the first of the pipeline, which embeds tokens."""
    from megatron.core import parallel_state

    return chunk == 0 and parallel_state.is_pipeline_first_stage()


def is_last_stage(chunk: int | None = None) -> bool:
    """Return whether a model chunk of this process (``None``: its last) has the head and the loss."""
    from megatron.core import parallel_state

    last = layout().chunks - 1
    return (last if chunk is None else chunk) == last and parallel_state.is_pipeline_last_stage()


def tensor_parallel_group() -> dist.ProcessGroup:
    """Return the group of processes that share each layer of a stage."""
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def pipeline_parallel_group() -> dist.ProcessGroup:
    """Return the group of processes that hold one replica's stages, in the order of the pipeline."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group()


def data_parallel_group() -> dist.ProcessGroup:
    """Return the group of processes that hold the same weights in different replicas."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def model_parallel_group() -> dist.ProcessGroup:
    """Return the group of the processes of one model replica: tensor x pipeline."""
    from megatron.core import parallel_state

    return parallel_state.get_model_parallel_group()


def tensor_parallel_rank() -> int:
    """Return this process's rank in its tensor-parallel group."""
    return tensor_parallel_group().rank()


def pipeline_parallel_rank() -> int:
    """Return the pipeline stage of this process, from 0."""
    return pipeline_parallel_group().rank()


def data_parallel_rank() -> int:
    """Return the number of this process's model replica, from 0."""
    return data_parallel_group().rank()


def data_parallel_size() -> int:
    """Return the number of model replicas."""
    return data_parallel_group().size()


def is_global_first() -> bool:
    """Return whether this is rank 0 of the world, which writes and prints for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_reader() -> bool:
    """Return whether this process is the first of its model replica, which reads the data and encodes speech."""
    return control_group("replica").rank() == 0


# ------------------------------------------------------------------------------------------------------- collectives


def data_parallel_sum(value: Tensor) -> Tensor:
    """Sum ``value`` in place over the data-parallel ranks and return it."""
    if data_parallel_size() > 1:
        dist.all_reduce(value, group=data_parallel_group())
    return value


def pipeline_sum(value: Tensor) -> Tensor:
    """Sum ``value`` in place over the stages and return it; a value that only one stage has reaches all of them."""
    if pipeline_parallel_group().size() > 1:
        dist.all_reduce(value, group=pipeline_parallel_group())
    return value


def pipeline_broadcast(value: Tensor, stage: int) -> Tensor:
    """Overwrite ``value`` in place with that of a stage (negative: from the end) and return it."""
    group = pipeline_parallel_group()
    if group.size() > 1:
        dist.broadcast(value, dist.get_global_rank(group, stage % group.size()), group=group)
    return value


def broadcast_object(value: Any, group: str = "replica") -> Any:
    """Return the value of the first process of a control group."""
    if control_group(group).size() == 1:
        return value
    box = [value]
    source = dist.get_global_rank(control_group(group), 0)
    dist.broadcast_object_list(box, src=source, group=control_group(group), device=torch.device("cpu"))
    return box[0]


@contextmanager
def first(mine: bool) -> Iterator[None]:
    """Let the processes where ``mine`` is true run the body first, and the others after they have finished.

    For files that one process builds and the others read. The wait is not bounded by the timeout of collectives.
    """
    if not mine:
        dist.barrier(_control["patient"])
    yield
    if mine:
        dist.barrier(_control["patient"])


def gather_objects(value: Any, group: str = "world") -> list[Any]:
    """Return the values of all processes of a control group, in the order of ranks."""
    everyone = [None] * control_group(group).size()
    dist.all_gather_object(everyone, value, group=control_group(group))
    return everyone
