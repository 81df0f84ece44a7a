# SPDX-License-Identifier: Apache-2.0
"""Processes of a run, and which of them have ended as far as this machine can tell."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A process: its machine and its process id there."""

    machine: str
    pid: int

    @classmethod
    def here(cls) -> Peer:
        """Return this process."""
        parts = []
        for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):  # containers have numbers of their own
            try:
                parts.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text().strip())
            except OSError:
                parts.append(os.uname().nodename)
        return cls(" ".join(parts), os.getpid())

    def has_ended(self) -> bool:
        """Return whether the process has ended; false for processes of other machines, which cannot be checked."""
        if self.machine != Peer.here().machine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        try:  # a zombie: its parent has not read its exit status yet
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return False


_peers: list[Peer] = []


def remember(peers: list[Peer]) -> None:
    """Store the processes of a run, by rank."""
    _peers[:] = peers


def ended() -> list[int]:
    """Return the ranks whose processes have ended."""
    return [rank for rank, peer in enumerate(_peers) if peer.has_ended()]
