# SPDX-License-Identifier: Apache-2.0
"""Lightning's strategy for Megatron's groups: one model replica over several processes, replicas over the data."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from nemo.utils import AppState

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups


class MTBIStrategy(DDPStrategy):
    """Start Megatron's groups and leave gradients to the model, whose training step runs Megatron's schedule.

    A subclass of ``DDPStrategy``, which NeMo's ``exp_manager`` expects where there are several processes, but nothing
    is wrapped: ``DistributedDataParallel`` refuses processes without a trainable parameter, and it would average
    gradients that are sums already.

    Args:
        layout: of one model replica over processes.
        timeout: seconds after which a collective that another process does not join is an error; ``None``: torch's
            default.
        check: called when the processes are connected; see :func:`nemo_mtbi.parallel.groups.initialize`.
        **kwargs: of ``DDPStrategy``, such as ``checkpoint_io``.
    """

    def __init__(
        self,
        layout: ParallelConfig | None = None,
        timeout: float | None = None,
        check: Callable[[], None] | None = None,
        **kwargs: Any,
    ):
        limit = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        super().__init__(**limit, **kwargs)
        self.layout = layout or ParallelConfig()
        self._seconds, self._check = timeout, check
        self._started = False

    def start(self, trainer: Trainer) -> None:
        """Start all processes and their groups. To be called before the model is built: it is built in shares.

        ``trainer.fit`` does the same, but only when the model is there.
        """
        if not self._started:
            self.launcher.launch(lambda: None, trainer=trainer)
            self.setup_environment()

    def setup_environment(self) -> None:
        """Start this process's groups and fill NeMo's ``AppState``."""
        if self._started:
            return
        if self.num_nodes * self.num_processes == 1:
            groups.initialize(self.layout, self._seconds)  # before Lightning, which would open a port
        super().setup_environment()
        groups.initialize(self.layout, self._seconds, self._check)
        fill_app_state(self.layout, self.local_rank)
        self._started = True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Optimizers must exist before their state is read: it is stored by the names of weights."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write this process's share; Lightning would let the first process write all."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def configure_ddp(self) -> None:
        """Wrap nothing."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Number of replicas and rank among them, for a sampler that deals out the data."""
        return {"num_replicas": groups.data_parallel_size(), "rank": groups.data_parallel_rank()}

    def teardown(self) -> None:
        """Leave the model on its device, where all processes together still save it and generate with it."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def fill_app_state(layout: ParallelConfig, local_rank: int) -> None:
    """Write the position of this process to NeMo's ``AppState``, which saving, logging and checkpoint names read."""
    state = AppState()
    state.world_size, state.global_rank, state.local_rank = dist.get_world_size(), dist.get_rank(), local_rank
    state.model_parallel_size = layout.model_parallel_size
    state.tensor_model_parallel_size = layout.tensor_model_parallel_size
    state.pipeline_model_parallel_size = layout.pipeline_model_parallel_size
    state.virtual_pipeline_model_parallel_size = layout.virtual_pipeline_model_parallel_size
    state.data_parallel_size = groups.data_parallel_size()
    state.tensor_model_parallel_rank = groups.tensor_parallel_rank()
    state.pipeline_model_parallel_rank = groups.pipeline_parallel_rank()
    state.data_parallel_rank = groups.data_parallel_rank()
    state.tensor_model_parallel_group = groups.tensor_parallel_group()
    state.pipeline_model_parallel_group = groups.pipeline_parallel_group()
    state.data_parallel_group = groups.data_parallel_group()


def seed_processes() -> None:
    """Give each data-parallel replica its own random numbers, and all processes of a replica the same.

    They are the connector's, which is replicated over tensor-parallel processes. What those must draw apart from each
    other comes from Megatron's own states, which exist on CUDA only. The first replica keeps the seed of the run.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) + groups.data_parallel_rank()
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed % 2**31)
