# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of whole files that others wrote: what identifies the encoder, the LLM and the data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HASHED_BYTES = 2**30  # of larger files only samples are hashed: reading 140 GB takes minutes
_BLOCK, _SAMPLES = 2**18, 256


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file that may be larger than memory, as ``sha256:`` and hexadecimal digits."""
    return f"sha256:{_hash(path).hexdigest()}"


def files_digest(paths: Iterable[Path]) -> str:
    """Return the digest of several files, in order. Of those above :data:`HASHED_BYTES` samples are hashed."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_hash(path, in_part=path.stat().st_size > HASHED_BYTES).digest())
    return f"sha256:{digest.hexdigest()}"


def sampled(paths: Iterable[Path]) -> list[Path]:
    """Return those files of which :func:`files_digest` hashes samples only."""
    return [path for path in paths if path.stat().st_size > HASHED_BYTES]


def _hash(path: Path, in_part: bool = False) -> Any:
    """Return SHA-256 of a file, or of its size and of blocks spread evenly over it, which any training changes."""
    size, digest = path.stat().st_size, hashlib.sha256()
    starts = range(0, size, max(size // _SAMPLES, _BLOCK) if in_part else _BLOCK)
    if in_part:
        digest.update(str(size).encode())
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest
