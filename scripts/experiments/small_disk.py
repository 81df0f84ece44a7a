# SPDX-License-Identifier: Apache-2.0
"""A small disk that can be filled and made read-only, without root: a tmpfs in a user namespace (Linux)."""

from __future__ import annotations

import subprocess
from pathlib import Path


class SmallDisk:
    """A tmpfs, which is gone when the last process in its namespace has ended.

    Args:
        folder: empty; what runs with :attr:`prefix` sees the disk there.
        megabytes: its size.

    Raises:
        RuntimeError: if this machine lets no user have namespaces.
    """

    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mount = f"mount -t tmpfs -o size={megabytes}m tmpfs '{folder}' && echo ready && exec sleep infinity"
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
        self._holder = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"no user namespace can be had here: {self._holder.communicate()[1].strip()}")
        target = f"--target={self._holder.pid}"
        # what stands before a command that is to see the disk
        self.prefix = ["nsenter", target, "--user", "--mount", "--preserve-credentials"]
        # the disk as seen by processes outside
        self.outside = Path(f"/proc/{self._holder.pid}/root{folder}")

    def run(self, script: str) -> None:
        """A shell script that sees the disk as ``$1``.

        Raises:
            RuntimeError: if it fails.
        """
        command = [*self.prefix, "sh", "-ec", script, "sh", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`{script}` failed: {done.stderr.strip()}")

    def fill(self) -> None:
        """Leaves no byte free."""
        self.run('dd if=/dev/zero of="$1/filler" bs=4k 2>/dev/null || true')

    def free(self) -> None:
        """Undoes :meth:`fill`."""
        self.run('rm -f "$1/filler"')

    def lock(self) -> None:
        """Makes it read-only, but for files that are open already."""
        self.run('mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"')

    def unlock(self) -> None:
        """Undoes :meth:`lock`."""
        self.run('umount "$1"')

    def close(self) -> None:
        """Ends the namespace."""
        self._holder.kill()
        self._holder.communicate()
