# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups


def start(tensor, pipeline):
    """Worker: the strategy starts all groups once, tells NeMo where it is, and gives replicas numbers of their own."""
    from lightning.pytorch import Trainer, seed_everything
    from nemo.utils import AppState

    from nemo_mtbi.parallel.strategy import MTBIStrategy, seed_processes

    layout = ParallelConfig(int(tensor), int(pipeline))
    strategy = MTBIStrategy(layout, timeout=60)
    trainer = Trainer(accelerator="cpu", devices=dist_world(), strategy=strategy, logger=False, barebones=True)
    seed_everything(5, verbose=False)
    strategy.start(trainer)
    strategy.start(trainer)
    assert groups.layout() == layout
    state = AppState()
    assert state.world_size == dist.get_world_size() and state.global_rank == dist.get_rank()
    assert state.model_parallel_size == layout.model_parallel_size
    assert (state.tensor_model_parallel_rank, state.pipeline_model_parallel_rank, state.data_parallel_rank) == (
        groups.tensor_parallel_rank(),
        groups.pipeline_parallel_rank(),
        groups.data_parallel_rank(),
    )
    assert strategy.distributed_sampler_kwargs == {
        "num_replicas": groups.data_parallel_size(),
        "rank": groups.data_parallel_rank(),
    }
    seed_processes()
    numbers = torch.rand(3).tolist()
    seed_processes()  # again, as for a second fit in the same process
    assert torch.rand(3).tolist() == numbers
    drawn = groups.gather_objects((groups.data_parallel_rank(), numbers))
    by_replica = {}
    for replica, numbers in drawn:
        assert by_replica.setdefault(replica, numbers) == numbers
    assert len({tuple(numbers) for numbers in by_replica.values()}) == groups.data_parallel_size()
    torch.manual_seed(5)
    assert torch.rand(3).tolist() == by_replica[0]


def dist_world():
    import os

    return int(os.environ["WORLD_SIZE"])


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline, count", [(1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)])
def test_the_strategy_starts_every_layout(tensor, pipeline, count, processes):
    processes(start, tensor, pipeline, count=count, timeout=120)
