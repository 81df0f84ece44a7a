# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's causal LLMs: their ``config.json`` as our architecture, their safetensors under canonical names.

One table maps each canonical tensor to those of Hugging Face; a part of it is read as parts of theirs, so that
each process reads its own share straight from the files.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.io.tensor_file import ArchiveError, StoredTensors, mismatches
from nemo_mtbi.io.text import read_json_object, read_text
from nemo_mtbi.llm.architecture import DecoderConfig, Llama3Scaling, check_layers, check_sizes, weight_shapes

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints hold
_COMPARED_ROWS = 4096  # at once

_EXPERT = re.compile(r"local_experts\.(\d+)\.")

_GLOBAL = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}
# Of one layer: name here to names there. Two are stacked; three are queries, keys and values, which Megatron keeps
# together for each group of queries.
_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}
_MLP = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
_EXPERTS = {
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
    ),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": ("mlp.experts.{expert}.down_proj.weight",),
}
# By ``model_type``: the tensors of a layer, and of each of its experts.
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": _LAYER,
    "mistral": _LAYER,
    "qwen2": _LAYER | _QKV_BIAS,
    "qwen3": _LAYER | _QK_NORM,
    "qwen3_moe": {name: theirs for name, theirs in _LAYER.items() if name not in _MLP} | _QK_NORM | _EXPERTS,
}


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Return the ``config.json`` of a directory.

    Args:
        path: of the directory, or of the file itself.

    Raises:
        ValueError: if it is missing, malformed, or of a family that is not in the table.
    """
    file = Path(path) if Path(path).is_file() else Path(path) / CONFIG
    try:
        config = read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{error}: give a directory with a Hugging Face causal LLM") from error
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{file}: model_type is {family!r}; supported are {', '.join(FAMILIES)}")
    return config


def read_end_tokens(folder: str | Path) -> tuple[int, ...]:
    """Return the ids at which the LLM of a directory ends an answer, by its configuration and that of its generation.

    Raises:
        ValueError: if a file of these is malformed; names it.
    """
    end_tokens: set[int] = set()
    for name in (CONFIG, GENERATION):
        file = Path(folder) / name
        if not file.is_file():
            continue
        try:
            content = json.loads(read_text(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} can't be read ({error}): copy it again") from error
        ids = content.get("eos_token_id") if isinstance(content, dict) else content
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(value) is int for value in ids):
            raise ValueError(f"{file}: eos_token_id is {ids!r}; it must be the id of a token, or a list of ids")
        end_tokens |= {value for value in ids if value >= 0}
    return tuple(sorted(end_tokens))


def architecture_of(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the architecture that a ``config.json`` describes.

    A sliding window shortens the longest sequence to the window: up to there it changes nothing.

    Raises:
        ValueError: if something in it can't be expressed; names all of it.
    """
    family = config["model_type"]
    rope = _rope(config)
    problems = [
        f"{key} is {config[key]!r}, and only {wanted!r} is supported"
        for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False))
        if config.get(key, wanted) != wanted
    ]
    if config.get("quantization_config"):
        problems.append("its weights are quantized: give those in 16 bits")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type is {kind!r}, and only 'default' and 'llama3' are supported")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        problems.append("partial_rotary_factor is set: only whole heads are rotated")
    experts = _experts(config) if "mlp.router.weight" in FAMILIES[family] else {}
    if experts and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        problems.append("some layers have no experts (decoder_sparse_step, mlp_only_layers): only all or none can")
    config = {**config, **experts}
    missing = [key for key in (*_SIZES, *experts) if type(config.get(key)) is not int or config[key] < 1]
    problems += [f"{key} is missing" if config.get(key) is None else f"{key} is {config[key]!r}" for key in missing]
    problems += [
        f"{key} is {config[key]!r}"
        for key in ("num_key_value_heads", "head_dim", "sliding_window")
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 0)
    ]
    theta = rope.get("rope_theta", config.get("rope_theta", 1.0))
    numbers = {"rope_theta": theta, "rms_norm_eps": config.get("rms_norm_eps", 1.0)}
    problems += [f"{key} is {value!r}" for key, value in numbers.items() if not isinstance(value, (int, float))]
    if problems:
        raise ValueError(f"this {family} LLM can't be expressed here: {'; '.join(problems)}")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return DecoderConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_sequence_length=min(config["max_position_embeddings"], _window(config)),
        kv_channels=config.get("head_dim") or hidden // heads,
        rotary_base=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_scaling=_llama3(rope) if kind == "llama3" else None,
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        qk_layernorm=_QK_NORM.keys() <= FAMILIES[family].keys(),
        add_qkv_bias=_QKV_BIAS.keys() <= FAMILIES[family].keys(),
        tie_embeddings=config.get("tie_word_embeddings", False),
        num_experts=config["num_experts"] if experts else None,
        experts_per_token=config["num_experts_per_tok"] if experts else 1,
        normalize_experts=bool(config.get("norm_topk_prob", False)) if experts else True,
    )


