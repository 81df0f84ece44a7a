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
    """Starts ``torch.distributed`` (from torchrun's environment, or alone) and Megatron's groups. Safe to call again.

    Args:
        layout: of the model; ``None`` takes the one that is in force, or a single process for each replica.
        timeout: seconds after which a collective that another process does not join is an error; torch's default.
        check: called when the processes have found each other, before anything depends on their layout.

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
    """Gives Megatron the random states from which it draws first weights on CUDA: without them no model is built.

    A run seeds them anew when it begins: see :func:`nemo_mtbi.parallel.strategy.seed_processes`.
    """
    if torch.cuda.is_available():
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)


def start_one_replica(tensor: int, pipeline: int, check: Callable[[], None] | None = None) -> None:
    """Starts the groups for work that one model replica does alone.

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
        one_process.register()  # who started torch.distributed may have chosen another backend
        return dist.new_group(backend=one_process.BACKEND)
    return dist.new_group(backend="gloo", timeout=limit)


def _start_control(limit: timedelta | None) -> None:
    """Groups for headers, object lists and flags. They are on gloo, so that none of it waits for the GPU."""
    from megatron.core import parallel_state

    if dist.get_world_size() == 1:
        _control.update(dict.fromkeys(_CONTROL_GROUPS, _control["world"]))
        return

    def mine(ranks: list[int], limit: timedelta | None = limit) -> dist.ProcessGroup:
        everyone: list[list[int]] = [None] * dist.get_world_size()
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
    """Ends Megatron's groups and ``torch.distributed``, so that this process can start another layout."""
    global _layout
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _control.clear()
    peers.remember([])
    _layout = None
    if "nemo.utils" in sys.modules:  # what the strategy has told NeMo, which would not save models that are whole now
        from nemo.utils import AppState

        state = AppState()
        state.model_parallel_size = None
        state.tensor_model_parallel_group = state.pipeline_model_parallel_group = state.data_parallel_group = None
    gc.collect()  # a group that a cycle still holds keeps its threads, which poll a hundred times a second


def layout() -> ParallelConfig:
    """The layout in force; a single process if none was started."""
    return _layout or ParallelConfig()


def control_group(name: str) -> dist.ProcessGroup:
    """A gloo group for small CPU messages: ``world``, ``replica`` (TP x PP), ``tensor`` or ``data``."""
    return _control[name]


# ------------------------------------------------------------------------------------------------- where this rank is


def is_first_stage(chunk: int = 0) -> bool:
    """Whether a run of layers of this process embeds (first of the pipeline)."""
    from megatron.core import parallel_state

    return chunk == 0 and parallel_state.is_pipeline_first_stage()


def is_last_stage(chunk: int | None = None) -> bool:
    """Whether a run of layers of this process (``None``: its last) has the head and the loss."""
    from megatron.core import parallel_state

    last = layout().chunks - 1
    return (last if chunk is None else chunk) == last and parallel_state.is_pipeline_last_stage()


def tensor_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def pipeline_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_group()


def data_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def model_parallel_group() -> dist.ProcessGroup:
    """The processes of one replica: tensor x pipeline."""
    from megatron.core import parallel_state

    return parallel_state.get_model_parallel_group()


def tensor_parallel_rank() -> int:
    return tensor_parallel_group().rank()


def pipeline_parallel_rank() -> int:
    return pipeline_parallel_group().rank()


def data_parallel_rank() -> int:
    return data_parallel_group().rank()


def data_parallel_size() -> int:
    return data_parallel_group().size()


def is_global_first() -> bool:
    """Whether this is the process that writes and prints for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_reader() -> bool:
    """Whether this process reads the data of its model replica: the first of it, which also encodes speech."""
    return control_group("replica").rank() == 0


# ------------------------------------------------------------------------------------------------------- collectives


def data_parallel_sum(value: Tensor) -> Tensor:
    """Sums ``value`` in place over the data-parallel ranks and returns it."""
    if data_parallel_size() > 1:
        dist.all_reduce(value, group=data_parallel_group())
    return value


def pipeline_sum(value: Tensor) -> Tensor:
    """Sums ``value`` in place over the stages and returns it; what only one stage has reaches all of them."""
    if pipeline_parallel_group().size() > 1:
        dist.all_reduce(value, group=pipeline_parallel_group())
    return value


def pipeline_broadcast(value: Tensor, stage: int) -> Tensor:
    """Overwrites ``value`` in place with that of a stage (negative: from the end) and returns it."""
    group = pipeline_parallel_group()
    if group.size() > 1:
        dist.broadcast(value, dist.get_global_rank(group, stage % group.size()), group=group)
    return value


def broadcast_object(value: Any, group: str = "replica") -> Any:
    """What the first process of a control group has."""
    if control_group(group).size() == 1:
        return value
    box = [value]
    source = dist.get_global_rank(control_group(group), 0)
    dist.broadcast_object_list(box, src=source, group=control_group(group), device=torch.device("cpu"))
    return box[0]


@contextmanager
def first(mine: bool) -> Iterator[None]:
    """Lets the processes where ``mine`` is true run the body first, and the others after they have finished.

    For what is built once and then found on disk. It may take longer than a collective is waited for otherwise.
    """
    if not mine:
        dist.barrier(_control["patient"])
    yield
    if mine:
        dist.barrier(_control["patient"])


def gather_objects(value: Any, group: str = "world") -> list[Any]:
    """What each process of a control group has, in the order of ranks."""
    everyone = [None] * control_group(group).size()
    dist.all_gather_object(everyone, value, group=control_group(group))
    return everyone
