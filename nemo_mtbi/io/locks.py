# SPDX-License-Identifier: Apache-2.0
"""One run at a time in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(path: str | Path, key: str = "", lock: str | Path | None = None) -> Iterator[None]:
    """Hold the output ``path`` (a file or a folder) for this run alone while the body runs.

    The lock is a hidden file, beside the output if nothing else is said. The operating system releases it when its
    process ends, however it ends.

    Args:
        path: output file or folder.
        key: configuration key that named it, for the message.
        lock: another place of the lock, which gets a dot before and ``.lock`` behind its name; its folder is made.

    Raises:
        RuntimeError: if another run holds it.
    """
    path, place = Path(path), Path(path if lock is None else lock)
    place.parent.mkdir(parents=True, exist_ok=True)
    name = place.with_name(f".{place.name}.lock")
    held = FileLock(name, timeout=0)
    try:
        held.acquire()
    except Timeout:
        named = f"{key}={path}" if key else str(path)
        raise RuntimeError(
            f"{named} is being written by another run ({_owner(name)}): wait for its end, or give another output"
        ) from None
    try:
        name.write_text(f"{os.getpid()}\n")
        yield
    finally:
        held.release()


def _owner(name: Path) -> str:
    """The process that holds a lock, for a message."""
    try:
        return f"process {int(name.read_text())}"
    except (OSError, ValueError):
        return "its process is not known"
