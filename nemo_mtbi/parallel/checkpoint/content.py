# SPDX-License-Identifier: Apache-2.0
"""Content of a training checkpoint: Lightning's dictionary of each process, split for storage.

Weights, optimizer states and random states become sharded tensors. The rest is equal in all processes and is kept as
plain containers, so that nothing has to be unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import Container, OmegaConf
from torch import Tensor
from torch.optim import Optimizer

from nemo_mtbi.parallel.checkpoint.optimizer_state import group_options, parameter_names, state_shards
from nemo_mtbi.parallel.checkpoint.tensors import Place, fragments, llm_key, random_shard, weight_shards
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer

RANDOM_STATES = "random_states"  # key of what is loaded for random_states.restore()
LLM_OPTIMIZER = "llm_optimizer"  # key of what the optimizer of an LLM that trains goes on from
OPTIMIZER_GROUPS = "optimizer_groups"  # key of the options of parameter groups, in the file
# May differ between processes, as a timer does.
_OWN = ("callbacks", "loops")


def plain_copy(value: Any, where: str = "checkpoint") -> Any:
    """Return a copy made of dictionaries, lists, tuples, strings, numbers and CPU tensors only.

    Raises:
        ValueError: for anything else; names where it stands.
    """
    if isinstance(value, Container):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, bytes, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    for kind in (int, float, str):  # also subclasses, which would be stored by their class
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {plain_copy(key, f"key of {where}"): plain_copy(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_copy(item, f"{where}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise ValueError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint can hold: let the "
        "state_dict() or on_save_checkpoint() that returns it give numbers, strings, tensors, lists and dictionaries"
    )


def fingerprint(value: Any) -> str:
    """Hash of plain containers: equal for equal content."""
    return hashlib.sha256(repr(_ordered(value)).encode()).hexdigest()


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((repr(key), _ordered(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_ordered(item) for item in value]
    return (str(value.dtype), value.tolist()) if isinstance(value, Tensor) else value


def hashes(common: Mapping[str, Any]) -> dict[str, str | None]:
    """Return key -> hash of what must be equal in all processes; ``None`` where this one has nothing."""
    return {
        key: None if value is None or value in ({}, []) else fingerprint(value)
        for key, value in common.items()
        if key not in _OWN
    }


def check_equal(parts: Sequence[Mapping[str, Any]]) -> None:
    """Check that all processes would save the same.

    Args:
        parts: for each process, key -> hash of what it would save; ``None`` where it has nothing.

    Raises:
        RuntimeError: names what differs.
    """
    for key in sorted({key for part in parts for key in part}):
        values = {part[key] for part in parts if part.get(key) is not None}
        if len(values) > 1:
            raise RuntimeError(
                f"processes hold different values of {key!r}, of which only one can be saved: let "
                "on_save_checkpoint() give the same everywhere"
            )


def to_save(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    random: Mapping[str, Tensor],
    place: Place,
    llm: LlmOptimizer | None = None,
) -> tuple[dict[str, Any], list]:
    """Split Lightning's checkpoint of this process.

    Args:
        checkpoint: from Lightning.
        weights: what the model saves by name, the parameters themselves.
        optimizers: of this process.
        random: its random states.
        place: of this process.
        llm: the optimizer of the LLM, if that trains.

    Returns:
        What is equal in all processes, and this process's sharded tensors.

    Raises:
        ValueError: for what a checkpoint can't hold.
    """
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    # `hparams_type` is the class of what becomes a plain dictionary here
    common = plain_copy({key: value for key, value in rest.items() if not isinstance(value, type)})
    unknown = sorted(checkpoint["state_dict"].keys() - weights.keys())
    if unknown:
        raise ValueError(f"weights that the model's state_dict(keep_vars=True) leaves out: {', '.join(unknown[:5])}")
    tensors = [
        shard
        for name, value in checkpoint["state_dict"].items()
        for shard in weight_shards(name, value, weights[name], place)
    ]
    tensors += [random_shard(name, state, place) for name, state in random.items()]
    if "optimizer_states" in checkpoint:
        states, common[OPTIMIZER_GROUPS] = checkpoint["optimizer_states"], []
        if len(states) != len(optimizers):
            raise ValueError(f"{len(states)} optimizer states for {len(optimizers)} optimizers: save within the fit")
        for number, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
            names = parameter_names(optimizer, weights)
            tensors += state_shards(number, state["state"], names, weights, place)
            common[OPTIMIZER_GROUPS].append(plain_copy([group_options(group) for group in state["param_groups"]]))
        if llm is not None:
            common[LLM_OPTIMIZER] = {"steps": llm.steps}
            for one in llm.fragments():
                for kind, value in one.values.items():
                    tensors += fragments(llm_key(kind, one.name), value.detach(), one.start, one.weight, place)
    return common, tensors
