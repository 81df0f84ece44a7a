# SPDX-License-Identifier: Apache-2.0
"""Megatron's distributed checkpoints of a GPT (``torch_dist``), as Megatron-LM, NeMo 2 and Megatron Bridge write them.

They hold a tensor of all layers (and of all experts in them) where we have one for each, and Transformer Engine's
names of the norms. Tensors are written and read one at a time: an LLM of any size passes through little memory.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_mtbi.io.atomic import building
from nemo_mtbi.llm.weights import VOCABULARY, WeightSource, canonical_name
from nemo_mtbi.parallel.checkpoint.metadata import unpickle_metadata

_OF_THE_LLM = ("embedding.", "decoder.", "output_layer.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Norms that Transformer Engine fuses with what follows; a router is none of its layers, and has a norm of its own.
_THEIRS = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_THEIRS_DENSE = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_MOST = 10_000  # layers, and experts of a layer
_EXPERTS = "mlp.experts.experts."
_ONE_EXPERT = re.compile(r"mlp\.experts\.experts\.(\d+)\.")
# Modules of a layer for which Megatron asks what Transformer Engine knows beside the weights: nothing, in 16 bits.
_WITH_STATE = ("self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj")
_FEED_FORWARD = ("linear_fc1", "linear_fc2")
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
SHARD_BYTES = 5 * 10**9


# ------------------------------------------------------------------------------------------------------------ reading


def _part(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


class _Into(LoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return _part(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None: ...

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("plans are made by MegatronWeights")

    create_global_plan = finish_plan = create_local_plan


class MegatronWeights:
    """The weights of a distributed checkpoint under canonical names, whatever layout has saved it.

    A :class:`nemo_mtbi.llm.weights.WeightSource`.

    Args:
        path: folder with ``.metadata`` and ``.distcp`` files.
        vocabulary: tokens of the LLM; rows beyond them pad the stored embeddings.

    Raises:
        ValueError: if it is damaged, or holds no GPT.
    """

    def __init__(self, path: str | Path, vocabulary: int):
        self.path, self._vocabulary = Path(path), vocabulary
        try:
            self._metadata = unpickle_metadata(self.path)
            self._reader = FileSystemReader(str(path))
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        except OSError as error:
            raise ValueError(f"{path} is no distributed checkpoint: {error}") from error
        self._places = dict(self._find())
        self._chunks_at: dict[tuple[str, int], dict[tuple[int, ...], list[int]]] = {}
        self._last: tuple[str, int, Tensor | None] = ("", 0, None)
        if not self._places:
            raise ValueError(f"{path} holds no GPT of Megatron: no tensor begins with {', '.join(_OF_THE_LLM)}")

    def _find(self) -> Iterable[tuple[str, tuple[str, tuple[int, ...]]]]:
        """Each canonical name with the stored tensor, and with layer and expert in it, if it holds several."""
        for key, stored in self._metadata.state_dict_metadata.items():
            name = key.removeprefix("module.")
            if not name.startswith(_OF_THE_LLM) or not isinstance(stored, TensorStorageMetadata):
                continue
            found = {name: ()}
            if _STACKED.match(name):
                layers = self._counted(stored.size[0], key)
                found = {_STACKED.sub(f"decoder.layers.{n}.", name): (n,) for n in layers}
            for own, place in found.items():
                if _EXPERTS not in own or _ONE_EXPERT.search(own):
                    yield canonical_name(_ONE_EXPERT.sub(r"mlp.experts.local_experts.\1.", own)), (key, place)
                    continue
                for n in self._counted(stored.size[len(place)], key):
                    yield own.replace(_EXPERTS, f"mlp.experts.local_experts.{n}."), (key, (*place, n))

    def _counted(self, size: int, key: str) -> range:
        """The layers or experts of a tensor; each takes memory, before one weight is read."""
        if size > _MOST:
            raise ValueError(f"{self.path} describes {size} layers or experts in {key}, more than {_MOST}")
        return range(size)

    def names(self) -> Iterable[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        key, place = self._places[name]
        shape = tuple(self._metadata.state_dict_metadata[key].size)[len(place) :]
        return (min(shape[0], self._vocabulary), *shape[1:]) if name in VOCABULARY else shape

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """The tensor between two positions of one of its first two axes."""
        key, place = self._places[name]
        stored = self._metadata.state_dict_metadata[key]
        shape = list(self.shape(name))
        shape[axis] = stop - start
        offsets = [start if at == axis else 0 for at in range(len(shape))]
        shape, offsets = [*(1 for _ in place), *shape], [*place, *offsets]
        target = torch.empty(shape, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        try:
            numbers = self._near(key, len(place)).get(tuple(offsets[: len(place)]), [])
            near = replace(stored, chunks=[stored.chunks[number] for number in numbers])
            for item in create_read_items_for_chunk_list(key, near, [chunk]):
                number = numbers[item.storage_index.index]
                found = _part(self._chunk(key, number), item.storage_offsets, item.lengths)
                _part(target, item.dest_offsets, item.lengths).copy_(found)
        except (OSError, RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged: {key} can't be read ({error}); copy it again") from error
        return target.view(shape[len(place) :])

    def _near(self, key: str, axes: int) -> dict[tuple[int, ...], list[int]]:
        """The chunks of each place on the first axes: a tensor of all experts has tens of thousands."""
        if (key, axes) not in self._chunks_at:
            places: dict[tuple[int, ...], list[int]] = {}
            for number, chunk in enumerate(self._metadata.state_dict_metadata[key].chunks):
                ranges = (range(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                for place in product(*islice(ranges, axes)):
                    places.setdefault(place, []).append(number)
            self._chunks_at[key, axes] = places
        return self._chunks_at[key, axes]

    def _chunk(self, key: str, number: int) -> Tensor:
        """What one process has saved of a tensor. Its rows are asked for one after the other: the last one is kept."""
        if self._last[:2] != (key, number):
            stored = self._metadata.state_dict_metadata[key]
            chunk = stored.chunks[number]
            whole = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
            items = create_read_items_for_chunk_list(key, replace(stored, chunks=[chunk]), [chunk])
            self._reader.read_data(LoadPlan(items), _Into(whole))
            self._last = key, number, whole
        return self._last[2]


# ------------------------------------------------------------------------------------------------------------ writing


class _OneByOne(DefaultSavePlanner):
    """Reads each tensor when it is written."""

    def __init__(self, read: Mapping[MetadataIndex, Callable[[], Tensor | io.BytesIO]]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._read[MetadataIndex(write_item.index.fqn, write_item.index.offset)]()


def write_megatron(
    path: str | Path,
    source: WeightSource,
    layers: int,
    experts: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a distributed checkpoint that Megatron loads at any layout.

    Args:
        path: a new folder; it stands there when it is whole.
        source: the weights.
        layers: of the LLM.
        experts: of a layer; ``None``: it has none.
        progress: called with the bytes of each tensor that is written.
        shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
        ValueError: if the folder is there.
    """
    read, plans, filled = {}, [[]], 0
    for name in sorted(source.names()):
        item, size = _write_item(name, source, layers, experts)
        if filled and filled + size > shard_bytes:
            plans.append([])
            filled = 0
        filled += size
        plans[-1].append(item)
        read[MetadataIndex(item.index.fqn, item.index.offset)] = lambda name=name, item=item: _read(
            name, source, item, progress
        )
    for key in _states(layers, experts):
        index = MetadataIndex(key)
        plans[-1].append(WriteItem(index, WriteItemType.BYTE_IO))
        read[index] = _no_state
    with building(Path(path)) as staging:
        planner, writer = _OneByOne(read), FileSystemWriter(str(staging))
        writer.set_up_storage_writer(True)
        local = [SavePlan(items) for items in plans]
        local, metadata = planner.create_global_plan(local)
        plans = writer.prepare_global_plan(local)  # a file for each, as if processes had shared the work
        writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
        torch.save({}, staging / "common.pt")
        (staging / "metadata.json").write_text(json.dumps(_BACKENDS))


