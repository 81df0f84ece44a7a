# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups


def test_one_process_is_every_stage_and_every_rank():
    groups.initialize()
    groups.initialize()  # again: a notebook, a second model
    groups.initialize(ParallelConfig(1, 1))
    assert groups.is_first_stage() and groups.is_last_stage() and groups.is_reader()
    assert groups.tensor_parallel_group().size() == groups.pipeline_parallel_group().size() == 1
    assert (groups.data_parallel_rank(), groups.data_parallel_size()) == (0, 1)
    value = torch.tensor([2.0])
    for collective in (groups.data_parallel_sum, groups.pipeline_sum):
        assert collective(value) is value and value.item() == 2
    assert groups.pipeline_broadcast(value, -1) is value and value.item() == 2
    assert groups.broadcast_object("x") == "x" and groups.gather_objects("x") == ["x"]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2), (1, 2, 2)])
def test_another_layout_in_the_same_process_is_refused(sizes):
    groups.initialize()
    with pytest.raises(ValueError, match="one process serves one layout"):
        groups.initialize(ParallelConfig(*sizes))
    groups.initialize()


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(tensor_model_parallel_size=0), "tensor_model_parallel_size is 0; it must be at least 1"),
        (dict(pipeline_model_parallel_size=-1), "pipeline_model_parallel_size is -1"),
        (dict(virtual_pipeline_model_parallel_size=2), "both must be at least 2, or leave the former null"),
        (dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1), "both must be at least 2"),
        (dict(sequence_parallel=True), "sequence_parallel needs tensor_model_parallel_size of at least 2"),
    ],
)
def test_sizes_that_contradict_each_other(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**sizes)


@pytest.mark.parametrize(
    "layout, message",
    [
        (ParallelConfig(3), "8 attention heads, which 3"),
        (ParallelConfig(4), "2 query groups, which 4"),
        (ParallelConfig(2), "51 feed-forward channels, which 2"),
        (ParallelConfig(1, 4), "6 layers, which 4 pipeline stages of 1 runs"),
        (ParallelConfig(1, 3, 4), "6 layers, which 3 pipeline stages of 4 runs"),
    ],
)
def test_an_llm_that_can_not_be_split(layout, message):
    with pytest.raises(ValueError, match=message):
        layout.check_architecture(num_layers=6, num_attention_heads=8, num_query_groups=2, ffn=51)


def two_processes(tensor, pipeline):
    """Worker: one way to lay out two processes."""
    tensor, pipeline = int(tensor), int(pipeline)
    config = ParallelConfig(tensor, pipeline)
    for _ in range(2):
        assert groups.initialize(config) == groups.initialize() == groups.layout() == config
    rank, data = dist.get_rank(), 2 // (tensor * pipeline)
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
    assert groups.tensor_parallel_group().size() == tensor
    assert groups.is_first_stage() == (pipeline == 1 or rank == 0)
    assert groups.is_last_stage() == (pipeline == 1 or rank == 1)
    assert groups.is_reader() == (data == 2 or rank == 0)
    assert (groups.data_parallel_size(), groups.data_parallel_rank()) == (data, rank if data == 2 else 0)
    value = torch.tensor([rank + 1.0, 1.0])
    assert groups.data_parallel_sum(value) is value
    assert value.tolist() == ([3.0, 2.0] if data == 2 else [rank + 1.0, 1.0])
    value = torch.tensor([float(rank)])
    assert groups.pipeline_sum(value).item() == (1.0 if pipeline == 2 else rank)
    value = torch.tensor([float(rank)])
    assert groups.pipeline_broadcast(value, -1).item() == (1.0 if pipeline == 2 else rank)
    assert groups.broadcast_object(rank) == (rank if data == 2 else 0)
    assert groups.gather_objects(rank) == [0, 1]
    assert groups.gather_objects(rank, "replica") == ([rank] if data == 2 else [0, 1])
    assert groups.gather_objects(rank, "data") == ([0, 1] if data == 2 else [rank])


def indivisible(tensor, pipeline):
    """Worker: a layout for another number of processes."""
    with pytest.raises(ValueError, match="2 processes do not divide by tensor x pipeline"):
        groups.initialize(ParallelConfig(int(tensor), int(pipeline)))


def virtual_stages():
    """Worker: with virtual stages the first run of the first process embeds, the last of the last has the head."""
    groups.initialize(ParallelConfig(1, 2, 2))
    rank = dist.get_rank()
    assert [groups.is_first_stage(chunk) for chunk in (0, 1)] == [rank == 0, False]
    assert [groups.is_last_stage(chunk) for chunk in (0, 1)] == [False, rank == 1]
    assert groups.is_last_stage() == (rank == 1)


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 1), (1, 2)])
def test_two_processes(tensor, pipeline, processes):
    processes(two_processes, tensor, pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("tensor, pipeline", [(3, 1), (2, 2)])
def test_a_layout_for_another_number_of_processes_is_refused(tensor, pipeline, processes):
    processes(indivisible, tensor, pipeline)


@pytest.mark.slow
def test_virtual_stages(processes):
    processes(virtual_stages)


def test_megatrons_random_states_are_there_before_a_model(monkeypatch):
    """On CUDA it draws weights from them, and refuses to where they are missing."""
    from megatron.core import tensor_parallel

    seeds = []
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", seeds.append)
    torch.manual_seed(2**33 + 5)
    for available, expected in ((False, []), (True, [5])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        groups._seed_tracker()
        assert seeds == expected
