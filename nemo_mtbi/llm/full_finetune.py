# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning: training of all or some weights of the LLM, instead of adapters."""

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
    """Return the canonical names of the LLM's weights that train.

    Args:
        architecture: of the LLM.
        config: the section ``model.llm``; ``None``: nothing trains.
        warn: whether to warn of patterns that match nothing.

    Raises:
        ValueError: for an LLM with experts.
    """
    if config is None or not config.trains:
        return set()
    if architecture.num_experts:
        raise ValueError("model.llm.freeze must be true for an LLM with experts: it trains by model.lora only")
    return unfrozen(weight_shapes(architecture), config.freeze, "model.llm", warn)


def unfreeze(chunks: Sequence[GPTDecoder], config: LlmConfig | None) -> None:
    """Make weights of frozen runs of layers trainable, and mark them with how processes share them.

    Raises:
        ValueError: as :func:`trained_names`.
    """
    architecture = chunks[0].architecture
    names, shapes = trained_names(architecture, config, warn=groups.is_global_first()), weight_shapes(architecture)
    for chunk in chunks:
        chunk.trained_names = frozenset(names)
    for name, value in trained_weights(chunks).items():
        value.requires_grad_()
        marked: Any = value  # Megatron's attributes of a parameter
        marked.whole_shape = shapes[name]
        sharing = sharing_of(name)
        marked.tensor_model_parallel = sharing is not None
        if sharing is not None:
            marked.partition_dim, marked.partition_stride = sharing


def trained_weights(chunks: Sequence[GPTDecoder]) -> dict[str, nn.Parameter]:
    """Return this process's share of the weights that train, by canonical names, also under NeMo's freeze()."""
    return {name: value for chunk in chunks for name, value in named_weights(chunk) if name in chunk.trained_names}


def build_llm_optimizer(
    chunks: Sequence[GPTDecoder], config: LlmConfig | None, defaults: Mapping[str, Any]
) -> LlmOptimizer:
    """Build the optimizer of the weights that train, whatever NeMo's freeze() and unfreeze() have done to them.

    Args:
        chunks: this process's runs of layers.
        config: the section ``model.llm``.
        defaults: settings of the connector's optimizer, by torch's names.

    Raises:
        ValueError: without the section ``model.llm``.
    """
    if config is None:
        raise ValueError("no weights of the LLM train: name them in model.llm")
    for chunk in chunks:
        for name, value in named_weights(chunk):
            value.requires_grad_(name in chunk.trained_names)
    options = AdamOptions(
        lr=defaults["lr"] if config.lr is None else config.lr,
        betas=tuple(defaults["betas"]),
        eps=defaults["eps"],
        weight_decay=defaults["weight_decay"] if config.weight_decay is None else config.weight_decay,
        params_dtype=chunks[0].config.params_dtype,
    )
    return LlmOptimizer(chunks, trained_weights(chunks), options)
