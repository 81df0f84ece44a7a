# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.parallel import groups


def test_one_process_is_every_stage_and_every_rank():
    groups.initialize()
    groups.initialize()  # again: a notebook, a second model
    groups.initialize(1, 1)
    assert groups.is_first_stage() and groups.is_last_stage()
    assert groups.tensor_parallel_group().size() == 1
    assert (groups.data_parallel_rank(), groups.data_parallel_size()) == (0, 1)
    value = torch.tensor([2.0])
    assert groups.data_parallel_sum(value) is value and value.item() == 2


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_other_sizes_in_the_same_process_are_refused(sizes):
    groups.initialize()
    with pytest.raises(ValueError, match=r"TP x PP = \(1, 1\), now .* one process serves one layout"):
        groups.initialize(*sizes)
    groups.initialize()


def layouts():
    """Worker: the three ways to lay out two processes."""
    from megatron.core import parallel_state

    rank = None
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2)):
        groups.initialize(tensor, pipeline)
        groups.initialize(tensor, pipeline)
        rank = dist.get_rank()
        assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
        assert groups.tensor_parallel_group().size() == tensor
        assert groups.is_first_stage() == (pipeline == 1 or rank == 0)
        assert groups.is_last_stage() == (pipeline == 1 or rank == 1)
        data = 2 // (tensor * pipeline)
        assert (groups.data_parallel_size(), groups.data_parallel_rank()) == (data, rank if data == 2 else 0)
        value = torch.tensor([rank + 1.0, 1.0])
        assert groups.data_parallel_sum(value) is value
        assert value.tolist() == ([3.0, 2.0] if data == 2 else [rank + 1.0, 1.0])
        parallel_state.destroy_model_parallel()
    for sizes in ((3, 1), (2, 2)):
        with pytest.raises(ValueError, match="a world of 2 does not divide by TP"):
            groups.initialize(*sizes)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_in_three_layouts(torchrun):
    torchrun(layouts)
