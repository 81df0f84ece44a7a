# SPDX-License-Identifier: Apache-2.0
"""Losses over response tokens, as sums: the caller divides by the global number of tokens.

The vocabulary may be split over processes. What travels between them is one number for each token, or two: logits
never leave the process that made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

COMPARED_AT_ONCE = 2**26  # logits that teacher and student are compared on: a quarter of a gigabyte in float32, each


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
    """Return summed cross entropy of response tokens.

    Args:
        logits: ``[n, V / tp]`` at the positions that predict a response token.
        targets: ``[n]`` token ids.
        group: tensor-parallel group over which the vocabulary is split; ``None`` if it is whole.

    Returns:
        A scalar sum, computed in float32 or better.
    """
    logits = _wide(logits)
    if group is None or group.size() == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    return _VocabParallelCrossEntropy.apply(logits, targets, group)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


# ------------------------------------------------------------------------------------------------------ the text twin


class _VocabParallelDivergence(torch.autograd.Function):
    """Divergence of two distributions over a vocabulary that may be split. Backward keeps ``[n, V / tp]``, once."""

    @staticmethod
    def forward(
        ctx, student: Tensor, teacher: Tensor, divergence: str, temperature: float, group: dist.ProcessGroup | None
    ) -> Tensor:
        log_q, log_p = _log_probabilities((student, teacher), temperature, group)
        q, p = log_q.exp(), log_p.exp()
        # 0 x log 0 = 0. An entry without probability on both sides only pads the vocabulary.
        if divergence == "forward_kl":
            ratio = (log_p - log_q).masked_fill_(log_p.isneginf(), 0)
            value = _reduced((p * ratio).sum(-1), group)
            gradient = q - p
        elif divergence == "reverse_kl":
            ratio = (log_q - log_p).masked_fill_(log_q.isneginf(), 0)
            value = _reduced((q * ratio).sum(-1), group)
            gradient = ratio.sub_(value[:, None]).mul_(q)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # of the mean of both
            of_teacher = (log_p - log_m).masked_fill_(log_p.isneginf(), 0)
            ratio = (log_q - log_m).masked_fill_(log_q.isneginf(), 0)
            both = _reduced(torch.stack([(p * of_teacher).sum(-1), (q * ratio).sum(-1)]), group)
            value = both.mean(0)
            gradient = ratio.sub_(both[1, :, None]).mul_(q).div_(2)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient.div_(temperature))
        return value.sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


def _log_probabilities(
    logits: Sequence[Tensor], temperature: float, group: dist.ProcessGroup | None
) -> Sequence[Tensor]:
    """Return logarithms of the softmax over the whole vocabulary, of ``[n, V / tp]`` logits each."""
    scaled = [values / temperature for values in logits]
    top = _reduced(torch.stack([values.amax(-1) for values in scaled]), group, dist.ReduceOp.MAX)
    scaled = [values.sub_(most[:, None]) for values, most in zip(scaled, top, strict=True)]
    total = _reduced(torch.stack([values.exp().sum(-1) for values in scaled]), group)
    return [values.sub_(sum_.log()[:, None]) for values, sum_ in zip(scaled, total, strict=True)]


def _reduced(values: Tensor, group: dist.ProcessGroup | None, operation=dist.ReduceOp.SUM) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op=operation, group=group)
    return values


def response_divergence(
    student: Tensor,
    teacher: Tensor,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_temperature: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the summed divergence between teacher and student at each response token.

    Args:
        student: logits ``[n, V / tp]`` at the positions that predict a response token. Entries that only pad the
            vocabulary are ``-inf``.
        teacher: likewise, of the same tokens; gets no gradient.
        divergence: ``forward_kl``, ``reverse_kl`` or ``js``: see :class:`nemo_mtbi.config.loss.LossConfig`.
        temperature: by which both distributions are softened.
        scale_by_temperature: whether the sum is multiplied by the squared temperature.
        group: tensor-parallel group over which the vocabulary is split; ``None`` if it is whole.

    Returns:
        A scalar sum, computed in float32 or better.

    Raises:
        ValueError: if the shapes differ: a position of one would be compared with another of the other.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher predict other tokens: their logits have the shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; select the positions of the same response tokens from both"
        )
    total = _VocabParallelDivergence.apply(_wide(student), _wide(teacher.detach()), divergence, temperature, group)
    return total * temperature**2 if scale_by_temperature else total


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference of hidden states, both ``[n, H]``: mean over channels, sum over positions."""
    return (_wide(student) - _wide(teacher.detach())).square().mean(-1).sum()
