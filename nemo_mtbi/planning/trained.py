# SPDX-License-Identifier: Apache-2.0
"""Memory that adapters, or weights of the LLM that train, add to the processes of a layout."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.full_finetune import trained_names
from nemo_mtbi.llm.lora import LINEAR, adapted_modules, adapter_shapes
from nemo_mtbi.llm.weights import sharing_of, stage_sizes
from nemo_mtbi.planning.memory import Adapted, Learning

LINEAR_WEIGHTS = tuple(f"{name}.weight" for name in LINEAR)


def adapted_memory(architecture: DecoderConfig, config: LoraConfig, layout: ParallelConfig) -> Adapted:
    """Return the memory of adapters on the processes of a layout."""
    shapes = adapter_shapes(architecture, config)
    stages = range(layout.pipeline_model_parallel_size)
    counts = tuple(sum(stage_sizes(architecture, layout, stage, shapes)) for stage in stages)
    return Adapted(counts, **kept_inputs(architecture, adapted_modules(architecture, config), config.rank))


def kept_inputs(architecture: DecoderConfig, linears: Iterable[str], rank: int = 0) -> dict[str, int]:
    """Return the channels that linear layers keep until backward beyond those of a frozen LLM.

    Args:
        architecture: of the LLM.
        linears: names of the layers.
        rank: of their adapters.

    Returns:
        Averages over all layers, by keys of :class:`nemo_mtbi.planning.memory.Adapted`.
    """
    weights, layers = weight_shapes(architecture), architecture.num_layers
    by_column: dict[str, int] = {}  # input channels of layers whose output is shared
    by_row: dict[str, int] = {}  # input channels of layers whose input is shared
    for name in linears:
        columns = weights[f"{name}.weight"][1]
        sharing = sharing_of(f"{name}.weight")
        if sharing is not None and sharing[0] == 1:
            by_row[name] = columns
        else:
            by_column[name] = columns
    return dict(
        whole=-(-sum(by_column.values()) // layers),
        shared=-(-sum(by_row.values()) // layers),
        attended=-(-sum(width for name, width in by_row.items() if name.endswith(LINEAR[1])) // layers),
        gathered=-(-rank * len(by_column) // layers),
        scattered=-(-rank * len(by_row) // layers),
    )


def trained_memory(
    architecture: DecoderConfig, config: LlmConfig | None, layout: ParallelConfig, replicas: int = 1
) -> tuple[Learning, Adapted] | None:
    """Return the weights of the LLM that train on one process of each stage, and what their layers keep.

    Args:
        architecture: of the LLM.
        config: the section ``model.llm``.
        layout: that can split the LLM.
        replicas: number of data-parallel processes.

    Returns:
        Trained weights, and the memory of their layers until backward; ``None`` if nothing of the LLM trains.
    """
    names = trained_names(architecture, config, warn=True)
    if not names:
        return None
    stages = range(layout.pipeline_model_parallel_size)
    shapes = {name: shape for name, shape in weight_shapes(architecture).items() if name in names}
    held = [stage_sizes(architecture, layout, stage, shapes) for stage in stages]
    linears = [name.removesuffix(".weight") for name in sorted(names) if name.endswith(LINEAR_WEIGHTS)]
    kept = {**kept_inputs(architecture, linears), **_kept_norms(architecture, names)}
    learning = Learning(tuple(map(sum, held)), tuple(max(sizes, default=0) for sizes in held), replicas)
    return learning, Adapted((0,) * len(held), **kept)


def _kept_norms(architecture: DecoderConfig, names: set[str]) -> dict[str, int]:
    """Return the channels that norms which train keep until backward, by keys of ``Adapted``."""
    sizes = {name: math.prod(shape) for name, shape in weight_shapes(architecture).items() if name in names}

    def mean(*ends: str, copies: int = 1) -> int:
        """Average over all layers; heads share the weights of their norm."""
        return -(-copies * sum(size for name, size in sizes.items() if name.endswith(ends)) // architecture.num_layers)

    queries = mean(".q_layernorm.weight", copies=architecture.num_attention_heads)
    return dict(
        normed=mean(".input_layernorm.weight", ".pre_mlp_layernorm.weight"),
        heads_normed=queries + mean(".k_layernorm.weight", copies=architecture.num_query_groups),
        final_normed=sizes.get("decoder.final_layernorm.weight", 0),
    )
