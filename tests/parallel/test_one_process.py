# SPDX-License-Identifier: Apache-2.0
"""A run of one process has groups without threads, whose collectives do what gloo's do in one process."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.parallel import groups, one_process


def reduced(operation):
    def collective(value, group):
        dist.all_reduce(value, operation, group)
        return value

    return collective


def filled(collective, *shape):
    """A collective that writes into a tensor of its own."""

    def run(value, group):
        output = torch.full(shape, -1.0)
        collective(output, value, group=group)
        return output

    return run


def listed(collective):
    """A collective that writes into a list of tensors."""

    def run(value, group):
        outputs = [torch.full_like(value, -1)]
        collective(outputs, value, group)
        return outputs[0]

    return run


def in_place(value, group):
    """As Megatron's distributed optimizer gathers: the share is a part of the whole buffer."""
    dist.all_gather_into_tensor(value, value[:], group=group)
    return value


def coalesced(collective):
    """Collectives of Megatron's buckets, called together."""

    def run(value, group):
        outputs = [torch.full_like(value, -1) for _ in range(2)]
        with dist._coalescing_manager(group, async_ops=True) as work:
            for output in outputs:
                collective(output, value, group=group, async_op=True)
        work.wait()
        return torch.stack(outputs)

    return run


def of_objects(collective):
    def run(value, group):
        box = [None]
        collective(box, value.tolist(), group)
        return torch.tensor(box[0])

    return run


def box_of(value, group):
    box = [value.tolist()]
    dist.broadcast_object_list(box, 0, group)
    return torch.tensor(box[0])


OPERATIONS = ("SUM", "MAX", "MIN", "PRODUCT")
COLLECTIVES = {
    **{f"all_reduce {name}": reduced(getattr(dist.ReduceOp, name)) for name in OPERATIONS},
    "broadcast": lambda value, group: dist.broadcast(value, 0, group) or value,
    "reduce": lambda value, group: dist.reduce(value, 0, group=group) or value,
    "all_gather": listed(lambda outputs, value, group: dist.all_gather(outputs, value, group)),
    "gather": listed(lambda outputs, value, group: dist.gather(value, outputs, 0, group)),
    "scatter": filled(lambda output, value, group: dist.scatter(output, [value], 0, group), 2, 3),
    "reduce_scatter": filled(lambda output, value, group: dist.reduce_scatter(output, [value], group=group), 2, 3),
    "all_gather_into_tensor": filled(dist.all_gather_into_tensor, 2, 3),
    "all_gather_into_tensor in place": in_place,
    "reduce_scatter_tensor": filled(dist.reduce_scatter_tensor, 2, 3),
    "all_to_all_single": filled(dist.all_to_all_single, 2, 3),
    "coalesced all_gather": coalesced(dist.all_gather_into_tensor),
    "coalesced reduce_scatter": coalesced(dist.reduce_scatter_tensor),
    "all_gather_object": of_objects(dist.all_gather_object),
    "gather_object": of_objects(lambda box, value, group: dist.gather_object(value, box, 0, group)),
    "broadcast_object_list": box_of,
    "barrier": lambda value, group: dist.barrier(group) or value,
}


@pytest.fixture(scope="module")
def gloo():
    groups.initialize()
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_does_what_gloo_does_in_one_process(name, gloo):
    results = []
    for group in (gloo, groups.data_parallel_group()):
        value = torch.arange(6, dtype=torch.float32).view(2, 3) - 2
        results.append((COLLECTIVES[name](value, group), value))
    assert dist.get_backend(groups.data_parallel_group()) == one_process.BACKEND
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
    assert -1 in results[0][0] and not torch.equal(results[0][0], torch.full_like(results[0][0], -1))


def test_work_is_done_when_it_was_called():
    groups.initialize()
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work.wait() and work.is_completed() and work.is_success()


def test_what_is_not_an_identity_or_not_there_is_an_error():
    groups.initialize()
    group = groups.data_parallel_group()
    operation = dist._make_nccl_premul_sum(2.0)
    for collective in (
        lambda: dist.all_reduce(torch.ones(1), operation, group),
        lambda: dist.reduce_scatter_tensor(torch.ones(1), torch.ones(1), operation, group),
    ):
        with pytest.raises(NotImplementedError, match="scale the tensor"):
            collective()
    with pytest.raises(RuntimeError, match="No backend"):
        group.send([torch.ones(1)], 0, 0)
    with pytest.raises(ValueError, match="serves one process, not 2"):
        one_process._create(dist.HashStore(), 0, 2, None)


_COUNT = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist
from nemo_mtbi.parallel import groups

def threads():
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

if sys.argv[1] == "own":  # who starts torch.distributed before us
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before = threads()
groups.initialize()
groups.gather_objects("x")
backends = {dist.get_backend(groups.control_group(name)) for name in ("world", "replica", "tensor", "data")}
print(json.dumps([before, threads(), sorted(backends), dist.get_backend()]))
groups.shut_down()
groups.initialize()
"""


@pytest.mark.parametrize("started", ["alone", "own"])
def test_groups_of_one_process_start_no_thread(started):
    command = [sys.executable, "-c", _COUNT, started]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    before, after, backends, world = json.loads(result.stdout.splitlines()[-1])
    assert backends == [one_process.BACKEND]
    if started == "alone":
        assert world == one_process.BACKEND
        assert after == before
        assert not any("gloo" in name or "nccl" in name.lower() for name in after)
