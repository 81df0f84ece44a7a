# SPDX-License-Identifier: Apache-2.0
"""Megatron's process groups. The only file that reads ``megatron.core.parallel_state``."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def initialize(tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
    """Starts ``torch.distributed`` (from torchrun's environment, or alone) and Megatron's groups. Safe to call again.

    Raises:
        ValueError: if the groups already exist with other sizes, or the world does not divide by TP x PP.
    """
    from megatron.core import parallel_state

    from nemo_mtbi.parallel.cpu import megatron_device

    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        else:  # one process: no port, no environment
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if parallel_state.is_initialized():
        sizes = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if sizes != (tensor_parallel, pipeline_parallel):
            raise ValueError(
                f"Megatron's groups were started with TP x PP = {sizes}, now {(tensor_parallel, pipeline_parallel)} "
                "is wanted: one process serves one layout, start another process"
            )
        return
    if dist.get_world_size() % (tensor_parallel * pipeline_parallel):
        raise ValueError(
            f"a world of {dist.get_world_size()} does not divide by TP {tensor_parallel} x PP {pipeline_parallel}"
        )
    with megatron_device("cuda" if dist.get_backend() == "nccl" else "cpu"):
        parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)


def is_first_stage() -> bool:
    """Whether this rank embeds (pipeline stage 0)."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    """Whether this rank has the head and the loss (last pipeline stage)."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage()


def tensor_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def data_parallel_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def data_parallel_sum(value: Tensor) -> Tensor:
    """Sums ``value`` in place over the data-parallel ranks and returns it."""
    from megatron.core import parallel_state

    if data_parallel_size() > 1:
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value
