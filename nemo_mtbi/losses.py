# SPDX-License-Identifier: Apache-2.0
"""Losses over response tokens, as sums: the caller divides by the global number of tokens.

The vocabulary may be split over processes. What travels between them is one number for each token, or two: logits
never leave the process that made them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

COMPARED_AT_ONCE = 2**26  # logits that teacher and student are compared on: a quarter of a gigabyte in float32, each
DIVERGENCES = ("forward_kl", "reverse_kl", "js")


@dataclass(frozen=True)
class LossConfig:
    """What is minimized, for each response token: cross entropy, and the distance from the text twin.

    The text twin (the teacher) is the same frozen LLM that reads the transcript where the student hears the speech.

    Attributes:
        ce_weight: of the cross entropy with the response.
        kl_weight: of the divergence between teacher and student, over the whole vocabulary. 0: there is none.
        divergence: ``forward_kl``, KL(teacher || student); ``reverse_kl``, KL(student || teacher); ``js``, their
            Jensen-Shannon divergence, which is bounded by ln 2.
        temperature: both distributions are softened by it before they are compared.
        scale_by_temperature: multiply the divergence by the squared temperature, which keeps its gradient of about the
            same size whatever the temperature (Hinton et al. 2015, arXiv 1503.02531).
        hidden_weight: of the squared distance of the last hidden states, mean over channels. DiVA (arXiv 2410.02678)
            minimizes an L2 distance of hidden states in place of KL. 0: there is none.

    Raises:
        ValueError: if a value is out of range, or belongs to a part that has no weight.
    """

    ce_weight: float = 1.0
    kl_weight: float = 0.0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    scale_by_temperature: bool = True
    hidden_weight: float = 0.0

    def __post_init__(self):
        weights = {name: getattr(self, name) for name in ("ce_weight", "kl_weight", "hidden_weight")}
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"model.loss.{name} is {value}; it must be 0 or a positive number")
        if not any(weights.values()):
            raise ValueError(
                f"model.loss has nothing to learn from: give one of {', '.join(weights)} a weight above 0"
            )
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"model.loss.divergence is {self.divergence!r}; it must be {' or '.join(DIVERGENCES)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"model.loss.temperature is {self.temperature}; it must be a positive number")
        if not self.kl_weight:
            for name, default in (("divergence", DIVERGENCES[0]), ("temperature", 1.0)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"model.loss.{name} is {getattr(self, name)}, but model.loss.kl_weight is 0, so that nothing "
                        f"reads it: set kl_weight, or leave {name} at {default}"
                    )

    @property
    def uses_teacher(self) -> bool:
        """Whether the LLM also reads the text twins."""
        return self.kl_weight > 0 or self.hidden_weight > 0

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured apart from the loss itself; nothing where the loss is a cross entropy alone."""
        if not self.uses_teacher:
            return ()
        return ("ce", *(["kl"] if self.kl_weight else []), *(["hidden"] if self.hidden_weight else []))


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
    """Logarithms of the softmax over the whole vocabulary, of ``[n, V / tp]`` logits each."""
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
    """Summed divergence between what teacher and student predict in the place of each response token.

    Args:
        student: logits ``[n, V / tp]`` at the positions that predict a response token. Entries that only pad the
            vocabulary are ``-inf``.
        teacher: likewise, of the same tokens; gets no gradient.
        divergence, temperature, scale_by_temperature: see :class:`LossConfig`.
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
    """Summed over positions: the mean over channels of the squared difference of hidden states, both ``[n, H]``."""
    return (_wide(student) - _wide(teacher.detach())).square().mean(-1).sum()
