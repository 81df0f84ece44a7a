# SPDX-License-Identifier: Apache-2.0
import pytest
import torch.distributed as dist

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.settings import check_same, flatten
from nemo_mtbi.parallel.strategy import MTBIStrategy


def test_nested_keys_have_dots():
    settings = {"seed": 1, "model": {"optim": {"lr": 0.1, "betas": [0.9, 0.98]}, "llm": None, "lora": {}}}
    assert flatten(settings) == {
        "seed": "1",
        "model.optim.lr": "0.1",
        "model.optim.betas": "[0.9, 0.98]",
        "model.llm": "null",
        "model.lora": "{}",
    }


def settings(rank, **changes):
    """Of a process; ``changes`` are those of the second one."""
    found = {"seed": 1, "model": {"optim": {"lr": 0.1}, "encoder_cache": f"/local/{rank}"}}
    return {**found, **changes} if rank else found


def compare():
    """Worker: what differs is found before the layouts, which differ too, make the processes wait for each other."""
    import os

    rank = int(os.environ["RANK"])
    own = settings(rank, seed=2, more=1)
    message = "different configurations: more is not set in process 0 and 1 in process 1; seed is 1 in process 0 and 2"
    with pytest.raises(ValueError, match=message):
        groups.initialize(ParallelConfig(1 + rank), 60, lambda: check_same(own))
    groups.initialize(ParallelConfig(2), 60, lambda: check_same(settings(rank)))
    assert dist.get_world_size() == groups.layout().model_parallel_size == 2
    with pytest.raises(ValueError, match=r"model is 3 in process 1|model\.optim\.lr is 0\.1 in process 0"):
        MTBIStrategy(ParallelConfig(2), 60, lambda: check_same(settings(rank, model=3)))._check()
    with pytest.raises(ValueError, match="more keys. Start all of them with the same command and the same files$"):
        groups.initialize(check=lambda: check_same({f"key{n}": rank for n in range(11)}))


@pytest.mark.slow
def test_processes_with_different_configurations_are_found(processes):
    processes(compare)
