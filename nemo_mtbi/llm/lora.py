# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) in the frozen LLM, under tensor, sequence and pipeline parallelism.

An adapter adds ``scale · B A x`` to a linear layer's output of ``x``. Where the layer's output is shared by
tensor-parallel processes, B is shared as its rows are and A is whole on each; where its input is shared, A is shared
as its columns are and B is whole. Processes exchange ``rank`` channels only, so that adapters cost little transfer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from nemo_mtbi.config.freezing import matching
from nemo_mtbi.config.llm import LoraConfig
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.decoder import GPTDecoder
from nemo_mtbi.llm.weights import named_modules, sharing_of
from nemo_mtbi.parallel import groups

LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass
class LoraState:
    """Runtime state shared by all adapters of a run of layers.

    Attributes:
        config: the section ``model.lora``.
        active: ``False`` while the LLM runs without its adapters.
        merged: whether the adapters are added to the LLM's weights.
        speech: ``[T, R, 1]``, true where positions are speech, during a forward; ``None``: nowhere, or no forward.
    """

    config: LoraConfig
    active: bool = True
    merged: bool = False
    speech: Tensor | None = None

    @contextmanager
    def positions(self, speech: Tensor | None) -> Iterator[None]:
        """Mark the positions of speech for one forward; Megatron's layers have no argument that would carry them."""
        self.speech = speech
        try:
            yield
        finally:
            self.speech = None


def adapted_modules(architecture: DecoderConfig, config: LoraConfig) -> list[str]:
    """Return the names of the modules of the whole LLM that get an adapter.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    known = [f"decoder.layers.{n}.{name}" for n in range(architecture.num_layers) for name in LINEAR]
    matches = matching(config.target_modules, known, "model.lora.target_modules")
    for pattern, names in matches.items():
        if not names:
            raise ValueError(
                f"model.lora.target_modules has {pattern!r}, which matches no layer: names are like {known[0]}, and "
                f"the last parts are {', '.join(LINEAR)}"
            )
    chosen: set[str] = set().union(*matches.values())
    return [name for name in known if name in chosen]


def check_lora(architecture: DecoderConfig, config: LoraConfig, granularity: str | None) -> None:
    """Check whether an LLM can take adapters.

    Args:
        architecture: of the LLM.
        config: the section ``model.lora``.
        granularity: of recomputation.

    Raises:
        ValueError: if a pattern matches nothing, or experts; or if recomputation in backward would use the speech mask
            of another microbatch.
    """
    if config.speech_only and granularity == "full":
        raise ValueError(
            "model.lora.speech_only does not go with model.activations_checkpoint_granularity=full: choose selective"
        )
    if architecture.num_experts and any("mlp" in name for name in adapted_modules(architecture, config)):
        raise ValueError("model.lora.target_modules match experts, which take no adapters: name attention's layers")


def adapter_shapes(architecture: DecoderConfig, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all adapters of the whole LLM, in a single process."""
    weights = weight_shapes(architecture)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapted_modules(architecture, config):
        rows, columns = weights[f"{name}.weight"]
        shapes |= {f"{name}.lora.a": (config.rank, columns), f"{name}.lora.b": (rows, config.rank)}
    return shapes


