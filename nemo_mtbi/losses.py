# SPDX-License-Identifier: Apache-2.0
"""Losses over response tokens, as sums: the caller divides by the global number of tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross entropy over logits whose vocabulary is split over a group; keeps the dtype of the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = logits.shape[-1]
        local = targets - dist.get_rank(group) * size
        owned = (local >= 0) & (local < size)
        local = local.where(owned, torch.zeros_like(local))
        top = logits.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - top[:, None]
        chosen = shifted.gather(1, local[:, None]).squeeze(1) * owned
        exponent = shifted.exp()
        total = exponent.sum(-1)
        both = torch.stack([chosen, total])
        dist.all_reduce(both, group=group)
        chosen, total = both
        ctx.save_for_backward(exponent / total[:, None], local, owned)
        return (total.log() - chosen).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, local, owned = ctx.saved_tensors
        one_hot = torch.zeros_like(probabilities).scatter_(1, local[:, None], owned[:, None].to(probabilities.dtype))
        return (probabilities - one_hot) * grad, None, None


def response_cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Summed cross entropy of response tokens.

    Args:
        logits: ``[n, V / tp]`` at the positions that predict a response token.
        targets: ``[n]`` token ids.
        group: tensor-parallel group over which the vocabulary is split; ``None`` if it is whole.

    Returns:
        A scalar sum, computed in float32 or better.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if group is None or group.size() == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    return _VocabParallelCrossEntropy.apply(logits, targets, group)
