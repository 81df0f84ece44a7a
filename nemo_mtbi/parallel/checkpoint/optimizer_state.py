# SPDX-License-Identifier: Apache-2.0
"""Optimizer states of a checkpoint: by the names of parameters, whose numbers differ from process to process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.optim import Optimizer

from nemo_mtbi.parallel.checkpoint.tensors import Place, partition, shards

_TENSOR, _NUMBER = "optimizer.", "optimizer_number."
_NUMBER_TYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}
_PARAMETERS = ("params", "param_names")  # of a parameter group


def parameter_names(optimizer: Optimizer, weights: Mapping[str, Tensor]) -> list[str]:
    """Return names of the parameters in the order in which the optimizer's state dictionary numbers them.

    Args:
        optimizer: of this process.
        weights: its parameters by name, the objects themselves.

    Raises:
        ValueError: if the optimizer trains a parameter that has no name.
    """
    names = {id(value): name for name, value in weights.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unknown = [tuple(parameter.shape) for parameter in order if id(parameter) not in names]
    if unknown:
        raise ValueError(
            f"the optimizer trains parameters of shapes {unknown[:5]} that the model's state_dict() leaves out, so "
            "their state has no name: let the model's state_dict() hold them or freeze them"
        )
    return [names[id(parameter)] for parameter in order]


def state_shards(
    number: int,
    state: Mapping[int, Mapping[str, Any]],
    names: Sequence[str],
    weights: Mapping[str, Tensor],
    place: Place,
) -> list:
    """Return the states of one optimizer as sharded tensors, by the names of its parameters.

    Args:
        number: of the optimizer.
        state: its state dictionary's ``state``.
        names: from :func:`parameter_names`.
        weights: parameters by name.
        place: of this process.

    Raises:
        ValueError: for a state that can't be sharded.
    """
    result = []
    for index, entries in state.items():
        name = names[index]
        for kind, value in entries.items():
            key = f"{number}.{kind}.{name}"
            if value is None:
                continue
            if type(value) in _NUMBER_TYPES:
                stored = torch.tensor(value, dtype=_NUMBER_TYPES[type(value)])
                result += shards(_NUMBER + key, stored, stored, place)
            elif not isinstance(value, Tensor) or "." in kind:
                raise ValueError(
                    f"the optimizer's state {kind} of {name}, a {type(value).__name__}, can't be saved: use AdamW"
                )
            elif value.shape == weights[name].shape:
                result += shards(_TENSOR + key, value, weights[name], place)
            elif value.ndim == 0 or partition(weights[name]) is None:
                result += shards(_TENSOR + key, value, value, place)
            else:
                raise ValueError(
                    f"the optimizer's state {kind} of {name} has shape {tuple(value.shape)}, which tensor-parallel "
                    f"processes can't share as they share the parameter {tuple(weights[name].shape)}: use AdamW"
                )
    return result


def state_keys(number: int, names: Sequence[str], metadata: Metadata) -> list[tuple[str, int, str, bool]]:
    """Return the stored states of an optimizer: key, index of the parameter, name of the state, whether a number."""
    index_of, keys = {name: index for index, name in enumerate(names)}, []
    for key in metadata.state_dict_metadata:
        for prefix in (_TENSOR, _NUMBER):
            start = f"{prefix}{number}."
            if key.startswith(start):
                kind, _, name = key[len(start) :].partition(".")
                if name in index_of:
                    keys.append((key, index_of[name], kind, prefix == _NUMBER))
    return keys


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group, without its parameters, which differ from process to process."""
    return {key: value for key, value in group.items() if key not in _PARAMETERS}


def with_options(groups_now: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return this process's parameter groups with the options that were saved.

    Raises:
        ValueError: if the optimizer has another number of groups.
    """
    if len(groups_now) != len(saved):
        raise ValueError(
            f"the optimizer has {len(groups_now)} parameter groups, the one that was saved {len(saved)}: give "
            "model.optim_param_groups as then"
        )
    return [
        {**options, **{key: group[key] for key in _PARAMETERS if key in group}}
        for group, options in zip(groups_now, saved, strict=True)
    ]