class Lora(nn.Module):
    """The adapter of one linear layer of Megatron, or this process's share of it.

    The first weights depend on the seed and the name alone, and not on the layout.

    Args:
        linear: the layer.
        name: of it, with layers counted over the whole pipeline.
        state: of all adapters here.
    """

    def __init__(self, linear: ColumnParallelLinear | RowParallelLinear, name: str, state: LoraState):
        super().__init__()
        self._state, self._by_column = state, isinstance(linear, ColumnParallelLinear)
        rows, columns = linear.weight.shape
        shared = "b" if self._by_column else "a"
        size, rank = groups.layout().tensor_model_parallel_size, groups.tensor_parallel_rank()
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
        whole = columns if self._by_column else columns * size
        bound = 1 / math.sqrt(whole)  # that of nn.Linear
        first = torch.empty(state.config.rank, whole, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        first = first if self._by_column else first.chunk(size, 1)[rank]
        self.a = nn.Parameter(first.to(linear.weight.device, dtype))
        self.b = nn.Parameter(torch.zeros(rows, state.config.rank, dtype=dtype, device=linear.weight.device))
        sharing = sharing_of(f"{name}.lora.{shared}")
        if sharing is None:
            raise ValueError(f"{name} is whole on each tensor-parallel process: name another layer in target_modules")
        set_tensor_model_parallel_attributes(getattr(self, shared), True, *sharing)
        other: Any = self.a if self._by_column else self.b
        # each process computes its gradient from its own positions
        other.sequence_parallel = linear.sequence_parallel

    def forward(self, x: Tensor, split: bool) -> Tensor:
        """Return the addition to the layer's output.

        Args:
            x: the layer's input, ``[T, R, in]``: of this process's positions where ``split`` and the output is shared,
                of its channels where the input is.
            split: whether the layer works with sequence parallelism.
        """
        state = self._state
        h = F.linear(x, self.a.to(x.dtype))  # [T, R, rank]
        if self._by_column:
            h = gather_from_sequence_parallel_region(h) if split else copy_to_tensor_model_parallel_region(h)
        else:
            h = reduce_scatter_to_sequence_parallel_region(h) if split else reduce_from_tensor_model_parallel_region(h)
        if state.config.speech_only and state.speech is not None:
            speech = state.speech
            if split and not self._by_column:
                speech = speech.chunk(groups.layout().tensor_model_parallel_size)[groups.tensor_parallel_rank()]
            h = h * speech
        return F.linear(h, self.b.to(h.dtype)) * state.config.scale

    def delta(self) -> Tensor:
        """Return the adapter's addition to the layer's weight."""
        return self._state.config.scale * (self.b @ self.a)


def add_lora(chunks: Sequence[GPTDecoder], config: LoraConfig) -> None:
    """Put trainable adapters into frozen runs of layers; at first they add nothing.

    Raises:
        ValueError: as :func:`check_lora`.
    """
    check_lora(chunks[0].architecture, config, chunks[0].config.recompute_granularity)
    chosen = set(adapted_modules(chunks[0].architecture, config))
    for chunk in chunks:
        chunk.lora = state = LoraState(config)
        for name, module in list(named_modules(chunk)):
            if name in chosen:
                module.lora = Lora(module, name, state)
                module.register_forward_hook(_add)


def _add(linear: Any, inputs: tuple, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Add the adapter's output in a hook of the layer, which keeps its name and class."""
    state = linear.lora._state
    if not state.active or state.merged or (state.config.speech_only and state.speech is None):
        return outputs
    output, bias = outputs
    return output + linear.lora(inputs[0], linear.sequence_parallel), bias


def adapters(chunks: Sequence[GPTDecoder]) -> dict[str, nn.Parameter]:
    """Return this process's share of the adapters, by names that no layout changes."""
    return {
        f"{name}.{part}": value
        for chunk in chunks
        for name, module in named_modules(chunk)
        if isinstance(module, Lora)
        for part, value in module.named_parameters()
    }


def is_merged(chunks: Sequence[GPTDecoder]) -> bool:
    """Return whether the adapters are added to the LLM's weights."""
    return any(chunk.lora is not None and chunk.lora.merged for chunk in chunks)


@contextmanager
def without_lora(chunks: Sequence[GPTDecoder]) -> Iterator[None]:
    """Run the LLM without its adapters in the body.

    Raises:
        RuntimeError: if adapters are merged into its weights.
    """
    states = [chunk.lora for chunk in chunks if chunk.lora is not None]
    if is_merged(chunks):
        raise RuntimeError("the adapters are merged into the LLM's weights: unmerge them first")
    before = [state.active for state in states]
    for state in states:
        state.active = False
    try:
        yield
    finally:
        for state, active in zip(states, before, strict=True):
            state.active = active


@torch.no_grad()
def set_merged(chunks: Sequence[GPTDecoder], merged: bool) -> None:
    """Add the adapters to the LLM's weights, which is then as fast as without them, or take them out again.

    In 16 bits that rounds, and taking them out does not give back the very same bits.

    Raises:
        ValueError: for adapters that see speech only: the weights are the same for text.
    """
    for chunk in chunks:
        state = chunk.lora
        if state is None or state.merged == merged:
            continue
        if state.config.speech_only:
            raise ValueError("adapters with speech_only can't be merged: the LLM's weights serve text too")
        for module in chunk.modules():
            if isinstance(getattr(module, "lora", None), Lora):
                added = module.lora.delta()
                module.weight.copy_(module.weight.to(added.dtype) + (added if merged else -added))
        state.merged = merged
