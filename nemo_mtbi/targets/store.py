# SPDX-License-Identifier: Apache-2.0
"""Cuts with behaviors on disk: ``cuts-00000.jsonl.gz`` … and ``targets.json``, which is written last."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, load_jsonl

from nemo_mtbi.data.behaviors import BEHAVIORS, PROVENANCE
from nemo_mtbi.data.cut_files import write_cuts
from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.file_digests import file_digest
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.targets.origin import same_origin

INDEX_FILE = "targets.json"
JOINED = "cuts.jsonl.gz"  # all shards in one file, which NeMo's cuts_path takes
SHAR_CONFIG = "input_cfg.yaml"  # for a Shar corpus: our cuts beside its data
FORMAT = 1  # of the index and of the partial file
_DIGESTS, _OWN_DIGEST = "files", "sha256"  # keys of the index


def shard_path(out_dir: str | Path, number: int) -> Path:
    """Return the file of a shard in a folder of targets or alignments."""
    return Path(out_dir) / f"cuts-{number:05d}.jsonl.gz"


def written_files(out_dir: str | Path) -> list[Path]:
    """Return the files of a folder of targets or alignments that a run writes, replaces or deletes."""
    folder = Path(out_dir)
    patterns = ("cuts-*.jsonl.gz*", "cuts-*.json", "cuts-*.partial.jsonl")
    shards = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return [*shards, shard_path(folder, 0), folder / INDEX_FILE, folder / JOINED]


@contextmanager
def own_share(out_dir: str | Path, key: str = "output_dir", rank: int = 0) -> Iterator[None]:
    """Hold the share of a folder of targets or alignments that process ``rank`` makes: see :func:`exclusive`."""
    with exclusive(out_dir, key, Path(out_dir) / f"share-{rank:05d}"):
        yield


def surplus_shards(out_dir: str | Path, num_shards: int) -> list[Path]:
    """Return the shards in the folder that a set of ``num_shards`` does not have."""
    keep = {shard_path(out_dir, number).name for number in range(num_shards)}
    return [path for path in sorted(Path(out_dir).glob("cuts-*.jsonl.gz")) if path.name not in keep]


def split_into_shards(cuts: Iterable[Cut], shard_size: int) -> Iterator[list[Cut]]:
    """Return contiguous shards of ``shard_size`` cuts; the last may be smaller."""
    stream = iter(cuts)
    while shard := list(islice(stream, shard_size)):
        yield shard


def check_without_data(cut: Cut) -> None:
    """Refuse a cut that is more than a manifest."""
    if cut.is_in_memory:
        raise ValueError(
            f"cut {cut.id} holds its audio or other data in memory (tarred or Shar input): only manifests are "
            "written here, so pass the cuts without their data (for Shar: fields with `cuts` alone)"
        )


def with_behaviors(cut: Cut, behaviors: Sequence[dict], behaviors_from: dict) -> Cut:
    """Return a copy of ``cut`` (of any kind) that carries these behaviors instead of those that it had."""
    copy = deserialize_item(cut.to_dict())
    setattr(copy, BEHAVIORS, list(behaviors))
    setattr(copy, PROVENANCE, behaviors_from)
    return copy


def write_shard(path: Path, cuts: Iterable[Cut]) -> None:
    """Write a shard such that it is either whole or not there; equal cuts give equal bytes."""
    scratch = path.with_name(path.name + ".tmp")
    write_cuts(scratch, cuts)
    _publish(scratch, path)


def join_shards(folder: str | Path) -> Path:
    """Join all shards of a folder into one file, and return its path."""
    path = Path(folder).absolute() / JOINED
    with replacing(path) as joined:
        for shard in sorted(path.parent.glob("cuts-*.jsonl.gz")):
            with open(shard, "rb") as file:
                shutil.copyfileobj(file, joined)  # gzip files written one after another are a gzip file
    return path


def write_index(out_dir: str | Path, *, shards: int, cuts: int, behaviors_from: dict) -> None:
    """Write what the folder holds when it is complete. Each process writes the same, but for shards of later ones."""
    content = {"format": FORMAT, "shards": shards, "cuts": cuts, PROVENANCE: behaviors_from}
    _write_index(Path(out_dir), content)


def seal(out_dir: str | Path) -> None:
    """Write the digests of all files of a complete set into its index; after the last of them was written."""
    _write_index(Path(out_dir), _read_index(Path(out_dir)))


def _write_index(folder: Path, content: dict[str, Any]) -> None:
    paths = [shard_path(folder, number) for number in range(content["shards"])]
    paths += [folder / name for name in (JOINED, SHAR_CONFIG)]
    digests = {path.name: file_digest(path).removeprefix("sha256:") for path in paths if path.is_file()}
    content = {**content, _DIGESTS: digests}
    content = {**content, _OWN_DIGEST: digest_of(content)}
    with replacing(folder / INDEX_FILE) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


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
    """Return the cuts with behaviors, read lazily, shard by shard.

    Raises:
        RuntimeError: if a shard is missing or damaged, or the shards don't belong together.
    """
    folder = Path(folder)
    index = _read_index(folder)
    paths = [shard_path(folder, number) for number in range(index["shards"])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise RuntimeError(
            f"{folder}: {len(missing)} of {len(paths)} shards are missing ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}): run the target generation of every rank again to finish"
        )
    for path in paths:
        origin = _origin_of(path)
        if origin is not None and not same_origin(origin, index[PROVENANCE]):
            raise RuntimeError(f"{path} was made by another run than {INDEX_FILE} says: run again with overwrite=true")
        _check_digest(path, index)
        if origin is None:
            raise RuntimeError(f"{path} can't be read: delete it and run the target generation again")
    return CutSet.from_files(paths, shuffle_iters=False)


def _origin_of(path: Path) -> object:
    """Return the provenance of the behaviors of a shard; ``None`` if it can't be read."""
    try:
        first = next(iter(load_jsonl(path)))
        return (deserialize_item(first).custom or {}).get(PROVENANCE) or "nothing"
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, StopIteration):
        return None


def check_published(path: str | Path) -> None:
    """Compare a file of a set of targets with the digest in its index, before training reads it.

    Where there is no index, or one of before that has no digests, nothing is compared.

    Args:
        path: a manifest, or the configuration of Shar input that was written beside the shards.

    Raises:
        RuntimeError: if it, or a shard that it names, is not what was written.
    """
    path = Path(path)
    if not (path.parent / INDEX_FILE).is_file():
        return
    index = _read_index(path.parent)
    _check_digest(path, index)
    if path.name == SHAR_CONFIG:
        for number in range(index["shards"]):
            _check_digest(shard_path(path.parent, number), index)


def _read_index(folder: Path) -> dict[str, Any]:
    """Return the content of the index of a folder.

    Raises:
        RuntimeError: if there is none, or it is damaged.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        digest = index.pop(_OWN_DIGEST, None)
        if (digest is None and _DIGESTS in index) or (digest is not None and digest != digest_of(index)):
            raise ValueError("its SHA-256 is another")
        index["shards"], index["cuts"], index[PROVENANCE]  # noqa: B018 (raises where one is missing)
        return index
    except FileNotFoundError:
        raise RuntimeError(
            f"{folder} holds no finished targets ({INDEX_FILE} is missing): make them, or run again to finish"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RuntimeError(
            f"{path} is damaged ({error}): run the target generation again, which keeps what is whole"
        ) from error


def _check_digest(path: Path, index: Mapping[str, Any]) -> None:
    wanted = index.get(_DIGESTS, {}).get(path.name)
    if wanted is not None and file_digest(path).removeprefix("sha256:") != wanted:
        raise RuntimeError(
            f"{path} is not as {INDEX_FILE} says: it is damaged, or was changed since. Delete it and run the target "
            "generation again, or save what you changed in another folder"
        )
