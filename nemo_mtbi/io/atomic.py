# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: files and folders that are there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nemo_mtbi.io.locks import exclusive


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of ``path`` when the body has ended, and is deleted if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Yield a folder that gets the name ``path`` when the body has ended.

    If the body fails, it stays as ``path.partial``, and the next run begins anew. A folder of that name that is not
    such a leftover is not touched.

    Raises:
        ValueError: if ``path`` is there, or something of another origin has the name of the leftover.
        RuntimeError: if another run is making it.
    """
    staging = path.with_name(f"{path.name}.partial")
    mark = staging / ".unfinished"
    with exclusive(path):
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} is there: give a new folder")
        if staging.exists() or staging.is_symlink():
            if staging.is_symlink() or not staging.is_dir() or (any(staging.iterdir()) and not mark.exists()):
                raise ValueError(
                    f"{staging}, where {path.name} would be made, is there and was not left by an interrupted run: "
                    "rename it, or give another folder"
                )
            shutil.rmtree(staging)
        staging.mkdir()
        mark.touch()
        yield staging
        mark.unlink()
        staging.rename(path)
