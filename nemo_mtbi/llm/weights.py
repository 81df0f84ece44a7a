# SPDX-License-Identifier: Apache-2.0
"""Weights of a text LLM under canonical names: one form for every layer spec and every parallel layout.

Canonical names are those of Megatron's own layer spec in a single process. Transformer Engine fuses norms into the
linear layer behind them, pipeline stages count their layers from zero, and tensor-parallel processes hold a share of
most tensors; all of that is undone here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig, check_layers, weight_shapes
from nemo_mtbi.llm.decoder import GPTDecoder, padded_vocabulary
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.rank_layout import stage_runs

# How tensor-parallel processes share a tensor: the axis, and how many parts of the tensor are each split along it
# (a gated feed-forward stores gate and value one behind the other). Other tensors are whole on every process.
_SHARED = {
    "embedding.word_embeddings.weight": (0, 1),
    "output_layer.weight": (0, 1),
    "self_attention.linear_qkv.weight": (0, 1),
    "self_attention.linear_qkv.bias": (0, 1),
    "self_attention.linear_proj.weight": (1, 1),
    "mlp.linear_fc1.weight": (0, 2),
    "mlp.linear_fc2.weight": (1, 1),
}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.\d+\.")


class WeightSource(Protocol):
    """Tensors by canonical name, of which parts can be read."""

    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return the part of a tensor between two positions of one of its first two axes."""


class MemoryWeights:
    """Weights in a mapping."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights

    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors."""
        return self._weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self._weights[name].shape)

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return the part of a tensor between two positions of one of its first two axes."""
        return self._weights[name].narrow(axis, start, stop - start)


class SafetensorsWeights:
    """Weights in a safetensors file, of which only the requested parts are read.

    Raises:
        ValueError: if the file is damaged.
    """

    def __init__(self, path: str | Path):
        try:
            self._file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; copy it again") from error

    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors."""
        return self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return the part of a tensor between two positions of one of its first two axes."""
        part = self._file.get_slice(name)
        return part[start:stop] if axis == 0 else part[:, start:stop]


def canonical_name(name: str) -> str:
    """Return the canonical name of a weight: Transformer Engine's spec keeps norms in the linear layer behind them."""
    return name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight").replace(
        "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
    )


def named_weights(decoder: GPTDecoder) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield canonical names, with layers counted over the whole pipeline, and this process's share of each weight.

    Adapters are not among them: see :mod:`nemo_mtbi.llm.lora`.
    """
    tied = decoder.share_embeddings_and_output_weights
    for name, value in decoder.named_parameters():
        if ".lora." in name:
            continue
        name = canonical_name(name)
        if tied and name == "output_layer.weight":  # the last stage's copy
            name = "embedding.word_embeddings.weight"
        yield _over_the_pipeline(decoder, name), value


def named_modules(decoder: GPTDecoder) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by name, with layers counted over the whole pipeline."""
    for name, module in decoder.named_modules():
        yield _over_the_pipeline(decoder, name), module


