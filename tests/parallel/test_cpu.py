# SPDX-License-Identifier: Apache-2.0
import threading

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import checkpoint, layers, random

from nemo_mtbi.parallel.cpu import megatron_device

NAMES = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (torch.Tensor, "cuda"),
    (schedules, "torch"),
    (random, "get_cuda_rng_tracker"),
    (layers, "get_cuda_rng_tracker"),
]


def found():
    return [getattr(target, name) for target, name in NAMES]


@pytest.fixture(autouse=True)
def untouched():
    """Whatever a test does, every patched name is afterwards what it was."""
    before = found()
    yield before
    assert all(now is then for now, then in zip(found(), before, strict=True))


def patched(before):
    return [now is not then for now, then in zip(found(), before, strict=True)]


def test_every_name_is_patched_inside_and_restored_outside(untouched):
    with megatron_device():
        assert all(patched(untouched))
    assert not any(patched(untouched))


def test_an_exception_restores_them(untouched):
    with pytest.raises(KeyError), megatron_device("cpu"):
        assert all(patched(untouched))
        raise KeyError
    assert not any(patched(untouched))


def test_an_inner_body_leaves_the_outer_one_patched(untouched):
    with megatron_device():
        with pytest.raises(KeyError), megatron_device():
            raise KeyError
        assert all(patched(untouched))
    with megatron_device():  # and it can be entered again
        assert all(patched(untouched))


def test_the_thread_that_leaves_last_restores_them(untouched):
    """Two requests of a server overlap: the second enters before, and leaves after, the first."""
    entered, leave = threading.Event(), threading.Event()
    inside = []

    def second():
        with megatron_device():
            entered.set()
            leave.wait(10)
            inside.append(all(patched(untouched)))

    thread = threading.Thread(target=second)
    with megatron_device():
        thread.start()
        assert entered.wait(10)  # it must not wait for the first either
    assert all(patched(untouched))
    leave.set()
    thread.join()
    assert inside == [True]


def test_on_cuda_nothing_is_patched(untouched):
    with megatron_device("cuda:0"):
        assert not any(patched(untouched))


def test_what_megatron_asks_of_cuda_is_answered_on_the_cpu():
    with megatron_device():
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        tensor = torch.ones(2)
        assert tensor.cuda() is tensor
        counter = schedules.torch.zeros([], dtype=torch.int, device="cuda")
        assert counter.device.type == "cpu" and counter.dtype == torch.int
        assert schedules.torch.tensor([3], device="cuda").tolist() == [3]
        assert schedules.torch.Tensor is torch.Tensor
        for module in (random, layers):
            with module.get_cuda_rng_tracker().fork():
                pass


def test_recomputation_draws_the_numbers_of_the_first_pass_again():
    def step(run):
        torch.manual_seed(0)
        x = torch.ones(1000, requires_grad=True)
        with megatron_device():
            y = run(torch.nn.Dropout(0.5), x)
            drawn = torch.rand(3)
            y.sum().backward()
        return x.grad, y.detach(), drawn, torch.rand(3)

    plain = step(lambda dropout, x: dropout(x))
    recomputed = step(lambda dropout, x: checkpoint(dropout, False, x))
    assert all(torch.equal(one, other) for one, other in zip(recomputed, plain, strict=True))
    assert torch.equal(plain[0], plain[1]) and 0 < plain[0].mean() < 2  # what was kept, twice as large


def test_a_literal_cuda_device_outside_megatron_means_what_it_says():
    with megatron_device():
        if torch.cuda.is_available():
            assert torch.zeros(1, device="cuda").is_cuda
        else:
            with pytest.raises((RuntimeError, AssertionError)):
                torch.zeros(1, device="cuda")
