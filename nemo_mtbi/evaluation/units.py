# SPDX-License-Identifier: Apache-2.0
"""What an evaluation consists of: units that are done once, and those that are not on disk yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_mtbi.evaluation.answers import Unit, load_answers
from nemo_mtbi.evaluation.items import BARE, Divergence, EvalSet, Item
from nemo_mtbi.evaluation.load import Loader
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.io.digests import digest_of

ANSWERS, DIVERGENCES = "answers", "divergences"  # folders


@dataclass(frozen=True)
class Twin:
    """Answers whose distance from the text is measured.

    Attributes:
        unit: Where the distances are kept.
        items: The questions.
        text: The text system's unit of the same task.
        places: Of the questions among all of that unit.
    """

    unit: Unit
    items: Sequence[Item]
    text: Unit
    places: Sequence[int]


@dataclass(frozen=True)
class Task:
    """What a seed of a system has yet to do in a set.

    Attributes:
        name: Of the system.
        seed: Index of its seed.
        chosen: The set.
        answers: Questions that are not answered on disk.
        divergences: Answers whose distance from the text is not on disk.
    """

    name: str
    seed: int
    chosen: EvalSet
    answers: Sequence[tuple[Unit, Sequence[Item]]]
    divergences: Sequence[Twin]

    @property
    def size(self) -> int:
        """Questions to answer and to compare."""
        return sum(unit.size for unit, _ in self.answers) + sum(twin.unit.size for twin in self.divergences)


def units(config: EvalConfig, chosen: EvalSet, loader: Loader, name: str, seed: int) -> list[tuple[Unit, list[Item]]]:
    """What a seed of a system is asked in a set; nothing if it reads transcripts and the set lacks some."""
    is_text = config.systems[name].kind == "text"
    if is_text and chosen.untranscribed:
        return []
    parts = dict(chosen.parts())
    if is_text and (bare := chosen.bare()):
        parts[BARE, BARE] = bare
    identity = loader.identity(name, seed)
    found = []
    for (group, task), items in parts.items():
        fingerprint = digest_of([identity, chosen.digest(items)])
        found.append((Unit(name, seed, chosen.name, group, task, fingerprint, len(items)), items))
    return found


def twins(config: EvalConfig, chosen: EvalSet, loader: Loader, name: str, seed: int) -> list[Twin]:
    """What a seed of a system is compared with the text in; nothing where there is no text system that was asked."""
    other = config.text_of(name)
    if other is None or config.kl_utterances == 0:
        return []
    order = sorted(range(len(chosen.clips)), key=lambda index: chosen.clips[index].id)
    among = set(order[: config.kl_utterances])
    read = {(unit.group, unit.task): unit for unit, _ in units(config, chosen, loader, other, 0)}
    found = []
    for unit, items in units(config, chosen, loader, name, seed):
        text = read.get((unit.group, unit.task))
        places = [place for place, item in enumerate(items) if item.clip in among]
        if text is None or not places:
            continue
        fingerprint = digest_of([unit.fingerprint, text.fingerprint, places])
        own = replace(unit, fingerprint=fingerprint, size=len(places))
        found.append(Twin(own, [items[place] for place in places], text, places))
    return found


def open_tasks(config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path) -> list[Task]:
    """All that is not on disk; text systems first, since others are compared with their answers."""
    found = []
    for name in sorted(config.systems, key=lambda name: config.systems[name].kind != "text"):
        for seed in range(loader.seeds(name)):
            for chosen in sets:
                asked = [
                    part
                    for part in units(config, chosen, loader, name, seed)
                    if load_answers(folder / ANSWERS, part[0], config.overwrite) is None
                ]
                far = [
                    twin
                    for twin in twins(config, chosen, loader, name, seed)
                    if load_answers(folder / DIVERGENCES, twin.unit, config.overwrite, Divergence) is None
                ]
                found.append(Task(name, seed, chosen, asked, far))
    return [task for task in found if task.size]
