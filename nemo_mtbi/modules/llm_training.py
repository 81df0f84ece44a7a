# SPDX-License-Identifier: Apache-2.0
"""Training of the LLM itself, wholly or in part, in the place of adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nemo_mtbi.modules.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.modules.decoder import GPTDecoder
from nemo_mtbi.modules.freezing import check_freeze, unfrozen
from nemo_mtbi.modules.lora import LINEAR, kept_inputs
from nemo_mtbi.modules.weights import VOCABULARY, named_weights, sharing_of
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.groups import ParallelConfig
from nemo_mtbi.parallel.llm_optimizer import AdamOptions, LlmOptimizer
from nemo_mtbi.parallel.memory import Adapted, Learning
from nemo_mtbi.parallel.places import stage_runs

LINEAR_WEIGHTS = tuple(f"{name}.weight" for name in LINEAR)


@dataclass
class LlmConfig:
    """Whether the LLM itself trains; its optimizer is Megatron's distributed Adam, with the schedule of ``optim``.

    Attributes:
        freeze: ``true``: it stays what it is; ``false``: all of its weights train; or patterns
            (Python's ``re``) of the names that stay, such as ``embedding``, while the others train.
        lr: learning rate at the top of the schedule; ``null``: that of ``optim``.
        weight_decay: decoupled; ``null``: that of ``optim``.
    """

    freeze: Any = True
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        check_freeze(self.freeze, "model.llm")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"model.llm.lr is {self.lr}; it must be above 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"model.llm.weight_decay is {self.weight_decay}; it must be at least 0")

    @property
    def trains(self) -> bool:
        """Whether some of the LLM's weights may train."""
        return self.freeze is not True


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
        chunk.learned = frozenset(names)
    for name, value in trained_weights(chunks).items():
        value.requires_grad_()
        value.whole_shape = shapes[name]
        sharing = sharing_of(name)
        value.tensor_model_parallel = sharing is not None
        if sharing is not None:
            value.partition_dim, value.partition_stride = sharing


def trained_weights(chunks: Sequence[GPTDecoder]) -> dict[str, nn.Parameter]:
    """This process's share of the LLM's weights that train, by canonical names, and if NeMo's freeze() holds them."""
    return {name: value for chunk in chunks for name, value in named_weights(chunk) if name in chunk.learned}


def trained_memory(
    architecture: DecoderConfig, config: LlmConfig | None, layout: ParallelConfig, replicas: int = 1
) -> tuple[Learning, Adapted] | None:
    """What trains on one process of each stage of a layout, and what its layers keep until backward.

    Returns:
        What trains, and what of its layers is kept; ``None`` if nothing of the LLM trains.
    """
    names = trained_names(architecture, config, warn=True)
    if not names:
        return None
    stages = range(layout.pipeline_model_parallel_size)
    held = [_held(architecture, layout, stage, names) for stage in stages]
    linears = [name.removesuffix(".weight") for name in sorted(names) if name.endswith(LINEAR_WEIGHTS)]
    kept = {**kept_inputs(architecture, linears), **_kept_norms(architecture, names)}
    learning = Learning(tuple(map(sum, held)), tuple(max(sizes, default=0) for sizes in held), replicas)
    return learning, Adapted((0,) * len(held), **kept)


def _kept_norms(architecture: DecoderConfig, names: set[str]) -> dict[str, int]:
    """Channels that norms which train keep until backward, on average over all layers."""

    def mean(ends: tuple[str, ...], width: int) -> int:
        return -(-width * sum(name.endswith(ends) for name in names) // architecture.num_layers)

    heads = [(".q_layernorm.weight", architecture.num_attention_heads)]
    heads += [(".k_layernorm.weight", architecture.num_query_groups)]
    return dict(
        normed=mean((".input_layernorm.weight", ".pre_mlp_layernorm.weight"), architecture.hidden_size),
        heads_normed=sum(mean((end,), count * architecture.head_channels) for end, count in heads),
        final_normed=architecture.hidden_size if "decoder.final_layernorm.weight" in names else 0,
    )


def _held(architecture: DecoderConfig, layout: ParallelConfig, stage: int, names: set[str]) -> list[int]:
    """Sizes of some weights on one process of a stage."""
    runs, tensor = stage_runs(layout, architecture.num_layers, stage), layout.tensor_model_parallel_size
    held = tuple(f"decoder.layers.{layer}." for run in runs for layer in run)
    first, last = stage == 0, stage == layout.pipeline_model_parallel_size - 1
    sizes = []
    for name, shape in weight_shapes(architecture).items():
        here = name.startswith(held)
        here |= first and name == VOCABULARY[0] or last and name in ("decoder.final_layernorm.weight", VOCABULARY[1])
        here |= last and name == VOCABULARY[0] and architecture.tie_embeddings  # the copy that is the head
        if name in names and here:
            rows = -(-shape[0] // tensor) * tensor if name in VOCABULARY else shape[0]  # padded
            sizes.append(math.prod((rows, *shape[1:])) // (tensor if sharing_of(name) else 1))
    return sizes


def build_llm_optimizer(chunks: Sequence[GPTDecoder], config: LlmConfig, defaults: Mapping[str, Any]) -> LlmOptimizer:
    """The optimizer of the weights that train, whatever NeMo's freeze() and unfreeze() have made of them.

    Args:
        chunks: this process's runs of layers.
        config: what is asked for.
        defaults: of the connector's optimizer, in torch's terms.
    """
    for chunk in chunks:
        for name, value in named_weights(chunk):
            value.requires_grad_(name in chunk.learned)
    options = AdamOptions(
        lr=defaults["lr"] if config.lr is None else config.lr,
        betas=tuple(defaults["betas"]),
        eps=defaults["eps"],
        weight_decay=defaults["weight_decay"] if config.weight_decay is None else config.weight_decay,
    )
    return LlmOptimizer(chunks, trained_weights(chunks), options)
