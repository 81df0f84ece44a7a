# SPDX-License-Identifier: Apache-2.0
"""Outputs that spare their inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def refuse_overwriting(
    inputs: Mapping[str, Iterable[str | Path]], outputs: Mapping[str, Iterable[str | Path]]
) -> None:
    """Refuse outputs that would take the place of an input; call it before any work.

    Paths are compared with links resolved and by the file itself (device and inode), so that relative paths, symbolic
    and hard links to one file are one file. Nothing has to exist.

    Args:
        inputs: files that are read, by the configuration key that names them. A folder stands for all files in it that
            the run reads: give those files, and not the folder, where outputs into the same folder are legal.
        outputs: files that are written, replaced or deleted, by the key that names them.

    Raises:
        ValueError: names both keys and the file.
    """
    read = {identity: (key, path) for key, paths in inputs.items() for path in paths for identity in _identities(path)}
    for key, paths in outputs.items():
        for path in paths:
            for identity in _identities(path):
                if identity in read:
                    other, source = read[identity]
                    raise ValueError(
                        f"{key} would replace {path}, which is an input ({other}: {source}): give another {key}"
                    )


def _identities(path: str | Path) -> list[object]:
    """What two names of the same file have in common."""
    path = Path(path).expanduser()
    found: list[object] = [os.path.realpath(path)]
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return found
    return [*found, (status.st_dev, status.st_ino)]


def make_folder(path: str | Path, key: str) -> Path:
    """Make an output folder, with the folders that it lies in, and return it; one that is there stays as it is.

    Args:
        path: of the folder.
        key: configuration key or option that named it, for messages.

    Raises:
        ValueError: if a file stands in its way, or it can't be made; names the key and the path.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{key}={path}: {error.filename} is a file: name a folder") from error
    except OSError as error:
        raise ValueError(f"{key}={path} can't be made: {error.strerror}: name another folder") from error
    return folder
