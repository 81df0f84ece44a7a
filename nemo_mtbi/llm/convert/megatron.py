# SPDX-License-Identifier: Apache-2.0
"""Megatron's distributed checkpoints of a GPT (``torch_dist``), as Megatron-LM, NeMo 2 and Megatron Bridge write them.

They hold one tensor for all layers (and for all experts in them) where we have one for each, and Transformer Engine's
names of the norms. Tensors are written and read one at a time, so that an LLM of any size takes little memory.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
# Modules of a layer for which Megatron expects extra state of Transformer Engine: nothing, in 16 bits.
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
    """Load planner that reads into one tensor."""

    def __init__(self, target: Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the target that an item fills."""
        return _part(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the tensor is part of the target."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Do nothing: only tensors are read."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: MegatronWeights makes the plans."""

    def create_local_plan(self) -> LoadPlan:
        """Refuse: MegatronWeights makes the plans."""
        raise NotImplementedError("plans are made by MegatronWeights")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse: MegatronWeights makes the plans."""
        raise NotImplementedError("plans are made by MegatronWeights")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Refuse: MegatronWeights makes the plans."""
        raise NotImplementedError("plans are made by MegatronWeights")


class MegatronWeights:
    """The weights of a distributed checkpoint under canonical names, whatever the layout that saved it.

    A :class:`nemo_mtbi.llm.weights.WeightSource`.

    Args:
        path: folder with ``.metadata`` and ``.distcp`` files.
        vocabulary: number of tokens of the LLM; rows beyond them pad the stored embeddings.

    Raises:
        ValueError: if it is damaged, or does not hold a GPT.
    """

    def __init__(self, path: str | Path, vocabulary: int):
        self.path, self._vocabulary = Path(path), vocabulary
        try:
            self._metadata = unpickle_metadata(self.path)
            self._reader = FileSystemReader(str(path))
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        except OSError as error:
            raise ValueError(f"{path} is not a distributed checkpoint: {error}") from error
        self._places = dict(self._find())
        self._chunks_at: dict[tuple[str, int], dict[tuple[int, ...], list[int]]] = {}
        self._last: tuple[tuple[str, int], Tensor] | None = None  # tensor and number of a chunk, and the chunk
        if not self._places:
            raise ValueError(f"{path} holds no GPT of Megatron: no tensor begins with {', '.join(_OF_THE_LLM)}")

    def _find(self) -> Iterable[tuple[str, tuple[str, tuple[int, ...]]]]:
        """Yield each canonical name with its stored tensor, and with layer and expert in it, if it holds several."""
        for key, stored in self._metadata.state_dict_metadata.items():
            name = key.removeprefix("module.")
            if not name.startswith(_OF_THE_LLM) or not isinstance(stored, TensorStorageMetadata):
                continue
            places: dict[str, tuple[int, ...]] = {name: ()}
            if _STACKED.match(name):
                layers = self._counted(stored.size[0], key)
                places = {_STACKED.sub(f"decoder.layers.{n}.", name): (n,) for n in layers}
            for own, place in places.items():
                if _EXPERTS not in own or _ONE_EXPERT.search(own):
                    yield canonical_name(_ONE_EXPERT.sub(r"mlp.experts.local_experts.\1.", own)), (key, place)
                    continue
                for n in self._counted(stored.size[len(place)], key):
                    yield own.replace(_EXPERTS, f"mlp.experts.local_experts.{n}."), (key, (*place, n))

    def _counted(self, size: int, key: str) -> range:
        """Return the range of layers or experts of a tensor; too many would take memory before a weight is read."""
        if size > _MOST:
            raise ValueError(f"{self.path} describes {size} layers or experts in {key}, more than {_MOST}")
        return range(size)

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{self.path} is damaged: {key} is not a tensor; copy it again")
        return stored

    def names(self) -> Iterable[str]:
        """Return the canonical names of all tensors."""
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor, without rows that pad the vocabulary."""
        key, place = self._places[name]
        shape = tuple(self._stored(key).size)[len(place) :]
        return (min(shape[0], self._vocabulary), *shape[1:]) if name in VOCABULARY else shape

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return the part of a tensor between two positions of one of its first two axes."""
        key, place = self._places[name]
        stored = self._stored(key)
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
                index = item.storage_index.index
                if index is None:  # never so, in items for chunks of a list
                    raise KeyError(f"{key} has a part without a chunk")
                part = _part(self._chunk(key, numbers[index]), item.storage_offsets, item.lengths)
                _part(target, item.dest_offsets, item.lengths).copy_(part)
        except (OSError, RuntimeError, EOFError, KeyError) as error:
            raise ValueError(f"{self.path} is damaged: {key} can't be read ({error}); copy it again") from error
        return target.view(shape[len(place) :])

    def _near(self, key: str, axes: int) -> dict[tuple[int, ...], list[int]]:
        """Return the numbers of the chunks at each place on the first axes: a tensor of all experts has very many."""
        if (key, axes) not in self._chunks_at:
            places: dict[tuple[int, ...], list[int]] = {}
            for number, chunk in enumerate(self._stored(key).chunks):
                ranges = (range(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                for place in product(*islice(ranges, axes)):
                    places.setdefault(place, []).append(number)
            self._chunks_at[key, axes] = places
        return self._chunks_at[key, axes]

    def _chunk(self, key: str, number: int) -> Tensor:
        """Return the chunk of a tensor that one process saved; the last one is kept, since rows are read in order."""
        if self._last is None or self._last[0] != (key, number):
            stored = self._stored(key)
            chunk = stored.chunks[number]
            whole = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
            items = create_read_items_for_chunk_list(key, replace(stored, chunks=[chunk]), [chunk])
            self._reader.read_data(LoadPlan(items), _Into(whole))
            self._last = (key, number), whole
        return self._last[1]


# ------------------------------------------------------------------------------------------------------------ writing


class _OneByOne(DefaultSavePlanner):
    """Save planner that reads each tensor when it is written."""

    def __init__(self, read: Mapping[MetadataIndex, Callable[[], Tensor | io.BytesIO]]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Read the tensor of an item."""
        return self._read[MetadataIndex(write_item.index.fqn, write_item.index.offset)]()


def write_megatron(
    path: str | Path,
    source: WeightSource,
    layers: int,
    experts: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a distributed checkpoint that Megatron loads at any layout.

    Args:
        path: a new folder, which appears when it is complete.
        source: the weights.
        layers: number of layers of the LLM.
        experts: number of experts of a layer; ``None``: it has none.
        progress: called with the bytes of each tensor that is written.
        shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
        ValueError: if the folder exists.
    """
    read: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}
    parts: list[list[WriteItem]] = [[]]
    filled = 0
    for name in sorted(source.names()):
        item, sizes, size = _write_item(name, source, layers, experts)
        if filled and filled + size > shard_bytes:
            parts.append([])
            filled = 0
        filled += size
        parts[-1].append(item)
        read[MetadataIndex(item.index.fqn, item.index.offset)] = partial(_read, name, source, sizes, progress)
    for key in _states(layers, experts):
        index = MetadataIndex(key)
        parts[-1].append(WriteItem(index, WriteItemType.BYTE_IO))
        read[index] = _no_state
    with building(Path(path)) as staging:
        planner, writer = _OneByOne(read), FileSystemWriter(str(staging))
        writer.set_up_storage_writer(True)
        local, metadata = planner.create_global_plan([SavePlan(items) for items in parts])
        plans = writer.prepare_global_plan(local)  # a file for each, as if processes had shared the work
        writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
        torch.save({}, staging / "common.pt")
        (staging / "metadata.json").write_text(json.dumps(_BACKENDS))


def _states(layers: int, experts: int | None) -> Iterable[str]:
    """Yield the names of Transformer Engine's extra state."""
    for layer in range(layers):
        for module in _WITH_STATE:
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in _FEED_FORWARD:
            if experts is None:
                yield f"decoder.layers.mlp.{module}._extra_state/shard_{layer}_{layers}"
            for expert in range(experts or 0):
                yield f"decoder.layers.{_EXPERTS}{module}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"


def _write_item(
    name: str, source: WeightSource, layers: int, experts: int | None
) -> tuple[WriteItem, tuple[int, ...], int]:
    """Return the item that writes a canonical tensor, the shape that it is written in, and its bytes."""
    shape, dtype = source.shape(name), source.rows(name, 0, 0, 1).dtype
    key, offset, size = name, tuple(0 for _ in shape), shape
    match = _LAYER.match(name)
    if match:
        expert, renamed = _EXPERT.search(name), _THEIRS if experts else _THEIRS | _THEIRS_DENSE
        key = f"decoder.layers.{renamed.get(match[2], _EXPERT.sub(_EXPERTS, match[2]))}"
        place: tuple[int, ...] = (int(match[1]),)
        counts: tuple[int, ...] = (layers,)
        if expert and experts:
            place, counts = (*place, int(expert[1])), (*counts, experts)
        offset, size, shape = (*place, *offset), (*counts, *shape), (*(1 for _ in place), *shape)
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(size))
    item = WriteItem(MetadataIndex(key, torch.Size(offset)), WriteItemType.SHARD, tensor_data=data)
    return item, shape, math.prod(shape) * dtype.itemsize


def _read(name: str, source: WeightSource, sizes: tuple[int, ...], progress: Callable[[int], None]) -> Tensor:
    whole = source.rows(name, 0, 0, source.shape(name)[0])
    progress(whole.nbytes)
    return whole.reshape(sizes).contiguous()


def _no_state() -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream
