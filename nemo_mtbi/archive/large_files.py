# SPDX-License-Identifier: Apache-2.0
"""Files of frozen parts whose fingerprint is made of samples: hashed whole, by all processes of a replica together.

Fingerprints name the maker of targets and keep their value, so the whole of a large file is hashed apart. Each process
of a replica hashes its share of the files, 0.6 s for a gigabyte, before they are read for their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_mtbi.io.file_digests import file_digest
from nemo_mtbi.parallel import groups


def hash_together(files: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """Return the SHA-256 of files by part, in their order; parts without files are left out.

    Args:
        files: of each part; the same in all processes of a replica, which all call it.

    Raises:
        ValueError: in all of them, if one can't be read.
    """
    places = [(part, number, path) for part, paths in files.items() for number, path in enumerate(paths)]
    if not places:
        return {}
    size = groups.layout().model_parallel_size
    own = places[_rank(size) :: size]
    own_digests, failure = {}, None
    try:
        own_digests = {(part, number): file_digest(path) for part, number, path in own}
    except OSError as error:
        failure = f"{error.filename} can't be read: {error.strerror}"
    outcomes = [(own_digests, failure)] if size == 1 else groups.gather_objects((own_digests, failure), "replica")
    for _, problem in outcomes:
        if problem:
            raise ValueError(problem)
    digests = {place: digest for part, _ in outcomes for place, digest in part.items()}
    return {part: [digests[part, n] for n in range(len(paths))] for part, paths in files.items() if paths}


def _rank(size: int) -> int:
    """Return the rank of this process in its replica."""
    return groups.control_group("replica").rank() if size > 1 else 0


def check_files(files: Mapping[str, Sequence[Path]], current: Mapping[str, Sequence[str]], wanted: Mapping) -> None:
    """Compare files with those that a model was trained with.

    Args:
        files: of each part.
        current: their digests.
        wanted: digests of then, by part; parts of which nothing is known are not compared.

    Raises:
        ValueError: names the file that differs.
    """
    for part, digests in wanted.items():
        for path, now, then in zip(files.get(part, ()), current.get(part, ()), digests, strict=False):
            if now != then:
                raise ValueError(
                    f"model.pretrained_{part}: {path} has the hash {now}, but this model was trained with {then}: it "
                    "is damaged or another one, copy it again"
                )
