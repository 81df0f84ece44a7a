# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint: under which name, and which part of it a process holds.

They are sharded tensors of ``megatron.core.dist_checkpointing`` under names that no layout changes, so that what was
saved at one layout loads at any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import Metadata

from nemo_mtbi.parallel import groups

_WEIGHT, _RANDOM, _LLM = "model.", "random.", "llm_optimizer."


@dataclass(frozen=True)
class Place:
    """Where a process is in the layout: its rank and the size along each axis."""

    data: int = 0
    data_size: int = 1
    pipeline: int = 0
    pipeline_size: int = 1
    tensor: int = 0
    tensor_size: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Processes along each axis: data, pipeline, tensor."""
        return self.data_size, self.pipeline_size, self.tensor_size

    @classmethod
    def here(cls) -> Place:
        """Return the place of this process."""
        return cls(
            groups.data_parallel_rank(),
            groups.data_parallel_size(),
            groups.pipeline_parallel_rank(),
            groups.layout().pipeline_model_parallel_size,
            groups.tensor_parallel_rank(),
            groups.layout().tensor_model_parallel_size,
        )


def partition(parameter: Tensor) -> tuple[int, int] | None:
    """Return the axis along which tensor-parallel processes share a parameter, and the number of parts that are split.

    Megatron's attributes say so: ``tensor_model_parallel``, ``partition_dim`` and ``partition_stride`` (2 where gate
    and value stand one behind the other). ``None``: every process has the whole tensor.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    marked: Any = parameter  # with attributes that hints of torch do not know
    return marked.partition_dim, marked.partition_stride


def shards(key: str, data: Tensor, like: Tensor, place: Place) -> list:
    """Return this process's share of a tensor of the checkpoint: one sharded tensor for each part.

    Args:
        key: the tensor's name in the checkpoint.
        data: this process's share.
        like: the parameter that says how it is shared; with ``whole_shape``, the shape of the tensor in the
            checkpoint, it may be padded, and the last stage may hold a copy that Megatron calls ``shared``.
        place: of this process.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    if hasattr(like, "whole_shape"):
        return fragments(key, data.reshape(-1), 0, like, place, replica=place.data)
    sharing = partition(like)
    if sharing is None:
        return [ShardedTensor.from_rank_offsets(key, data, replica_id=(place.tensor, place.data))]
    axis, parts = sharing
    return [
        ShardedTensor.from_rank_offsets(
            key,
            piece,
            (axis, part * place.tensor_size + place.tensor, parts * place.tensor_size),
            replica_id=(0, place.data),
        )
        for part, piece in enumerate(data.chunk(parts, axis))
    ]


def fragments(key: str, flat: Tensor, start: int, like: Tensor, place: Place, replica: int = 0) -> list:
    """Return a run of this process's flattened share as boxes of the whole tensor, which are views of it.

    Args:
        key: the tensor's name in the checkpoint.
        flat: ``[n]``, contiguous.
        start: of the run, in the flattened share.
        like: the parameter, with ``whole_shape``; rows beyond it are padding, and left out.
        place: of this process.
        replica: which replica's copy it is, if all of them hold the same.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    whole: tuple[int, ...] = getattr(like, "whole_shape")  # noqa: B009 (torch's hints do not know it)
    axis, parts = partition(like) or (None, 1)
    copies = (0 if axis is not None else place.tensor, replica, int(getattr(like, "shared", False)))
    boxes = []
    for place_in_share, size in _boxes(tuple(like.shape), start, start + len(flat), parts):
        first = sum(o * stride for o, stride in zip(place_in_share, like.stride(), strict=True)) - start
        offset = list(place_in_share)
        if axis is not None:
            share = like.shape[axis] // parts
            part, within = divmod(offset[axis], share)
            offset[axis] = (part * place.tensor_size + place.tensor) * share + within
        size = (min(size[0], whole[0] - offset[0]), *size[1:])
        if size[0] > 0:
            data = flat[first : first + math.prod(size)].view(size)
            boxes.append(ShardedTensor(key, data, data.dtype, size, whole, tuple(offset), None, copies))
    return boxes


def _boxes(
    shape: tuple[int, ...], start: int, stop: int, parts: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and size of boxes that cover a run of a flattened vector or matrix; none lies in two parts."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    rows, columns = shape
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:  # a piece of a row
            size = (1, min(columns - column, stop - start))
        else:
            limit = (row // (rows // parts) + 1) * (rows // parts)
            size = (min((stop - start) // columns, limit - row), columns)
        yield (row, column), size
        start += math.prod(size)


def weight_shards(name: str, data: Tensor, parameter: Tensor, place: Place) -> list:
    """Return :func:`shards` of a weight."""
    return shards(_WEIGHT + name, data, parameter, place)


def stored_weights(metadata: Metadata) -> set[str]:
    """Return the names of the weights in a checkpoint."""
    return {key[len(_WEIGHT) :] for key in metadata.state_dict_metadata if key.startswith(_WEIGHT)}


def llm_key(kind: str, name: str) -> str:
    """Return the key of what the LLM's optimizer holds for a weight."""
    return f"{_LLM}{kind}.{name}"


def random_key(name: str) -> str:
    """Return the key of a generator's states in a checkpoint."""
    return _RANDOM + name


def random_shard(name: str, state: Tensor, place: Place):
    """Return the state of a generator as the row of this process in one tensor ``[data, pipeline, tensor, n]``."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(
        random_key(name),
        state.reshape(1, 1, 1, -1),
        (0, place.data, place.data_size),
        (1, place.pipeline, place.pipeline_size),
        (2, place.tensor, place.tensor_size),
    )


def random_origin(place: Place, saved: Place) -> Place | None:
    """Return the process whose random states a process takes from a checkpoint; ``None``: they are seeded anew.

    With the same number of replicas a process takes its own, or if it had none, those of its replica's first stage or
    first tensor-parallel process. With another number, the data is dealt out anew, and so are random numbers.

    Args:
        place: of the process.
        saved: sizes of the layout that has saved; its ranks are not read.
    """
    if place.data_size != saved.data_size:
        return None
    return replace(
        saved,
        data=place.data,
        pipeline=place.pipeline if place.pipeline < saved.pipeline_size else 0,
        tensor=place.tensor if place.tensor < saved.tensor_size else 0,
    )