def _states(layers: int, experts: int | None) -> Iterable[str]:
    """Names of what Transformer Engine knows beside the weights."""
    for layer in range(layers):
        for module in _WITH_STATE:
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in _FEED_FORWARD:
            if experts is None:
                yield f"decoder.layers.mlp.{module}._extra_state/shard_{layer}_{layers}"
            for expert in range(experts or 0):
                yield f"decoder.layers.{_EXPERTS}{module}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"


def _write_item(name: str, source: WeightSource, layers: int, experts: int | None) -> tuple[WriteItem, int]:
    """What is to be written of a canonical tensor, and its bytes."""
    shape, dtype = source.shape(name), source.rows(name, 0, 0, 1).dtype
    key, offset, size = name, (0,) * len(shape), shape
    match = _LAYER.match(name)
    if match:
        expert, theirs = _EXPERT.search(name), _THEIRS if experts else _THEIRS | _THEIRS_DENSE
        key = f"decoder.layers.{theirs.get(match[2], _EXPERT.sub(_EXPERTS, match[2]))}"
        place, among = (int(match[1]),), (layers,)
        if expert:
            place, among = (*place, int(expert[1])), (*among, experts)
        offset, size, shape = (*place, *offset), (*among, *shape), (*(1 for _ in place), *shape)
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(size))
    item = WriteItem(MetadataIndex(key, torch.Size(offset)), WriteItemType.SHARD, tensor_data=data)
    return item, math.prod(shape) * dtype.itemsize


def _read(name: str, source: WeightSource, item: WriteItem, progress: Callable[[int], None]) -> Tensor:
    found = source.rows(name, 0, 0, source.shape(name)[0])
    progress(found.nbytes)
    return found.reshape(item.tensor_data.chunk.sizes).contiguous()


def _no_state() -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream
