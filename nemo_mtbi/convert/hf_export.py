# SPDX-License-Identifier: Apache-2.0
"""The way back: weights under canonical names as a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_mtbi.convert.hf import INDEX, SINGLE, segments, theirs_of
from nemo_mtbi.durable import building
from nemo_mtbi.modules.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.modules.weights import WeightSource

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Rows:
    """Rows of one of our tensors that stand together in one of theirs."""

    name: str
    start: int
    stop: int


def rows_of_theirs(source: WeightSource, architecture: DecoderConfig, family: str) -> dict[str, list[Rows]]:
    """What each of their tensors is made of: the inverse of :func:`nemo_mtbi.convert.hf.segments`."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    for name in weight_shapes(architecture):
        parts = segments(name, architecture, family)
        if parts is None:
            found[theirs_of(name, family)[0]] = [(0, Rows(name, 0, source.shape(name)[0]))]
            continue
        position = 0
        for part in parts:
            size = part.stop - part.start
            found.setdefault(part.name, []).append((part.start, Rows(name, position, position + size)))
            position += size
    return {theirs: [rows for _, rows in sorted(parts, key=lambda p: p[0])] for theirs, parts in found.items()}


def write_hf(
    path: str | Path,
    source: WeightSource,
    architecture: DecoderConfig,
    family: str,
    others: Iterable[Path] = (),
    progress: Callable[[int], None] = lambda n: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory; one shard is in memory at a time.

    Args:
        path: a new folder; it stands there when it is whole.
        source: the weights, written in the dtype that they have.
        architecture: of the LLM.
        family: key of :data:`nemo_mtbi.convert.hf.FAMILIES`.
        others: files that belong to it, such as ``config.json`` and those of the tokenizer.
        progress: called with the bytes of each tensor.
        shard_bytes: largest size of a file, unless one tensor is larger.

    Raises:
        ValueError: if the folder is there.
    """
    with building(Path(path)) as staging:
        for file in others:
            shutil.copyfile(file, staging / file.name)
        shards: list[list[str]] = []
        total = 0
        for tensors in _shards(source, rows_of_theirs(source, architecture, family), shard_bytes, progress):
            save_file(tensors, staging / f"{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(tensors))
            total += sum(value.nbytes for value in tensors.values())
            del tensors
        _name(staging, shards, total)


def _shards(
    source: WeightSource, rows: dict[str, list[Rows]], shard_bytes: int, progress: Callable[[int], None]
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    filled = 0
    for theirs, parts in rows.items():
        tensor = torch.cat([source.rows(part.name, 0, part.start, part.stop) for part in parts])
        if shard and filled + tensor.nbytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[theirs] = tensor
        filled += tensor.nbytes
        progress(tensor.nbytes)
    yield shard


def _name(folder: Path, shards: list[list[str]], total: int) -> None:
    """Gives the files the names that Hugging Face knows, and writes the index."""
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE)
        return
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for number, name in enumerate(names):
        (folder / f"{number}.safetensors").rename(folder / name)
    where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