_SIZES: tuple[str, ...] = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_SIZES += ("max_position_embeddings",)


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes of a mixture of experts: ``num_local_experts`` (transformers 5) or ``num_experts`` (older)."""
    return {
        "num_experts": config.get("num_experts", config.get("num_local_experts")),
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "intermediate_size": config.get("moe_intermediate_size"),
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of rotary positions: ``rope_parameters`` (transformers 5) or ``rope_scaling`` (older)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{CONFIG} has {rope!r} in rope_parameters or rope_scaling: it must hold keys and values")
    return rope


def _llama3(rope: Mapping[str, Any]) -> Llama3Scaling:
    try:
        scaling = {name: rope[name] for name in Llama3Scaling.__dataclass_fields__}
        wrong = [name for name, value in scaling.items() if not isinstance(value, (int, float)) or not value > 0]
        if wrong:
            raise ValueError(f"the llama3 rope scaling has {scaling[wrong[0]]!r} in {wrong[0]}")
        return Llama3Scaling(**scaling)
    except KeyError as error:
        raise ValueError(
            f"the llama3 rope scaling lacks {error}: it needs {', '.join(Llama3Scaling.__dataclass_fields__)}"
        ) from None


def _window(config: Mapping[str, Any]) -> int:
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    return window if used and window else config["max_position_embeddings"]


# ------------------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class Segment:
    """Rows of a tensor of Hugging Face that are contiguous in a canonical one."""

    name: str
    start: int
    stop: int


def segments(name: str, architecture: DecoderConfig, family: str) -> list[Segment] | None:
    """Return the parts of a canonical tensor in the order of its rows; ``None`` if it is one of theirs unchanged.

    Args:
        name: canonical name.
        architecture: of the LLM.
        family: key of :data:`FAMILIES`.
    """
    theirs = theirs_of(name, family)
    if len(theirs) == 1:
        return None
    if len(theirs) == 2:
        return [Segment(part, 0, architecture.ffn_hidden_size) for part in theirs]
    query, key, value = theirs
    width, groups = architecture.head_channels, architecture.num_query_groups
    rows = architecture.num_attention_heads // groups * width  # queries of a group
    parts = []
    for group in range(groups):
        parts.append(Segment(query, group * rows, (group + 1) * rows))
        parts += [Segment(part, group * width, (group + 1) * width) for part in (key, value)]
    return parts


def theirs_of(name: str, family: str) -> tuple[str, ...]:
    """Return the names of the tensors that make up a canonical one."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    layers, number, rest = name.removeprefix("decoder.").split(".", 2)
    expert = _EXPERT.search(rest)
    rest = _EXPERT.sub("local_experts.{expert}.", rest)
    if layers != "layers" or rest not in FAMILIES[family]:
        raise KeyError(name)
    parts = (part.replace("{expert}", expert[1] if expert else "") for part in FAMILIES[family][rest])
    return tuple(f"model.layers.{number}.{part}" for part in parts)


def weight_files(path: str | Path) -> list[Path]:
    """Return the safetensors of a directory: one, or the shards that its index names.

    Raises:
        ValueError: if the index can't be read.
    """
    index = Path(path) / INDEX
    if not index.exists():
        return [Path(path) / SINGLE]
    try:
        names = read_json_object(index, limit=2**26)["weight_map"].values()
        wrong = [name for name in names if not isinstance(name, str) or PurePath(name).name != name]
        if wrong:
            raise ValueError(f"it names {wrong[0]!r}, which is not a file beside it")
        return [index.parent / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} can't be read ({error}): copy it again") from error


