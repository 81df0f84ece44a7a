# SPDX-License-Identifier: Apache-2.0
"""Cuts with behaviors on disk: ``cuts-00000.jsonl.gz`` … and ``targets.json``, which is written last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, load_jsonl

from nemo_mtbi.data.behaviors import BEHAVIORS, PROVENANCE
from nemo_mtbi.data.corpus import write_cuts
from nemo_mtbi.data.target_origin import same_origin
from nemo_mtbi.durable import replacing

INDEX_FILE = "targets.json"
JOINED = "cuts.jsonl.gz"  # all shards in one file, which NeMo's cuts_path takes
FORMAT = 1  # of the index and of the partial file


def shard_path(out_dir: str | Path, number: int) -> Path:
    return Path(out_dir) / f"cuts-{number:05d}.jsonl.gz"


def surplus_shards(out_dir: str | Path, num_shards: int) -> list[Path]:
    """Shards in the folder that a set of ``num_shards`` does not have."""
    keep = {shard_path(out_dir, number).name for number in range(num_shards)}
    return [path for path in sorted(Path(out_dir).glob("cuts-*.jsonl.gz")) if path.name not in keep]


def split_into_shards(cuts: Iterable[Cut], shard_size: int) -> Iterator[list[Cut]]:
    """Contiguous shards of ``shard_size`` cuts; the last may be smaller."""
    stream = iter(cuts)
    while shard := list(islice(stream, shard_size)):
        yield shard


def check_without_data(cut: Cut) -> None:
    """Raises ValueError if a cut is more than a manifest."""
    if cut.is_in_memory:
        raise ValueError(
            f"cut {cut.id} holds its audio or other data in memory (tarred or Shar input): only manifests are "
            "written here, so pass the cuts without their data (for Shar: fields with `cuts` alone)"
        )


def with_behaviors(cut: Cut, behaviors: Sequence[dict], behaviors_from: dict) -> Cut:
    """A copy of ``cut`` (of any kind) that carries these behaviors instead of those that it had."""
    copy = deserialize_item(cut.to_dict())
    setattr(copy, BEHAVIORS, list(behaviors))
    setattr(copy, PROVENANCE, behaviors_from)
    return copy


def write_shard(path: Path, cuts: Iterable[Cut]) -> None:
    """Writes a shard such that it is either whole or not there; equal cuts give equal bytes."""
    scratch = path.with_name(path.name + ".tmp")
    write_cuts(scratch, cuts)
    _publish(scratch, path)


def join_shards(folder: str | Path) -> Path:
    """Writes all shards of a folder into one file, and returns its path."""
    path = Path(folder).absolute() / JOINED
    with replacing(path) as joined:
        for shard in sorted(path.parent.glob("cuts-*.jsonl.gz")):
            with open(shard, "rb") as file:
                shutil.copyfileobj(file, joined)  # gzip files, one behind the other, are a gzip file
    return path


def write_index(out_dir: str | Path, *, shards: int, cuts: int, behaviors_from: dict, rank: int = 0) -> None:
    """Says what the folder holds when it is complete. Each process writes the same."""
    scratch = Path(out_dir) / f"{INDEX_FILE}.{rank}.tmp"
    content = {"format": FORMAT, "shards": shards, "cuts": cuts, PROVENANCE: behaviors_from}
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _publish(scratch, Path(out_dir) / INDEX_FILE)


def _publish(scratch: Path, path: Path) -> None:
    with open(scratch, "rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must outlive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_targets(folder: str | Path) -> CutSet:
    """The cuts with behaviors, read lazily, shard by shard.

    Raises:
        RuntimeError: if a shard is missing, or the shards don't belong together.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RuntimeError(
            f"{folder} holds no finished targets ({INDEX_FILE} is missing): make them, or run again to finish"
        ) from None
    paths = [shard_path(folder, number) for number in range(index["shards"])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise RuntimeError(
            f"{folder}: {len(missing)} of {len(paths)} shards are missing ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}): run the target generation of every rank again to finish"
        )
    for path in paths:
        first = next(iter(load_jsonl(path)))
        if not same_origin((deserialize_item(first).custom or {}).get(PROVENANCE), index[PROVENANCE]):
            raise RuntimeError(f"{path} was made by another run than {INDEX_FILE} says: run again with overwrite=true")
    return CutSet.from_files(paths, shuffle_iters=False)
