# SPDX-License-Identifier: Apache-2.0
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.speech_llm.losses import response_cross_entropy


def data(n, vocabulary, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocabulary, (n,), generator=generator)


def dense(logits, targets):
    """Sum of -log p and its gradient, from the definition."""
    log_p = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    one_hot = F.one_hot(targets, logits.shape[-1])
    return -(log_p * one_hot).sum(), log_p.exp() - one_hot


def with_gradient(logits, targets, group=None):
    leaf = logits.clone().requires_grad_(True)
    loss = response_cross_entropy(leaf, targets, group)
    loss.backward()
    return loss.detach(), leaf.grad


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.integers(0, 99))
def test_it_is_the_summed_cross_entropy_and_its_gradient(n, vocabulary, seed):
    logits, targets = data(n, vocabulary, seed=seed)
    loss, gradient = with_gradient(logits, targets)
    wanted, wanted_gradient = dense(logits, targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    logits, targets = data(200, 50, dtype)
    loss, gradient = with_gradient(logits, targets)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    # from the same rounded logits: a sum over 200 rows in bfloat16 would be wrong in the third digit
    torch.testing.assert_close(loss.double(), dense(logits, targets)[0], rtol=1e-6, atol=0)


def test_no_response_token_gives_zero_with_a_gradient():
    loss, gradient = with_gradient(*data(0, 7))
    assert loss == 0
    assert gradient.shape == (0, 7)


def split_vocabulary():
    """Worker: the vocabulary split over the ranks gives the dense loss and each rank its slice of the gradient."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for n, vocabulary, shift in ((17, 12, 0.0), (1, 2, 0.0), (5, 40, 1e3), (0, 8, 0.0)):
        logits, targets = data(n, vocabulary)
        logits = logits + shift * torch.arange(vocabulary)  # one that overflows without the maximum over all ranks
        mine = slice(rank * vocabulary // world, (rank + 1) * vocabulary // world)
        loss, gradient = with_gradient(logits[:, mine].contiguous(), targets, group)
        wanted, wanted_gradient = dense(logits, targets)
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, wanted_gradient[:, mine], rtol=1e-12, atol=1e-12)
    logits, targets = data(9, 12, torch.bfloat16)
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    loss, gradient = with_gradient(logits[:, mine].contiguous(), targets, group)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), dense(logits, targets)[0], rtol=1e-6, atol=0)
    dist.destroy_process_group()


def test_a_vocabulary_split_over_two_ranks_gives_the_dense_loss_and_gradient(processes):
    processes(split_vocabulary)
