# SPDX-License-Identifier: Apache-2.0
"""Locks: one run at a time writes an output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(path: str | Path, key: str = "", lock: str | Path | None = None) -> Iterator[None]:
    """Hold the output ``path`` (a file or a folder) for this run alone while the body runs.

    The lock is a hidden file, beside the output if nothing else is said, which goes when the body ends. The operating
    system releases it when its process ends, however it ends.

    Args:
        path: output file or folder.
        key: configuration key that named it, for the message.
        lock: another place of the lock, which gets a dot before and ``.lock`` behind its name; its folder is made.

    Raises:
        ValueError: if the folder of the lock can't be one, since it is a file.
        RuntimeError: if another run holds it.
    """
    path, place = Path(path), Path(path if lock is None else lock)
    named = f"{key}={path}" if key else str(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{named}: {place.parent} is not a folder: give another path") from None
    name = place.with_name(f".{place.name}.lock")
    held = FileLock(name, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise RuntimeError(
            f"{named} is being written by another run ({_owner(name)}): wait for its end, or give another output"
        ) from None
    try:
        name.write_text(f"{os.getpid()}\n")
        yield
    finally:
        name.unlink(missing_ok=True)  # still held: who waits for it sees that it has no name any more
        held.release()


def _owner(name: Path) -> str:
    """Return the process that holds a lock, for a message."""
    try:
        return f"process {int(name.read_text())}"
    except (OSError, ValueError):
        return "its process is not known"
