# SPDX-License-Identifier: Apache-2.0
"""One reader for each replica: what all its processes get and agree on."""

import gc
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import replica_steps as common
import torch
import torch.distributed as dist
from matrix import with_core

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.replica import ReplicaLoader

Keys, Sized, plain, make_step = common.Keys, common.Sized, common.plain, common.make_step
check_equal, is_empty, on_all, start, run = (
    common.check_equal,
    common.is_empty,
    common.on_all,
    common.start,
    common.run,
)
ONLY_SKIPPED, ALL = common.ONLY_SKIPPED, pytest.mark.parametrize("name", with_core(common.LAYOUTS, ["dp2", "tp2_pp2"]))


# Steps -------------------------------------------------------------


def same_steps(name, workers):
    """Worker: three passes; the replicas have 4 and 6 steps, and only the first reader sees that."""
    rank, replicas = start(name)
    counts = [4 + 2 * replica for replica in range(replicas)]
    loader = ReplicaLoader.build(lambda: plain(rank, counts[rank], workers=int(workers)))
    with pytest.raises(TypeError, match="no known length"):
        len(loader)
    for epoch in range(3):
        if epoch == 1:  # Lightning says so; without it, passes are counted
            loader.sampler.set_epoch(1)
        steps = list(loader)
        assert on_all(len(steps)) == max(counts)
        for number, batch in enumerate(steps):
            if number < counts[rank]:
                check_equal(batch, make_step((rank, epoch, number)), audio=groups.is_first_stage())
            else:
                assert is_empty(batch)
        assert steps[ONLY_SKIPPED].skipped == {"silent": rank + 1}
    assert list(ReplicaLoader.build(lambda: plain(rank, 0))) == []


@pytest.mark.slow
@ALL
def test_every_process_of_a_replica_gets_the_steps_of_the_plain_loader(name, processes):
    run(processes, same_steps, name, 0)


@pytest.mark.slow
def test_readers_may_have_workers(processes):
    run(processes, same_steps, "tp2_dp2", 2)


class Collecting(torch.utils.data.Dataset):
    """Its workers collect garbage, as they may at any time."""

    def __getitem__(self, key):
        gc.collect()
        return make_step(key)


def groups_in_garbage():
    """Worker: process groups are garbage when the processes of the data loader are forked."""
    rank, _ = start("dp2")
    cycle = [dist.new_group(backend="gloo") for _ in range(4)]
    for group in cycle:
        dist.barrier(group=group)
    gc.collect()
    gc.disable()
    try:
        for group in cycle:
            dist.destroy_process_group(group)
        cycle.append(cycle)
        del cycle, group
        inner = torch.utils.data.DataLoader(Collecting(), sampler=Keys(rank, 2), batch_size=None, num_workers=1)
        assert len(list(ReplicaLoader.build(lambda: inner))) == 2
    finally:
        gc.enable()


@pytest.mark.slow
def test_workers_leave_the_garbage_of_their_reader_alone(processes):
    """A forked process that collects a process group waits for threads that it does not have, or crashes."""
    processes(groups_in_garbage, timeout=120)


def lengths(name):
    """Worker: a length is that of the longest replica, and is known where all readers know theirs."""
    rank, replicas = start(name)
    assert len(ReplicaLoader.build(lambda: plain(rank, 4 + 2 * rank, keys=Sized))) == 2 + 2 * replicas
    mixed = ReplicaLoader.build(lambda: plain(rank, 4, keys=Sized if rank == 0 else Keys))
    if replicas == 1:
        assert len(mixed) == 4
    else:
        with pytest.raises(TypeError, match="no known length"):
            len(mixed)
    wrong = plain() if groups.is_reader() and dist.get_rank() else None  # only the first process is wrong
    with pytest.raises(ValueError, match="where groups.is_reader"):
        ReplicaLoader(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2", "pp2"])
def test_a_length_is_agreed_on(name, processes):
    run(processes, lengths, name)


# Failures -------------------------------------------------------------


def failing(name, broken, fail_at, workers):
    """Worker: the reader of replica ``broken`` fails at a step, and all processes say so in that step."""
    rank, replicas = start(name)
    broken, fail_at, workers = int(broken) % replicas, int(fail_at), int(workers)
    loader = ReplicaLoader.build(lambda: plain(rank, 6, fail_at if rank == broken else None, workers))
    seen, began = 0, time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        for _ in loader:
            seen += 1
    assert on_all(seen) == fail_at and time.monotonic() - began < 30
    message = on_all(str(caught.value))
    assert message.startswith(f"reading data failed on data-parallel rank {broken}: KeyError: ")
    assert message.endswith(f"shard {broken} is broken: mend it'" if not workers else "is broken: mend it'")
    assert len(message.splitlines()) == 1
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError) if groups.is_reader() and rank == broken else cause is None


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("fail_at, workers", [(0, 0), (3, 0), (3, 1)])
def test_all_processes_raise_what_one_reader_raised(name, fail_at, workers, processes):
    run(processes, failing, name, -1, fail_at, workers)