def _over_the_pipeline(decoder: GPTDecoder, name: str) -> str:
    layer = _LAYER.match(name)
    if not layer:
        return name
    number = decoder.decoder.layers[int(layer[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[layer.end() :]}"


def sharing_of(name: str) -> tuple[int, int] | None:
    """Return axis and number of parts that tensor-parallel processes share; ``None`` where each has the whole tensor.

    In an adapter, B is shared like the rows of the layer's weight, or A like its columns.
    """
    linear, _, part = name.partition(".lora.")
    if not part:
        return _SHARED.get(_EXPERT.sub("mlp.", _LAYER.sub("", name)))
    sharing = sharing_of(f"{linear}.weight")
    return sharing if sharing is not None and part == ("b" if sharing[0] == 0 else "a") else None


def load_weights(chunks: Sequence[GPTDecoder], source: WeightSource) -> None:
    """Copy this process's share of canonical weights into its runs of layers, in their dtype.

    Raises:
        ValueError: if names or shapes differ; nothing is copied then.
    """
    check_weights(chunks[0].architecture, source)
    load_shares((item for chunk in chunks for item in named_weights(chunk)), source)


def check_weights(architecture: DecoderConfig, source: WeightSource) -> None:
    """Compare names and shapes of stored weights with an architecture, before memory is allocated for it.

    Raises:
        ValueError: if names or shapes differ.
    """
    names = set(source.names())
    try:
        check_layers(architecture, len(names))
    except ValueError as error:
        raise ValueError(f"the LLM's weights do not fit its llm.yaml; {error}") from error
    shapes = weight_shapes(architecture)
    wrong = sorted(shapes.keys() ^ names)
    wrong = wrong or sorted(name for name, shape in shapes.items() if source.shape(name) != shape)
    if wrong:
        raise ValueError(
            f"the LLM's weights do not fit its llm.yaml; missing, unknown or misshapen: {', '.join(wrong[:5])}"
        )


@torch.no_grad()
def load_shares(owned: Iterable[tuple[str, Tensor]], source: WeightSource, prefix: str = "") -> None:
    """Copy this process's share of stored tensors, by name; names and shapes must be right.

    Args:
        owned: names that no layout changes, and the tensors to be filled.
        source: of the whole tensors.
        prefix: of their names in the source.
    """
    for name, value in owned:
        _copy_share(name, value, source, prefix)


def _copy_share(name: str, value: Tensor, source: WeightSource, prefix: str) -> None:
    """Fill ``value`` with this process's share."""
    sharing, name = sharing_of(name), prefix + name
    stored = source.shape(name)
    if sharing is None:
        value.copy_(source.rows(name, 0, 0, stored[0]))
        return
    axis, parts = sharing
    size, rank = groups.layout().tensor_model_parallel_size, groups.tensor_parallel_rank()
    share = value.shape[axis] // parts  # of each part
    value.zero_()  # rows that pad the vocabulary
    for part in range(parts):
        start = (part * size + rank) * share
        stop = min(start + share, stored[axis])
        if stop > start:
            value.narrow(axis, part * share, stop - start).copy_(source.rows(name, axis, start, stop))


def gather_weights(chunks: Sequence[GPTDecoder]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the canonical weights of the whole LLM: see :func:`gather_shares`."""
    owned = {name: value for chunk in chunks for name, value in named_weights(chunk)}
    return gather_shares(owned, chunks[0].architecture.vocab_size)


def gather_shares(owned: Mapping[str, Tensor], vocabulary: int) -> Iterator[tuple[str, Tensor | None]]:
    """Yield whole tensors, one at a time in the order of their names, on the first process of the first replica.

    Every process of that replica must take part; the others get ``None`` for each tensor. A tensor is dropped before
    the next one is gathered, so that memory stays at one whole tensor.

    Args:
        owned: this process's shares by names that no layout changes.
        vocabulary: tokens of the LLM, without those that pad it.
    """
    group = groups.control_group("replica")
    tensor_size = groups.layout().tensor_model_parallel_size
    specs = {name: (tuple(value.shape), value.dtype) for name, value in owned.items()}
    holders = groups.gather_objects(specs, "replica")
    for name in sorted({name for held in holders for name in held}):
        stage = next(rank for rank, held in enumerate(holders) if name in held)  # its first tensor-parallel process
        ranks = [stage + n for n in range(tensor_size)] if sharing_of(name) else [stage]
        shares = []
        for rank in ranks:
            shape, dtype = holders[rank][name]
            box = torch.empty(shape, dtype=dtype)
            if group.rank() == rank:
                box.copy_(owned[name].detach())
            if group.size() > 1:
                dist.broadcast(box, dist.get_global_rank(group, rank), group=group)
            shares.append(box)
        yield name, _join(name, shares, vocabulary) if group.rank() == 0 else None


def _join(name: str, shares: list[Tensor], vocabulary: int) -> Tensor:
    """Join shares in the order of tensor-parallel ranks, without padding of the vocabulary."""
    sharing = sharing_of(name)
    if sharing is None:
        return shares[0]
    axis, parts = sharing
    pieces = [share.chunk(parts, axis) for share in shares]
    whole = torch.cat([piece[part] for part in range(parts) for piece in pieces], axis)
    return whole.narrow(axis, 0, vocabulary) if name in VOCABULARY else whole


def stage_sizes(
    architecture: DecoderConfig, layout: ParallelConfig, stage: int, shapes: Mapping[str, tuple[int, ...]]
) -> list[int]:
    """Return the numbers of elements of weights or adapters on one process of a stage.

    Args:
        architecture: of the LLM.
        layout: that can split it.
        stage: of the pipeline.
        shapes: whole shapes by names that no layout changes; those that other stages hold are left out.
    """
    runs, tensor = stage_runs(layout, architecture.num_layers, stage), layout.tensor_model_parallel_size
    held = tuple(f"decoder.layers.{layer}." for run in runs for layer in run)
    first, last = stage == 0, stage == layout.pipeline_model_parallel_size - 1
    sizes = []
    for name, shape in shapes.items():
        here = name.startswith(held)
        here |= first and name == VOCABULARY[0] or last and name in ("decoder.final_layernorm.weight", VOCABULARY[1])
        here |= last and name == VOCABULARY[0] and architecture.tie_embeddings  # the copy that is the head
        if here:
            rows = padded_vocabulary(shape[0], tensor) if name in VOCABULARY else shape[0]
            sizes.append(math.prod((rows, *shape[1:])) // (tensor if sharing_of(name) else 1))
    return sizes
