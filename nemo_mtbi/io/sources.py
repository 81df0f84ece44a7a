# SPDX-License-Identifier: Apache-2.0
"""Policy for sources of data: files always; addresses and commands only where the configuration allows them.

Lhotse and NeMo read a manifest's entries from files, from addresses and from shell commands alike. So a manifest of
somebody else could run commands. :func:`check_cut` refuses such entries before audio is opened, and :class:`Reading`
refuses them while the code of Lhotse and NeMo reads: some of their readers open audio before they give a cut.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from lhotse import AudioSource

KEYS = ("allow_remote", "allow_commands")

_PIPE = re.compile(r"\s*pipe:", re.IGNORECASE)
# Schemes of smart_open, fsspec, AIStore, Multi-Storage Client and ffmpeg that are followed by less than "//", too.
_SCHEME = re.compile(
    r"\s*(https?|ftps?|s3[anu]?|gcs?|gs|azure|az|abfss?|wasbs?|hdfs|webhdfs|viewfs|ssh|scp|sftp|ais|msc|hf|oci|r2|swift"
    r"|rtmp|rtsp|tcp|udp):",
    re.IGNORECASE,
)
_FILE = re.compile(r"\s*file:/", re.IGNORECASE)
# Lhotse hands files of these kinds to a shell, by name: `sph2pipe … NAME`, `ffmpeg -i 'NAME' …`.
_SAFE_IN_A_SHELL = re.compile(r"[\w@%+=:,./-]*")
_LEGACY_OPUS = "LHOTSE_LEGACY_OPUS_LOADING"
# Storages of arrays that unpickle what they hold, and one whose table of contents may name commands.
_RUNNING_STORAGES = ("memory_raw", "pillow_memory", "kaldiio")


class ForbiddenSourceError(ValueError):
    """A source that the configuration does not allow; names the entry and the key that would allow it."""


@dataclass(frozen=True)
class SourcePolicy:
    """Sources that the configuration allows beside local files.

    Attributes:
        allow_remote: addresses: ``http(s)``, ``s3`` and other object stores.
        allow_commands: shell commands: audio sources of type ``command`` and ``pipe:``.
    """

    allow_remote: bool = False
    allow_commands: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> SourcePolicy:
        """Return what a configuration with the keys ``allow_remote`` and ``allow_commands`` says.

        Raises:
            ValueError: if one is neither true nor false.
        """
        values: dict[str, bool] = {}
        for key in KEYS:
            value = config.get(key)
            if value is None:
                continue
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be true or false, got {value!r}")
            values[key] = value
        return cls(**values)

    def check(self, location: str, place: str) -> None:
        """Refuse a path or address that is not allowed.

        Args:
            location: as Lhotse or NeMo would open it.
            place: of the entry, for the message.

        Raises:
            ForbiddenSourceError: names the place and the key.
        """
        kind = kind_of(location)
        if kind == "command":
            self.refuse_command(location, place)
        elif kind == "remote" and not self.allow_remote:
            raise ForbiddenSourceError(
                f"{place} would be read from the network ({_shown(location)}): give local files, or set "
                "allow_remote: true if all of these data may be"
            )

    def check_audio(self, path: str, place: str) -> None:
        """Refuse the name of an audio file that is not allowed, or that Lhotse would give to a shell as a command.

        Raises:
            ForbiddenSourceError: as :meth:`check`.
        """
        self.check(path, place)
        lower = path.lower()
        if self.allow_commands:
            return
        if lower.endswith(".sph") and not _SAFE_IN_A_SHELL.fullmatch(path):
            raise ForbiddenSourceError(
                f"{place}: Lhotse reads .sph files by a shell, and {_shown(path)} holds characters that a shell takes "
                "for its own: rename the file"
            )
        if lower.endswith(".opus") and "'" in path and os.environ.get(_LEGACY_OPUS, "0") == "1":
            raise ForbiddenSourceError(
                f"{place}: with {_LEGACY_OPUS}=1 Lhotse reads .opus files by a shell, and {_shown(path)} holds a "
                "quote: rename the file, or unset the variable"
            )

    def refuse_command(self, command: str, place: str) -> None:
        """Refuse a shell command, unless commands are allowed.

        Raises:
            ForbiddenSourceError: names the place and the key.
        """
        if not self.allow_commands:
            raise ForbiddenSourceError(
                f"{place} would run a command ({_shown(command)}): remove the entry, or set allow_commands: true if "
                "you trust whoever wrote these data with your account"
            )


FILES = SourcePolicy()  # nothing but local files
EVERYTHING = SourcePolicy(allow_remote=True, allow_commands=True)  # for cuts that nobody reads audio of


def kind_of(location: str) -> str:
    """Return ``local``, ``remote`` or ``command``: how Lhotse, NeMo or Kaldi's readers would open a location."""
    text = location.strip()
    if _PIPE.match(text) or text.startswith("|") or text.endswith("|"):
        return "command"
    if _FILE.match(text):
        return "local"
    return "remote" if "://" in text or _SCHEME.match(text) else "local"


def _shown(text: Any) -> str:
    """Return the beginning of a text, without what a terminal would obey."""
    text = repr(text if isinstance(text, str) else str(text))
    return text if len(text) <= 80 else f"{text[:77]}…'"


# ------------------------------------------------------------------------------------------------------------- cuts


def check_cut(cut: Any, policy: SourcePolicy, place: str | None = None) -> None:
    """Refuse a cut (or anything that holds cuts, recordings, arrays) with a source that is not allowed, at any depth.

    Tracks of mixtures, supervisions, custom fields, impulse responses in transforms, features, arrays and images are
    all looked at. Nothing is opened.

    Args:
        cut: any object of Lhotse or NeMo, or the mapping that it is made of.
        policy: what is allowed.
        place: names the entry; ``None``: its id does.

    Raises:
        ForbiddenSourceError: names the entry and the key that would allow it.
    """
    if policy.allow_commands and policy.allow_remote:
        return
    place = f"cut {getattr(cut, 'id', '(without id)')}" if place is None else place
    pending = [cut]
    while pending:
        item = pending.pop()
        if item is None or isinstance(item, (str, bytes, int, float)):
            continue
        if isinstance(item, Mapping):
            _check_mapping(item, policy, place)
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif is_dataclass(item):
            parts = getattr(item, "__dict__", {})
            if isinstance(item, AudioSource):
                _check_source(parts, policy, place)
            elif "storage_type" in parts:
                _check_storage(parts, policy, place)
            pending.extend(parts.values())


def _check_mapping(item: Mapping[str, Any], policy: SourcePolicy, place: str) -> None:
    """Refuse a mapping that Lhotse would make a forbidden source or storage of."""
    if "source" in item and "channels" in item:
        _check_source(item, policy, place)
    elif "storage_type" in item:
        _check_storage(item, policy, place)


def _check_source(parts: Mapping[str, Any], policy: SourcePolicy, place: str) -> None:
    kind, source = parts.get("type"), parts.get("source")
    if kind == "command":
        policy.refuse_command(str(source), place)
    elif isinstance(source, (str, os.PathLike)):
        policy.check_audio(str(source), place)


def _check_storage(parts: Mapping[str, Any], policy: SourcePolicy, place: str) -> None:
    kind, path = parts.get("storage_type"), parts.get("storage_path")
    if kind in _RUNNING_STORAGES:
        policy.refuse_command(f"arrays of storage {kind}", place)
    if isinstance(path, (str, os.PathLike)):
        policy.check(str(path), place)
