# SPDX-License-Identifier: Apache-2.0
"""Internals of Megatron-core: its distributed optimizer, its checkpoints, and parts of its GPT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------- GPT


def define_optional_gemm() -> None:
    """Set ``te_general_gemm`` of Megatron's ``moe_utils`` to ``None`` where Transformer Engine is not installed.

    The router of experts compares the name with ``None``, but its module defines it only where the import succeeds. A
    definition in Megatron's ``except ImportError`` would replace it.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def scale_rotary_frequencies(rotary: Any, scaling: Mapping[str, float]) -> None:
    """Scale the frequencies of a rotary embedding as Llama 3.1 does.

    Uses ``RotaryEmbedding._apply_scaling``, all of whose numbers can be given: the public argument ``rope_scaling``
    passes only the factor on. Public arguments for the others would replace it.

    Args:
        rotary: Megatron's embedding, built without scaling.
        scaling: ``factor``, ``low_freq_factor``, ``high_freq_factor`` and ``original_max_position_embeddings``.
    """
    rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **scaling)


# ----------------------------------------------------------------------------------------------------------- optimizer


class Shard(NamedTuple):
    """A replica's shard of a weight in the distributed optimizer.

    Attributes:
        main: ``[n]``, the values that the optimizer updates, in float32; the key of their state.
        start: of the shard in the flattened weight.
    """

    main: Tensor
    start: int


def optimizer_shard(optimizer: Any, weight: nn.Parameter) -> Shard | None:
    """Return this replica's shard of a weight; ``None`` if it has none.

    Reads ``model_param_group_index_map`` of ``DistributedOptimizer`` and calls its ``_get_model_param_range_map``. The
    public ``sharded_state_dict`` gives the states for Megatron's own checkpoints, by its keys and parameter groups;
    ours hold them by the names of weights. A public map from weights to shards would replace it.
    """
    places = optimizer.model_param_group_index_map
    if weight not in places:
        return None
    group, number = places[weight]
    start = optimizer._get_model_param_range_map(weight)["param"].start
    return Shard(optimizer.param_groups[group]["params"][number], start)


def free_gradients(chunks: Iterable[Any]) -> None:
    """Free the gradient buffers of Megatron's ``DistributedDataParallel``, whose weights stay where they are.

    Clears ``grad_accs``, whose hooks hold all of it, and the attributes ``main_grad`` and ``main_param`` of the
    weights. Megatron has no public way to undo the wrapping; one would replace it.

    Args:
        chunks: the wrapped runs of layers.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        for value in chunk.params_with_grad:
            value.main_grad = None
            value.main_param = None


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_planner() -> Any:
    """Return Megatron's planner for writing a checkpoint in the format ``torch_dist``.

    Uses ``MCoreSavePlanner``, an undocumented class of ``dist_checkpointing.strategies.torch``. The public
    ``dist_checkpointing.save`` plans and writes in one call, by processes that it forks, and leaves the others in a
    collective if one can't write. A public planner would replace it.
    """
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner

    return MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)


def load_planner() -> Any:
    """Return Megatron's planner for reading such a checkpoint.

    Uses ``MCoreLoadPlanner``: the public ``dist_checkpointing.load`` unpickles what it finds.
    """
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    return MCoreLoadPlanner()


def torch_state_dict(sharded: Mapping[str, list], is_loading: bool = False) -> dict[str, Any]:
    """Return Megatron's sharded tensors as those of torch, which the planners take.

    Uses ``mcore_to_pyt_state_dict``, an undocumented function of ``dist_checkpointing.strategies.torch``.

    Args:
        sharded: key -> shards of this process.
        is_loading: whether their memory is to be filled.
    """
    from megatron.core.dist_checkpointing.strategies.torch import mcore_to_pyt_state_dict

    return mcore_to_pyt_state_dict(sharded, is_loading)
