# SPDX-License-Identifier: Apache-2.0
"""Export: weights under canonical names as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_mtbi.chat.template import end_of_text
from nemo_mtbi.io.atomic import building
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.convert.hf import INDEX, SINGLE, architecture_of, segments, theirs_of
from nemo_mtbi.llm.weights import WeightSource

SHARD_BYTES = 5 * 10**9
_CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}


@dataclass(frozen=True)
class Rows:
    """Rows of a canonical tensor that are contiguous in a tensor of Hugging Face."""

    name: str
    start: int
    stop: int


def rows_of_theirs(source: WeightSource, architecture: DecoderConfig, family: str) -> dict[str, list[Rows]]:
    """Return the parts of each of Hugging Face's tensors: the inverse of :func:`nemo_mtbi.llm.convert.hf.segments`."""
    pieces: dict[str, list[tuple[int, Rows]]] = {}
    for name in weight_shapes(architecture):
        parts = segments(name, architecture, family)
        if parts is None:
            pieces[theirs_of(name, family)[0]] = [(0, Rows(name, 0, source.shape(name)[0]))]
            continue
        position = 0
        for part in parts:
            size = part.stop - part.start
            pieces.setdefault(part.name, []).append((part.start, Rows(name, position, position + size)))
            position += size
    return {theirs: [rows for _, rows in sorted(parts, key=lambda p: p[0])] for theirs, parts in pieces.items()}


def config_of(architecture: DecoderConfig, tokenizer: Any) -> dict[str, Any]:
    """Return a ``config.json`` for an LLM, the inverse of :func:`nemo_mtbi.llm.convert.hf.architecture_of`.

    Args:
        architecture: of the LLM.
        tokenizer: its tokenizer, for the token that ends a text.

    Raises:
        ValueError: if no family of Hugging Face has such an architecture.
    """
    family = "qwen3" if architecture.qk_layernorm else "qwen2" if architecture.add_qkv_bias else "llama"
    scaling = architecture.rope_scaling
    config: dict[str, Any] = {
        "model_type": "qwen3_moe" if architecture.num_experts else family,
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.head_channels,
        "intermediate_size": architecture.ffn_hidden_size,
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_sequence_length,
        "rope_theta": architecture.rotary_base,
        "rms_norm_eps": architecture.layernorm_epsilon,
        "tie_word_embeddings": architecture.tie_embeddings,
        "hidden_act": "silu",
        "eos_token_id": next(iter(end_of_text(tokenizer)), None),
    }
    config["architectures"] = [f"{_CLASSES[config['model_type']]}ForCausalLM"]
    if scaling:
        config["rope_scaling"] = {"rope_type": "llama3", **asdict(scaling)}
    if architecture.num_experts:
        config |= {
            "num_experts": architecture.num_experts,
            "num_experts_per_tok": architecture.experts_per_token,
            "moe_intermediate_size": architecture.ffn_hidden_size,
            "norm_topk_prob": architecture.normalize_experts,
        }
    if architecture_of(config) != architecture:
        raise ValueError(
            "no family of Hugging Face has the architecture of this LLM: give a config.json that describes it with "
            f"--config (supported are {', '.join(_CLASSES)})"
        )
    return config


def write_hf(
    path: str | Path,
    source: WeightSource,
    architecture: DecoderConfig,
    family: str,
    others: Mapping[str, Path | bytes] | None = None,
    progress: Callable[[int], None] = lambda n: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory; one shard is in memory at a time.

    Args:
        path: a new folder; it stands there when it is whole.
        source: the weights, written in the dtype that they have.
        architecture: of the LLM.
        family: key of :data:`nemo_mtbi.llm.convert.hf.FAMILIES`.
        others: files that belong to it, such as ``config.json`` and those of the tokenizer, by name.
        progress: called with the bytes of each tensor.
        shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
        ValueError: if the folder is there.
    """
    with building(Path(path)) as staging:
        for name, content in (others or {}).items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        shards: list[list[str]] = []
        total = 0
        for tensors in _shards(source, rows_of_theirs(source, architecture, family), shard_bytes, progress):
            save_file(tensors, staging / f"{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(tensors))
            total += sum(value.nbytes for value in tensors.values())
            del tensors
        _name(staging, shards, total)


def _shards(
    source: WeightSource, rows: dict[str, list[Rows]], shard_bytes: int, progress: Callable[[int], None]
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    filled = 0
    for theirs, parts in rows.items():
        tensor = torch.cat([source.rows(part.name, 0, part.start, part.stop) for part in parts])
        if shard and filled + tensor.nbytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[theirs] = tensor
        filled += tensor.nbytes
        progress(tensor.nbytes)
    yield shard


def _name(folder: Path, shards: list[list[str]], total: int) -> None:
    """Rename the files as Hugging Face names them, and write the index."""
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)
    where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
