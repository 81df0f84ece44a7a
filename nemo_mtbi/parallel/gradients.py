# SPDX-License-Identifier: Apache-2.0
"""Reduction, norm and clipping of gradients over all processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_mtbi.parallel import groups


def share_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Overwrite replicated parameters with those of the first tensor- and data-parallel process that holds them."""
    for parameter in parameters:
        for group in (groups.data_parallel_group(), groups.tensor_parallel_group()):
            shared = getattr(parameter, "tensor_model_parallel", False) and group is groups.tensor_parallel_group()
            if group.size() > 1 and not shared:
                dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the data-parallel processes, in one transfer for each dtype.

    They are sums and not means, since each loss is already divided by the global number of response tokens. A
    parameter that a step did not reach (cuts that were all left out, rows without speech) has a gradient of zero, in
    one process as in many: an optimizer passes over one of ``None``, and the layout must not decide which it is.

    What Megatron marks ``sequence_parallel`` has seen this process's positions only, and is summed over the
    tensor-parallel processes too.
    """
    gradients: list[Tensor] = []
    of_positions: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
        if getattr(parameter, "sequence_parallel", False):
            of_positions.append(parameter.grad)
    _sum(of_positions, groups.tensor_parallel_group())
    _sum(gradients, groups.data_parallel_group())


def _sum(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum gradients over a group, in place and in one transfer for each dtype."""
    if group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for members in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in members])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(members, flat.split([x.numel() for x in members]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Return the Euclidean norm of the gradients of a whole model replica: the same value on each of its processes.

    A parameter that tensor-parallel processes share counts with each share, one that each of them holds counts once.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        whole_here = getattr(parameter, "tensor_model_parallel", False) or groups.tensor_parallel_rank() == 0
        if parameter.grad is not None and whole_here:
            total += parameter.grad.double().square().sum()
    if groups.layout().model_parallel_size > 1:
        dist.all_reduce(total, group=groups.model_parallel_group())
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients so that their global ``norm`` is at most ``limit``, as torch's ``clip_grad_norm_`` does."""
    factor = clip_factor(norm, limit)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad))


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Return the factor that scales gradients of a global ``norm`` to at most ``limit``."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)
