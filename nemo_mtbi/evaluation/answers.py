# SPDX-License-Identifier: Apache-2.0
"""Answers and their divergences on disk: one file for each (system, seed, set, group, task)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nemo_mtbi.evaluation.files import write_text
from nemo_mtbi.evaluation.items import Divergence, Reply
from nemo_mtbi.io.digests import digest_of, sha256

_DIGEST = "sha256"  # key of the header: of what follows
Record = TypeVar("Record", Reply, Divergence)
_NULL = type(None)
_KINDS: dict[type, dict[str, tuple[type, ...]]] = {
    Reply: {"answer": (str,), "tokens": (int,), "truncated": (bool,), "unheard": (str, _NULL)},
    Divergence: {"kl": (float, _NULL), "tokens": (int,)},
}


@dataclass(frozen=True)
class Unit:
    """One task of one set, answered by one seed of one system: the unit of resume.

    Attributes:
        system: Name of the system.
        seed: Index of its seed.
        dataset: Name of the set.
        group: Of the questions.
        task: Of the questions.
        fingerprint: Hash of the system and the questions; answers under another one are other answers.
        size: Number of questions.
    """

    system: str
    seed: int
    dataset: str
    group: str
    task: str
    fingerprint: str
    size: int


def unit_path(folder: str | Path, unit: Unit) -> Path:
    """Return the file of a unit, below the folder of all answers."""
    parts = (f"{unit.system}.{unit.seed}", unit.dataset, f"{unit.group}.{unit.task}")
    return Path(folder).joinpath(*map(_slug, parts[:-1]), _slug(parts[-1]) + ".jsonl")


def save_answers(folder: str | Path, unit: Unit, records: Sequence[Record]) -> None:
    """Write the answers or the divergences of a unit in one step."""
    lines = ({key: getattr(record, key) for key in _KINDS[type(record)]} for record in records)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    text = text.encode("utf-8", "replace").decode("utf-8")  # a model may write half a character
    header = {"fingerprint": unit.fingerprint, "answers": len(records), _DIGEST: sha256(text.encode())}
    write_text(unit_path(folder, unit), json.dumps(header) + "\n" + text)


def load_answers(folder: str | Path, unit: Unit, overwrite: bool = False) -> list[Reply] | None:
    """Read the answers of a unit; None if it has no file.

    Args:
        folder: Of all answers.
        unit: The unit.
        overwrite: Take answers of another system or to other questions for none.

    Raises:
        ValueError: the file is malformed or has another number of answers, or it is of another system or other
            questions and may not be replaced.
    """
    return _load(Reply, folder, unit, overwrite, "answers of another model, or to other questions")


def load_divergences(folder: str | Path, unit: Unit, overwrite: bool = False) -> list[Divergence] | None:
    """Read the divergences of a unit; as :func:`load_answers`."""
    return _load(Divergence, folder, unit, overwrite, "divergences of other answers, or of another kl_utterances")


def _load(kind: type[Record], folder: str | Path, unit: Unit, overwrite: bool, others: str) -> list[Record] | None:
    path = unit_path(folder, unit)
    if not path.exists():
        return None
    remedy = "delete it and run again: it will be made anew"
    try:
        text = path.read_bytes().decode("utf-8")
        # not splitlines: an answer may hold any character that ends a line elsewhere
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is malformed ({error}); {remedy}") from error
    if not lines or not isinstance(lines[0], dict) or "fingerprint" not in lines[0]:
        raise ValueError(f"{path} has no header; {remedy}")
    if lines[0]["fingerprint"] != unit.fingerprint:
        if overwrite:
            return None
        raise ValueError(f"{path} holds {others}: use another output_dir, or overwrite=true")
    records = [_record(kind, line, f"line {number} of {path}", remedy) for number, line in enumerate(lines[1:], 2)]
    if len(records) != unit.size:
        raise ValueError(f"{path} has {len(records)} answers to {unit.size} questions; {remedy}")
    digest = lines[0].get(_DIGEST)  # older files have none
    if digest is not None and digest != sha256(text.partition("\n")[2].encode()):
        raise ValueError(f"{path} is not as it was written, its SHA-256 is another; {remedy}")
    return records


def _record(kind: type[Record], line: object, place: str, remedy: str) -> Record:
    if not isinstance(line, dict) or set(line) != set(_KINDS[kind]):
        raise ValueError(f"{place} must hold {', '.join(_KINDS[kind])}; {remedy}")
    for key, allowed in _KINDS[kind].items():
        if not isinstance(line[key], allowed):
            raise ValueError(f"{place}: {key} is {line[key]!r}; {remedy}")
    return kind(**line)


def _slug(name: str) -> str:
    """Return a name that any file system takes; names that differ stay different."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:60]
    return safe if safe == name and not name.startswith(".") else f"{safe.lstrip('.')}-{digest_of(name)[:8]}"
