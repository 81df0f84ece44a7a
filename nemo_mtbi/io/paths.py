# SPDX-License-Identifier: Apache-2.0
"""Paths of inputs and outputs: no output may take the place of an input."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

Paths = Iterable[str | os.PathLike]
MOST_SHARDS = 10**5


def refuse_overwriting(inputs: Mapping[str, Paths], outputs: Mapping[str, Paths]) -> None:
    """Refuse outputs that would take the place of an input; call it before any work.

    Paths are compared with links resolved and by the file itself (device and inode), so that relative paths, symbolic
    and hard links to one file are one file. Nothing has to exist.

    Args:
        inputs: files that are read, by the configuration key that names them. A folder stands for all that is in it,
            and nothing may be written into it: give its files where other files beside them are legal.
        outputs: files that are written, replaced or deleted, by the key that names them. A folder is replaced as a
            whole: give the files that are written where others are kept.

    Raises:
        ValueError: names both keys and the file.
    """
    read = [(key, path) for key, paths in inputs.items() for path in paths]
    files = {identity: entry for entry in read for identity in _identities(entry[1], quick=True)}
    folders = [entry for entry in read if os.path.isdir(_plain(entry[1]))]
    for key, paths in outputs.items():
        for path in paths:
            replaced = next((files[name] for name in _identities(path) if name in files), None)
            replaced = replaced or _inside(path, read) or _part_of(path, folders)
            if replaced is not None:
                other, source = replaced
                raise ValueError(
                    f"{key} would replace {path}, which is an input ({other}: {source}): give another {key}"
                )


def named_files(value: Any, _seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the local paths in the value of a configuration key: see NeMo's ``input_cfg`` and ``manifest_filepath``.

    Names of shards (``a_{0..3}.json``, ``a__OP_0..3_CL_.json``) are expanded, lists (which may hold weights) and
    mappings are gone through, and so are the YAML files that a path leads to. What is stored elsewhere is left out.
    """
    if isinstance(value, (str, os.PathLike)):
        for path in expand_shards(os.fspath(value)):
            yield path
            if path.endswith((".yaml", ".yml")) and os.path.isfile(_plain(path)):
                yield from _named_in_yaml(path, _seen)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from named_files(item, _seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from named_files(item, _seen)


def expand_shards(pattern: str) -> list[str]:
    """Return the local files that a path with NeMo's or the shell's braces names; none if it is stored elsewhere."""
    if "://" in pattern or pattern.startswith("pipe:") or pattern in ("", "-"):
        return []
    braces = re.sub(r"_CL_|[)\]>]", "}", re.sub(r"_OP_|[(\[<]", "{", pattern))  # as NeMo reads them
    try:
        names = list(islice(braceexpand(braces, escape=False), MOST_SHARDS)) if ".." in braces or "," in braces else []
    except ValueError:
        names = []
    return list(dict.fromkeys([pattern, *names]))


def user_path(name: str | os.PathLike) -> Path:
    """Return a path with ``~`` at its start resolved; one of a user who is not known stays as it is."""
    return Path(_plain(name))


def is_file(path: str | os.PathLike) -> bool:
    """Return whether there is such a file; a name that no file system takes names none."""
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


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


def _named_in_yaml(path: str, seen: frozenset[str]) -> Iterator[str]:
    if _real(path) in seen:
        return
    try:
        with open(_plain(path), encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return  # whoever reads it raises the error
    if not isinstance(content, str):
        yield from named_files(content, seen | {_real(path)})


def _plain(path: str | os.PathLike) -> str:
    return os.path.expanduser(os.fspath(path))


def _real(path: str | os.PathLike) -> str:
    try:
        return os.path.realpath(_plain(path))
    except (OSError, ValueError):  # a null character, a name that is too long
        return os.path.abspath(_plain(path).replace("\0", ""))


def _status(path: str | os.PathLike) -> os.stat_result | None:
    try:
        return os.stat(_plain(path))
    except (OSError, ValueError):
        return None


def _identities(path: str | os.PathLike, quick: bool = False) -> list[object]:
    """Return what all names of a file have in common; ``quick``: without its real path where the file exists."""
    status = _status(path)
    identities: list[object] = [os.path.abspath(_plain(path))]
    if status is not None:
        identities.append((status.st_dev, status.st_ino))
    if quick and status is not None:
        return identities  # a corpus may have millions of files
    return [*identities, _real(path)]


def _inside(output: str | os.PathLike, read: list[tuple[str, str | os.PathLike]]) -> tuple[str, Any] | None:
    """Return the input that is in a folder which is replaced."""
    if not os.path.isdir(_plain(output)):
        return None
    folder = _real(output)
    for key, path in read:
        plain = _plain(path)
        link = os.path.join(_real(os.path.dirname(plain) or "."), os.path.basename(plain))
        if any(Path(name).is_relative_to(folder) for name in (_real(path), link)):
            return key, path
    return None


def _part_of(output: str | os.PathLike, folders: list[tuple[str, str | os.PathLike]]) -> tuple[str, Any] | None:
    """Return the folder of inputs that an output lies in, by its name or as the target of a link in the folder."""
    status, real = _status(output) if folders else None, _real(output)
    for key, folder in folders:
        if Path(real).is_relative_to(_real(folder)) or (status and _holds(_plain(folder), status)):
            return key, folder
    return None


def _holds(folder: str, wanted: os.stat_result) -> bool:
    """Return whether a folder holds a link to a file, symbolic or hard."""
    for parent, _, names in os.walk(folder):
        for name in names:
            status = _status(os.path.join(parent, name))
            if status and (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