class HFWeights:
    """The weights of a Hugging Face directory under canonical names, read part by part.

    A :class:`nemo_mtbi.llm.weights.WeightSource`.

    Args:
        path: directory with ``config.json`` and safetensors, in one file or in shards.

    Raises:
        ValueError: if a file is missing or damaged, or tensors are missing, unknown or misshapen; names them.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        config = read_hf_config(path)
        self.family, self.architecture = config["model_type"], architecture_of(config)
        self._files = dict(self._open())  # not mapped into memory: the pages would count as this process's
        try:
            check_sizes(self.architecture)
            check_layers(self.architecture, len(self._files))
        except ValueError as error:
            raise ValueError(f"the weights in {self.path} do not fit its {CONFIG}: {error}") from error
        self._shapes = weight_shapes(self.architecture)
        self._check()

    def _open(self) -> Iterator[tuple[str, StoredTensors]]:
        """Yield every tensor's name with the open file that holds it."""
        for path in weight_files(self.path):
            try:
                stream = open(path, "rb")  # noqa: SIM115
                weakref.finalize(self, stream.close)
                file = StoredTensors(stream, str(path), 0, path.stat().st_size)
            except (OSError, ArchiveError) as error:
                raise ValueError(f"the weights in {self.path} can't be read ({error}): copy them again") from error
            yield from ((name, file) for name in file.names() if not name.endswith(_IGNORED))

    def _check(self) -> None:
        wanted = {theirs: shape for name in self._shapes for theirs, shape in self._wanted(name).items()}
        stored = {name: file.shape(name) for name, file in self._files.items()}
        if self.architecture.tie_embeddings:
            stored = {name: shape for name, shape in stored.items() if name not in _GLOBAL["output_layer.weight"]}
        wrong = mismatches(wanted, stored)
        if wrong:
            shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
            raise ValueError(f"the weights in {self.path} do not fit its {CONFIG}: {shown}")
        if self.architecture.tie_embeddings:
            self._check_tied()

    def _check_tied(self) -> None:
        """Refuse an output layer of its own beside a configuration that ties it to the embedding."""
        (head,), (embedding,) = (_GLOBAL[f"{name}.weight"] for name in ("output_layer", "embedding.word_embeddings"))
        if head not in self._files:
            return
        shape, place = self._files[embedding].shape(embedding), f"the weights in {self.path}"
        same = self._files[head].shape(head) == shape
        for start in range(0, shape[0] if same else 0, _COMPARED_ROWS):
            rows = (start, min(start + _COMPARED_ROWS, shape[0]))
            one, other = (self._files[name].rows(name, 0, *rows) for name in (head, embedding))
            same = same and torch.equal(one.float(), other.float())
        if not same:
            raise ValueError(
                f"{place} hold a {head} that is not {embedding}, though tie_word_embeddings is true in its {CONFIG}: "
                f"set it to false if the LLM has an output layer of its own, or remove {head}"
            )

    def _wanted(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the tensors that make up a canonical one."""
        parts = segments(name, self.architecture, self.family)
        if parts is None:
            return {theirs_of(name, self.family)[0]: self._shapes[name]}
        rows: dict[str, int] = {}
        for part in parts:
            rows[part.name] = max(rows.get(part.name, 0), part.stop)
        return {theirs: (count, *self._shapes[name][1:]) for theirs, count in rows.items()}

    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors."""
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._shapes[name]

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return the part of a tensor between two positions of one of its first two axes."""
        parts = segments(name, self.architecture, self.family)
        if parts is None:
            theirs = theirs_of(name, self.family)[0]
            return self._files[theirs].rows(theirs, axis, start, stop)
        if axis != 0:
            raise ValueError(f"{name} is made of several tensors, and is shared by its rows")
        pieces, first = [], 0
        for part in parts:
            size = part.stop - part.start
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                pieces.append(self._files[part.name].rows(part.name, 0, part.start + low, part.start + high))
            first += size
        return torch.cat(pieces)
