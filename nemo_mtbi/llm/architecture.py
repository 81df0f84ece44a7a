# SPDX-License-Identifier: Apache-2.0
"""Architecture of a text LLM: sizes, choices, names and shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1 and later: long wavelengths are stretched, for longer sequences.

    Attributes:
        factor: by which the longest wavelengths are stretched.
        low_freq_factor: wavelengths above the original length divided by it are stretched by ``factor``.
        high_freq_factor: wavelengths below the original length divided by it stay; those between stretch in part.
        original_max_position_embeddings: the original length, in positions.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass
class DecoderConfig:
    """Architecture of a Llama-like GPT (RoPE, RMSNorm, SwiGLU, grouped queries). Stored beside its weights.

    With ``num_experts`` each layer has as many feed-forward networks of ``ffn_hidden_size``, of which each position
    goes through ``experts_per_token``, weighted by the router's probabilities: over all experts, or with
    ``normalize_experts`` over those that were chosen.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    max_sequence_length: int
    kv_channels: int | None = None
    rotary_base: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    layernorm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    tie_embeddings: bool = True
    num_experts: int | None = None
    experts_per_token: int = 1
    normalize_experts: bool = True

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):  # as YAML has it
            self.rope_scaling = Llama3Scaling(**self.rope_scaling)
        elif not isinstance(self.rope_scaling, Llama3Scaling | None):
            raise TypeError(f"rope_scaling is {self.rope_scaling!r}; it must hold the keys of Llama3Scaling")

    @property
    def head_channels(self) -> int:
        """Channels of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


_LARGEST = 2**31  # of any size
_ABOVE_ZERO: tuple[str, ...] = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
)
_ABOVE_ZERO += ("vocab_size", "max_sequence_length", "kv_channels", "num_experts", "experts_per_token")


def check_sizes(config: DecoderConfig) -> None:
    """Refuse sizes that no LLM has, before anything is computed from them.

    Raises:
        ValueError: names the size.
    """
    for name in _ABOVE_ZERO:
        value = getattr(config, name)
        optional = DecoderConfig.__dataclass_fields__[name].default is None
        if not (type(value) is int and 0 < value < _LARGEST) and not (optional and value is None):
            raise ValueError(f"{name} is {str(value)[:50]}; it must be a whole number above 0")
    for name in ("rotary_base", "layernorm_epsilon"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {str(value)[:50]}; it must be a number above 0")
    if config.num_attention_heads % config.num_query_groups:
        raise ValueError(
            f"num_attention_heads is {config.num_attention_heads}; it must be a multiple of num_query_groups, "
            f"{config.num_query_groups}"
        )


def check_layers(config: DecoderConfig, tensors: int) -> None:
    """Refuse more layers and experts than there are weights: naming them all takes time and memory.

    Args:
        config: architecture of the LLM.
        tensors: number of stored weights.

    Raises:
        ValueError: if the weights can't be those of the architecture.
    """
    experts = config.num_experts or 1
    if config.num_layers * experts > tensors:
        shown = f"{config.num_layers} layers" + (f" of {experts} experts" if experts > 1 else "")
        raise ValueError(f"{shown} are described, but only {tensors} weights are stored")


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return canonical names and shapes of all weights of an LLM, in the order of its layers."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    width = config.head_channels * config.num_attention_heads
    qkv = width + 2 * config.head_channels * config.num_query_groups
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "self_attention.linear_proj.weight": (hidden, width),
        "pre_mlp_layernorm.weight": (hidden,),
    }
    if config.add_qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (qkv,)
    if config.qk_layernorm:
        layer |= {f"self_attention.{part}_layernorm.weight": (config.head_channels,) for part in "qk"}
    networks = ["mlp."]
    if config.num_experts:
        layer["mlp.router.weight"] = (config.num_experts, hidden)
        networks = [f"mlp.experts.local_experts.{expert}." for expert in range(config.num_experts)]
    for network in networks:  # gate and value stand one behind the other
        layer |= {f"{network}linear_fc1.weight": (2 * ffn, hidden), f"{network}linear_fc2.weight": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (config.vocab_size, hidden)}
    for number in range(config.num_layers):
        shapes |= {f"decoder.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    return shapes if config.tie_embeddings else {**shapes, "output_layer.weight": (config.vocab_size, hidden)}


def parameter_count(config: DecoderConfig) -> int:
    """Return the number of parameters of the whole LLM."""
    return sum(map(math.prod, weight_shapes(config).values()))
