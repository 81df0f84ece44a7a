# SPDX-License-Identifier: Apache-2.0
"""Units of work of an evaluation: those of each system, and those whose results are not on disk yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_mtbi.evaluation.answers import Unit, load_answers, load_divergences
from nemo_mtbi.evaluation.items import BARE, EvalSet, Item
from nemo_mtbi.evaluation.load import Loader
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.io.digests import digest_of

ANSWERS, DIVERGENCES = "answers", "divergences"  # folders


@dataclass(frozen=True)
class Twin:
    """Answers whose divergence from the text is measured.

    Attributes:
        unit: The unit of the divergences.
        items: The questions.
        text: The text system's unit of the same task.
        places: Indices of the questions in that unit.
    """

    unit: Unit
    items: Sequence[Item]
    text: Unit
    places: Sequence[int]


@dataclass(frozen=True)
class OpenWork:
    """Units of one seed of a system in one set whose results are not on disk.

    Attributes:
        name: Of the system.
        seed: Index of its seed.
        chosen: The set.
        answers: Questions without answers.
        divergences: Answers without their divergence from the text.
    """

    name: str
    seed: int
    chosen: EvalSet
    answers: Sequence[tuple[Unit, Sequence[Item]]]
    divergences: Sequence[Twin]

    @property
    def size(self) -> int:
        """Number of questions to answer and to compare."""
        return sum(unit.size for unit, _ in self.answers) + sum(twin.unit.size for twin in self.divergences)


def units(config: EvalConfig, chosen: EvalSet, loader: Loader, name: str, seed: int) -> list[tuple[Unit, list[Item]]]:
    """Return the questions of a seed of a system in a set; none for a text system where transcripts are missing."""
    is_text = config.systems[name].kind == "text"
    if is_text and chosen.untranscribed:
        return []
    parts = dict(chosen.parts())
    if is_text and (bare := chosen.bare()):
        parts[BARE, BARE] = bare
    identity = loader.identity(name, seed)
    listed = []
    for (group, task), items in parts.items():
        fingerprint = digest_of([identity, chosen.digest(items)])
        listed.append((Unit(name, seed, chosen.name, group, task, fingerprint, len(items)), items))
    return listed


def twins(config: EvalConfig, chosen: EvalSet, loader: Loader, name: str, seed: int) -> list[Twin]:
    """Return the comparisons of a seed of a system with the text in a set; none without answers to the text."""
    other = config.text_of(name)
    if other is None or config.kl_utterances == 0:
        return []
    order = sorted(range(len(chosen.clips)), key=lambda index: chosen.clips[index].id)
    among = set(order[: config.kl_utterances])
    read = {(unit.group, unit.task): unit for unit, _ in units(config, chosen, loader, other, 0)}
    listed = []
    for unit, items in units(config, chosen, loader, name, seed):
        text = read.get((unit.group, unit.task))
        places = [place for place, item in enumerate(items) if item.clip in among]
        if text is None or not places:
            continue
        fingerprint = digest_of([unit.fingerprint, text.fingerprint, places])
        own = replace(unit, fingerprint=fingerprint, size=len(places))
        listed.append(Twin(own, [items[place] for place in places], text, places))
    return listed


def open_work(config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path) -> list[OpenWork]:
    """Return all that is not on disk; text systems first, since others are compared with their answers."""
    work = []
    for name in sorted(config.systems, key=lambda name: config.systems[name].kind != "text"):
        for seed in range(loader.seeds(name)):
            for chosen in sets:
                answers = [
                    part
                    for part in units(config, chosen, loader, name, seed)
                    if load_answers(folder / ANSWERS, part[0], config.overwrite) is None
                ]
                divergences = [
                    twin
                    for twin in twins(config, chosen, loader, name, seed)
                    if load_divergences(folder / DIVERGENCES, twin.unit, config.overwrite) is None
                ]
                work.append(OpenWork(name, seed, chosen, answers, divergences))
    return [part for part in work if part.size]