def failing_together(name):
    """Worker: all readers fail alike, then each in its way, then one cannot even be built."""
    rank, replicas = start(name)
    ranks = ", ".join(map(str, range(replicas)))
    with pytest.raises(
        RuntimeError, match=rf"^reading data failed on data-parallel rank {ranks}: ValueError: no data$"
    ):
        ReplicaLoader.build(refuse)
    with pytest.raises(RuntimeError) as caught:
        list(ReplicaLoader.build(lambda: plain(rank, 6, 1)))
    assert on_all(str(caught.value)).splitlines() == [
        f"reading data failed on data-parallel rank {i}: KeyError: 'shard {i} is broken: mend it'"
        for i in range(replicas)
    ]
    last = replicas - 1
    with pytest.raises(RuntimeError, match=f"data-parallel rank {last}: ValueError: no data$") as caught:
        ReplicaLoader.build(refuse if rank == last else plain)
    assert isinstance(caught.value.__cause__, ValueError) == (groups.is_reader() and rank == last)


def refuse():
    raise ValueError("no data")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2_pp2", "pp2_dp2"])
def test_several_failures_and_failures_while_building(name, processes):
    run(processes, failing_together, name)


def stop_at(name, asked, step):
    """Worker: one process is asked to stop, and all hear of it with the same step."""
    rank, _ = start(name)
    asked, step, requests = int(asked) % dist.get_world_size(), int(step), Counter()

    def requested():
        requests["asked"] += 1
        return dist.get_rank() == asked and requests["asked"] > step

    for stop in (requested, requested if dist.get_rank() == asked else None):  # not all need to be able to
        requests.clear()
        loader = ReplicaLoader.build(lambda: plain(rank, 5), stop)
        assert loader.stop_requested is False
        assert on_all([loader.stop_requested for _ in loader]) == [False] * step + [True] * (5 - step)


@pytest.mark.slow
@ALL
def test_a_request_to_stop_reaches_all_in_the_same_step(name, processes):
    for asked, step in ((0, 1), (-1, 3)):
        run(processes, stop_at, name, asked, step)


# One process -------------------------------------------------------------


@pytest.fixture
def alone():
    groups.initialize()
    return lambda *args, limit=None, **kwargs: ReplicaLoader.build(lambda: plain(*args, **kwargs), limit=limit)


class Held(torch.utils.data.Dataset):
    def __init__(self, steps):
        self.steps = steps

    def __getitem__(self, key):
        return self.steps[key[2]]


def test_a_single_process_has_no_collective_and_no_copy(alone, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a collective")

    for name in ("all_reduce", "reduce", "broadcast", "broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(dist, name, forbidden)
    steps, answers = [make_step((0, 0, number)) for number in range(3)], [False, True, True, True]
    inner = torch.utils.data.DataLoader(Held(steps), sampler=Sized(0, 3), batch_size=None)
    loader = ReplicaLoader.build(lambda: inner, stop=lambda: answers.pop(0))
    assert len(loader) == 3
    found = [(id(batch), loader.stop_requested) for batch in loader]
    assert found == list(zip(map(id, steps), (False, True, True), strict=True))


def test_a_single_process_raises_what_its_reader_raises(alone):
    with pytest.raises(KeyError, match="shard 0 is broken"):
        list(alone(fail_at=1))
    with pytest.raises(ValueError, match="^no data$"):
        ReplicaLoader.build(refuse)


def test_workers_outlive_the_signals_that_stop_a_run(alone):
    """A terminal sends Ctrl-C to them too, and Slurm its warning."""
    others = set(multiprocessing.active_children())  # those of other tests
    steps = iter(ReplicaLoader.build(lambda: plain(0, 40, workers=1)))
    next(steps)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(steps)) == 39
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # they reach this process
