# SPDX-License-Identifier: Apache-2.0
"""What adapters, or an LLM that trains itself, add to the memory of the processes of a layout."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.full_finetune import trained_names
from nemo_mtbi.llm.lora import LINEAR, adapter_parameters, targets
from nemo_mtbi.llm.weights import sharing_of, stage_sizes
from nemo_mtbi.parallel.rank_layout import stage_runs
from nemo_mtbi.planning.memory import Adapted, Learning


def adapted_memory(architecture: DecoderConfig, config: LoraConfig, layout: ParallelConfig) -> Adapted:
    """What adapters add to the memory of the processes of a layout."""
    stages = [
        [layer for run in stage_runs(layout, architecture.num_layers, stage) for layer in run]
        for stage in range(layout.pipeline_model_parallel_size)
    ]
    tensor = layout.tensor_model_parallel_size
    counts = tuple(adapter_parameters(architecture, config, tensor, held) for held in stages)
    return Adapted(counts, **kept_inputs(architecture, targets(architecture, config), config.rank))


def kept_inputs(architecture: DecoderConfig, linears: Iterable[str], rank: int = 0) -> dict[str, int]:
    """Channels that linear layers keep until backward which a frozen LLM would not, on average over all layers.

    Args:
        architecture: of the LLM.
        linears: names of the layers.
        rank: of their adapters.

    Returns:
        Keys of :class:`nemo_mtbi.planning.memory.Adapted`.
    """
    weights, layers = weight_shapes(architecture), architecture.num_layers
    by_column, by_row = {}, {}
    for name in linears:
        axis, _ = sharing_of(f"{name}.weight")
        (by_row if axis else by_column)[name] = weights[f"{name}.weight"][1]
    return dict(
        whole=-(-sum(by_column.values()) // layers),
        shared=-(-sum(by_row.values()) // layers),
        attended=-(-sum(width for name, width in by_row.items() if name.endswith(LINEAR[1])) // layers),
        gathered=-(-rank * len(by_column) // layers),
        scattered=-(-rank * len(by_row) // layers),
    )


LINEAR_WEIGHTS = tuple(f"{name}.weight" for name in LINEAR)


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
    held = [stage_sizes(architecture, layout, stage, names) for stage in stages]
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
