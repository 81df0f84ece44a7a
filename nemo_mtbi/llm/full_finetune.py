# SPDX-License-Identifier: Apache-2.0
"""Training of the LLM itself, wholly or in part, in the place of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nemo_mtbi.config.freezing import unfrozen
from nemo_mtbi.config.llm import LlmConfig
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.decoder import GPTDecoder
from nemo_mtbi.llm.weights import named_weights, sharing_of
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.llm_optimizer import AdamOptions, LlmOptimizer


def trained_names(architecture: DecoderConfig, config: LlmConfig | None, warn: bool = False) -> set[str]:
    """Canonical names of the weights of the LLM that train.

    Args:
        architecture: of the LLM.
        config: what is asked for.
        warn: of patterns that do nothing.

    Raises:
        ValueError: for an LLM with experts.
    """
    if config is None or not config.trains:
        return set()
    if architecture.num_experts:
        raise ValueError("model.llm.freeze must be true for an LLM with experts: it learns by model.lora only")
    return unfrozen(weight_shapes(architecture), config.freeze, "model.llm", warn)


def unfreeze(chunks: Sequence[GPTDecoder], config: LlmConfig | None) -> None:
    """Lets weights of frozen runs of layers train, and notes on them how processes share them.

    Raises:
        ValueError: as :func:`trained_names`.
    """
    architecture = chunks[0].architecture
    names, shapes = trained_names(architecture, config, warn=groups.is_global_first()), weight_shapes(architecture)
    for chunk in chunks:
        chunk.trained_names = frozenset(names)
    for name, value in trained_weights(chunks).items():
        value.requires_grad_()
        value.whole_shape = shapes[name]
        sharing = sharing_of(name)
        value.tensor_model_parallel = sharing is not None
        if sharing is not None:
            value.partition_dim, value.partition_stride = sharing


def trained_weights(chunks: Sequence[GPTDecoder]) -> dict[str, nn.Parameter]:
    """This process's share of the LLM's weights that train, by canonical names, and if NeMo's freeze() holds them."""
    return {name: value for chunk in chunks for name, value in named_weights(chunk) if name in chunk.trained_names}


def build_llm_optimizer(chunks: Sequence[GPTDecoder], config: LlmConfig, defaults: Mapping[str, Any]) -> LlmOptimizer:
    """The optimizer of the weights that train, whatever NeMo's freeze() and unfreeze() have made of them.

    Args:
        chunks: this process's runs of layers.
        config: what is asked for.
        defaults: of the connector's optimizer, in torch's terms.
    """
    for chunk in chunks:
        for name, value in named_weights(chunk):
            value.requires_grad_(name in chunk.trained_names)
    options = AdamOptions(
        lr=defaults["lr"] if config.lr is None else config.lr,
        betas=tuple(defaults["betas"]),
        eps=defaults["eps"],
        weight_decay=defaults["weight_decay"] if config.weight_decay is None else config.weight_decay,
    )
    return LlmOptimizer(chunks, trained_weights(chunks), options)
