# SPDX-License-Identifier: Apache-2.0
"""Optimizer of a trainable LLM: Megatron's DDP and distributed Adam, its states sharded over replicas (ZeRO-1).

Gradients are kept in float32 and reduced once a step, after Megatron's schedule. Each replica updates its share of the
weights, in float32, and gives the others what has become of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_mtbi.compat.megatron import free_gradients, optimizer_shard
from nemo_mtbi.parallel.cpu import megatron_optimizer_device

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"  # weights in float32, where the LLM's are not


@dataclass(frozen=True)
class AdamOptions:
    """Options of Adam with decoupled weight decay (arXiv 1711.05101), in torch's terms; dtype of the weights."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    params_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Fragment:
    """One replica's shard of the optimizer's states for a weight.

    Attributes:
        name: of the weight.
        weight: this process's share of it.
        start: offset of the fragment in the flattened share.
        values: ``[n]`` each, by kind: a moment, or the weight in float32.
    """

    name: str
    weight: nn.Parameter
    start: int
    values: dict[str, Tensor]


class LlmOptimizer:
    """Gradients and updates of the weights of the LLM that train. All processes call its methods together.

    To be made when the weights are on their device and hold their first values: they are moved into one buffer.

    Args:
        chunks: this process's runs of layers; some may hold nothing that trains.
        weights: those that train here, by names that no layout changes.
        options: of Adam.
    """

    def __init__(self, chunks: Sequence[nn.Module], weights: Mapping[str, nn.Parameter], options: AdamOptions):
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.steps = 0
        self.base_lr = options.lr
        self._weights, self._device = dict(weights), next(chunks[0].parameters()).device
        sharing = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        config = OptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            weight_decay=options.weight_decay,
            adam_beta1=options.betas[0],
            adam_beta2=options.betas[1],
            adam_eps=options.eps,
            bf16=options.params_dtype == torch.bfloat16,
            params_dtype=options.params_dtype,
            use_distributed_optimizer=True,
            clip_grad=0.0,  # by the norm of all that trains: see scale()
        )
        with self._on_device():
            self._chunks = [DistributedDataParallel(chunk.config, sharing, chunk) for chunk in chunks]
            made = get_megatron_optimizer(config, self._chunks, config_overrides={}, use_gloo_process_groups=False)
        (self._optimizer,) = made.chained_optimizers  # a second one would be that of experts

    def _on_device(self):
        return megatron_optimizer_device(self._device)

    def zero_grad(self) -> None:
        """Zero the gradient buffers; call it before the schedule of a step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    def reduce(self) -> None:
        """Reduce the gradients: over replicas, over positions that processes share, over tied tables."""
        from megatron.core.distributed import finalize_model_grads

        with self._on_device():
            finalize_model_grads(self._chunks)
            self._optimizer.prepare_grads()

    def norm(self) -> Tensor:
        """Return the Euclidean norm of the gradients, equal on all processes; a weight held by several counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for gradient in self._optimizer.get_main_grads_for_grad_norm():
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        dist.all_reduce(total, group=self._optimizer.get_grad_stats_parallel_group())
        return total.sqrt()

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients by a factor, to clip them."""
        for value in self._optimizer.get_parameters():
            value.grad.mul_(factor.to(value.grad))

    def step(self, decay: float) -> None:
        """Update the weights.

        Args:
            decay: learning rate of this step, as a share of the base learning rate.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.base_lr * decay
        with self._on_device():
            self._optimizer.step_with_ready_grads()
        self.steps += 1

    def fragments(self, complete: bool = False) -> Iterator[Fragment]:
        """Yield this replica's shard of the optimizer's states.

        Args:
            complete: whether to create zero moments where there are none, before the first step.
        """
        for name, weight in self._weights.items():
            shard = optimizer_shard(self._optimizer, weight)
            if shard is None:
                continue
            main = shard.main
            state = self._optimizer.state[main] if complete else self._optimizer.state.get(main, {})
            if complete:
                for kind in MOMENTS:
                    state.setdefault(kind, torch.zeros_like(main.data))
            values = {kind: state[kind] for kind in MOMENTS if kind in state}
            if weight.dtype != main.dtype:
                values[MAIN] = main
            yield Fragment(name, weight, shard.start, values)

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Any] | None) -> None:
        """Load the optimizer's states of a checkpoint whose weights are loaded already.

        Args:
            stored: ``steps``, and ``values``: what :meth:`fragments` gives, by name and kind; ``None``: the moments
                begin anew.
        """
        with self._on_device():
            self._optimizer.reload_model_params()
        if stored is None:
            return
        self.steps = stored["steps"]
        if not self.steps:
            return
        for fragment in self.fragments(complete=True):
            for kind, value in fragment.values.items():
                value.copy_(stored["values"][fragment.name][kind])
        for group in self._optimizer.param_groups:
            if isinstance(self._optimizer.optimizer, torch.optim.AdamW):
                for main in group["params"]:
                    self._optimizer.state[main]["step"] = torch.tensor(float(self.steps))
            else:  # Apex and Transformer Engine count for all of a group
                group["step"] = self.steps

    def close(self) -> None:
        """Free the memory of gradients and moments; the weights stay where they are."""
        free_gradients(self._chunks)
        self._chunks, self._weights, self._optimizer = [], {}, None
