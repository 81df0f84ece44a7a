# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its configuration to its report: what ``examples/mtbi_eval.py`` calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nemo_mtbi.data.corpus import digest_of
from nemo_mtbi.evaluation.answers import Unit, load_answers, save_answers
from nemo_mtbi.evaluation.figures import Asked, Resampling
from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.evaluation.items import BARE, EvalSet, Item, Reply
from nemo_mtbi.evaluation.load import Backends, Loader
from nemo_mtbi.evaluation.results import Answered, write_results
from nemo_mtbi.evaluation.settings import EvalConfig, read_sets
from nemo_mtbi.evaluation.systems import Slots, TextSystem
from nemo_mtbi.parallel import groups

ANSWERS, THROUGHPUT = "answers", "throughput.json"


@dataclass
class Speed:
    """What a system did in this run; what earlier runs did is not in it."""

    questions: int = 0
    utterances: int = 0
    tokens: int = 0
    speech_seconds: float = 0.0
    seconds: float = 0.0

    def rates(self) -> dict[str, float]:
        """Counts for each second of wall clock."""
        time_spent = max(self.seconds, 1e-9)
        names = ("questions", "utterances", "tokens", "speech_seconds")
        return {f"{name}_per_second": getattr(self, name) / time_spent for name in names}


@dataclass
class _Chunks:
    """The utterances of a set in groups that are encoded together, the same in every run; encoded ones are kept."""

    chosen: EvalSet
    size: int
    room: float  # bytes
    _kept: dict[int, Slots] = field(default_factory=dict)

    def order(self) -> list[int]:
        return sorted(range(len(self.chosen.clips)), key=lambda index: self.chosen.clips[index].id)

    def slots(self, number: int, members: Sequence[int], system: TextSystem, speed: Speed) -> Slots:
        if number not in self._kept:
            found = system.slots([self.chosen.clips[index] for index in members])
            speed.speech_seconds += found.seconds
            speed.utterances += len(members)
            if found.size > self.room:
                return found
            self.room -= found.size
            self._kept[number] = found
        return self._kept[number]


def run(config: EvalConfig, backends: Backends, console: Console | None = None) -> Path | None:
    """Ask all systems what was not answered yet, score all answers and write the results.

    Args:
        config: Checked configuration.
        backends: The models, which stand above this package.
        console: Where to show progress and tables.

    Returns:
        The path of ``report.html``; None off the first process.

    Raises:
        ValueError: for anything in the configuration, the sets or earlier answers that is missing or wrong.
    """
    console = console or Console()
    sets = read_sets(config)
    loader, folder = Loader(config, backends), Path(config.output_dir).expanduser()
    speeds = _answer_all(config, sets, loader, folder / ANSWERS, console)
    if not groups.is_global_first():
        return None
    answered = [
        Answered(chosen, _collect(config, chosen, loader, folder / ANSWERS), _bare(config, chosen, loader, folder))
        for chosen in sets
    ]
    if speeds:
        write_json(folder / THROUGHPUT, {name: vars(speed) | speed.rates() for name, speed in speeds.items()})
        console.print(_speed_table(speeds))
    return write_results(config, answered, folder, Resampling(config.resamples, config.seed), console)


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


def _answer_all(
    config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path, console: Console
) -> dict[str, Speed]:
    """Answers every unit that is not on disk."""
    plan = [
        (name, seed, chosen, [u for u in units(config, chosen, loader, name, seed) if _is_open(folder, u[0], config)])
        for name in config.systems
        for seed in range(loader.seeds(name))
        for chosen in sets
    ]
    plan = [row for row in plan if row[3]]
    speeds: dict[str, Speed] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    shown = groups.is_global_first() and bool(plan)
    with Progress(*columns, console=console, disable=not shown) as bar:
        total = sum(unit.size for *_, todo in plan for unit, _ in todo)
        task = bar.add_task("answers", total=total)
        current = None
        for name, seed, chosen, todo in plan:
            if current is None or current[0] != (name, seed):
                current = None  # frees the last model first
                current = (name, seed), loader.load(name, seed)
            speed = speeds.setdefault(name, Speed())
            chunks = _Chunks(chosen, config.batch_size, config.cache_gib * 2**30)
            for unit, items in todo:
                bar.update(task, description=f"{name}, {chosen.name}: {unit.task}")
                started = time.monotonic()
                replies = _ask(current[1], chunks, items, config.on_bad_audio, speed, lambda n: bar.advance(task, n))
                speed.seconds += time.monotonic() - started
                speed.questions += len(replies)
                speed.tokens += sum(reply.tokens for reply in replies)
                if groups.is_global_first():
                    save_answers(folder, unit, replies)
    return speeds


def _is_open(folder: Path, unit: Unit, config: EvalConfig) -> bool:
    return load_answers(folder, unit, config.overwrite) is None


def _ask(
    system: TextSystem, chunks: _Chunks, items: Sequence[Item], on_bad_audio: str, speed: Speed, progress
) -> list[Reply]:
    """Answers to questions, group of utterances by group of utterances."""
    order = chunks.order()
    replies: list[Reply | None] = [None] * len(items)
    for number, start in enumerate(range(0, len(order), chunks.size)):
        members = order[start : start + chunks.size]
        place = {clip: index for index, clip in enumerate(members)}
        wanted = [index for index, item in enumerate(items) if item.clip in place]
        if not wanted:
            continue
        slots = chunks.slots(number, members, system, speed)
        requests = [(items[index].prompt, place[items[index].clip]) for index in wanted]
        for index, reply in zip(wanted, system.ask(slots, requests, on_bad_audio, progress), strict=True):
            replies[index] = reply
    return replies


def _collect(config: EvalConfig, chosen: EvalSet, loader: Loader, folder: Path) -> dict[str, Asked]:
    """All answers to a set by system, read from disk: a run that was killed has no others."""
    found = {}
    for name in config.systems:
        seeds, items = [], []
        for seed in range(loader.seeds(name)):
            todo = [(u, i) for u, i in units(config, chosen, loader, name, seed) if u.group != BARE]
            items = [item for _, part in todo for item in part]
            seeds.append([reply for unit, _ in todo for reply in load_answers(folder, unit)])
        if items:
            found[name] = Asked(items, seeds)
    return found


def _bare(config: EvalConfig, chosen: EvalSet, loader: Loader, folder: Path) -> dict[str, dict[int, str]]:
    """For each text system its answer to the bare transcript, by utterance."""
    found = {}
    for name, system in config.systems.items():
        for unit, items in units(config, chosen, loader, name, 0) if system.kind == "text" else ():
            if unit.group == BARE:
                replies = load_answers(folder / ANSWERS, unit)
                found[name] = {item.clip: reply.answer for item, reply in zip(items, replies, strict=True)}
    return found


def _speed_table(speeds: dict[str, Speed]) -> Table:
    table = Table(title="Throughput of this run", title_justify="left")
    for column in ("system", "questions/s", "utterances/s", "tokens/s", "speech s/s", "seconds"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, speed in speeds.items():
        table.add_row(name, *(f"{value:,.1f}" for value in speed.rates().values()), f"{speed.seconds:,.1f}")
    return table
