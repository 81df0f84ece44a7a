# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its configuration to its report: what ``examples/mtbi_eval.py`` calls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nemo_mtbi.evaluation.answers import Unit, load_answers, save_answers
from nemo_mtbi.evaluation.figures import Answered, Asked, Resampling
from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.evaluation.items import BARE, Divergence, EvalSet, Item, Reply
from nemo_mtbi.evaluation.load import Backends, Loader
from nemo_mtbi.evaluation.results import THROUGHPUT, check_measurable, spare_inputs, write_results
from nemo_mtbi.evaluation.settings import EvalConfig, read_sets
from nemo_mtbi.evaluation.systems import Slots, TextSystem
from nemo_mtbi.evaluation.units import ANSWERS, DIVERGENCES, Task, open_tasks, twins, units
from nemo_mtbi.io.display import printable
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.agreement import agreed
from nemo_mtbi.parallel.settings import check_same
from nemo_mtbi.parallel.stop import Remedies, explained


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
            # only the first stage has frames, and all must decide alike: encoding again is done by all together
            size = max(groups.gather_objects(found.size, "replica"))
            if size > self.room:
                return found
            self.room -= size
            self._kept[number] = found
        return self._kept[number]


@explained(
    Remedies(
        go_on="Answers that were finished are kept: start the same command again to go on",
        place="output_dir",
        patience="the time limit of torch.distributed",
        work="while it evaluated",
    )
)
def run(config: EvalConfig, backends: Backends, console: Console | None = None) -> Path | None:
    """Ask all systems what was not answered yet, score all answers and write the results.

    Args:
        config: Checked configuration.
        backends: The models, which stand above this package.
        console: Where to show progress and tables.

    Returns:
        The path of ``report.html``; None off the first process.

    Raises:
        ValueError: for anything in the configuration, the sets or earlier answers that is missing or wrong, or if
            what the folder holds is read or is not of an evaluation.
        RuntimeError: if another evaluation writes into the folder, or another process is lost.
        SystemExit: after Ctrl-C or another signal.
    """
    console = console or Console()
    folder = Path(config.output_dir).expanduser()
    spare_inputs(config, folder)
    sets = read_sets(config)
    check_measurable(config, sets)
    check = partial(check_same, asdict(config), ("cuda",))
    groups.start_one_replica(config.tensor_model_parallel_size, config.pipeline_model_parallel_size, check)
    with ExitStack() as held:
        if groups.is_global_first():
            agreed(lambda: held.enter_context(exclusive(folder, "output_dir", folder / ANSWERS)))
        else:
            agreed(lambda: None)
        return _run(config, sets, Loader(config, backends), folder, console)


def _run(config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path, console: Console) -> Path | None:
    speeds = _work(config, sets, loader, folder, console)
    if not groups.is_global_first():
        return None
    answered = [
        Answered(chosen, _collect(config, chosen, loader, folder), _bare(config, chosen, loader, folder))
        for chosen in sets
    ]
    if speeds:
        write_json(folder / THROUGHPUT, _known_rates(folder) | {n: vars(s) | s.rates() for n, s in speeds.items()})
        console.print(_speed_table(speeds))
    return write_results(config, answered, folder, Resampling(config.resamples, config.seed), console)


def _work(
    config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path, console: Console
) -> dict[str, Speed]:
    """Answers every unit that is not on disk, and compares it with the text."""
    todo = open_tasks(config, sets, loader, folder)
    loader.check(dict.fromkeys(task.name for task in todo), sets)
    speeds: dict[str, Speed] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    shown = groups.is_global_first() and bool(todo)
    bar = Progress(*columns, console=console, disable=not shown)
    with bar, Heartbeat(lambda: bar_text(bar), console, shown):
        line = bar.add_task("answers", total=sum(task.size for task in todo))
        loaded: tuple[str, int] | None = None
        system = None
        for task in todo:
            if loaded != (task.name, task.seed):
                system = None  # frees the last model first
                loaded, system = (task.name, task.seed), loader.load(task.name, task.seed)
            chunks = _Chunks(task.chosen, config.batch_size, config.cache_gib * 2**30)
            speed = speeds.setdefault(task.name, Speed())

            def show(unit: Unit, what: str, task: Task = task) -> None:
                description = printable(f"{task.name}, {task.chosen.name}: {what} {unit.task}")
                bar.update(line, description=description)

            for unit, items in task.answers:
                show(unit, "asked")
                replies = _ask(system, chunks, items, config.on_bad_audio, speed, lambda n: bar.advance(line, n))
                if groups.is_global_first():
                    save_answers(folder / ANSWERS, unit, replies)
            for twin in task.divergences:
                show(twin.unit, "compared on")
                read = load_answers(folder / ANSWERS, twin.text) if groups.is_global_first() else None
                read = groups.broadcast_object(read, "world")
                found = _compare(system, chunks, twin.items, [read[place] for place in twin.places])
                bar.advance(line, len(found))
                if groups.is_global_first():
                    save_answers(folder / DIVERGENCES, twin.unit, found)
    return speeds


def _ask(
    system: TextSystem, chunks: _Chunks, items: Sequence[Item], on_bad_audio: str, speed: Speed, progress
) -> list[Reply]:
    """Answers to questions."""
    started = time.monotonic()
    replies = _in_chunks(
        chunks, items, system, speed, lambda slots, asked, _: system.ask(slots, asked, on_bad_audio, progress)
    )
    speed.seconds += time.monotonic() - started
    speed.questions += len(replies)
    speed.tokens += sum(reply.tokens for reply in replies)
    return replies


def _compare(system: TextSystem, chunks: _Chunks, items: Sequence[Item], answers: Sequence[Reply]) -> list[Divergence]:
    """Divergences from the text at the tokens of its answers to the same questions; no part of the throughput."""

    def work(slots: Slots, asked: Sequence[tuple[str, int]], wanted: Sequence[int]) -> list[Divergence]:
        transcripts = [chunks.chosen.clips[items[index].clip].transcript for index in wanted]
        return system.divergences(slots, asked, transcripts, [answers[index] for index in wanted])

    return _in_chunks(chunks, items, system, Speed(), work)


def _in_chunks(chunks: _Chunks, items: Sequence[Item], system: TextSystem, speed: Speed, work: Callable) -> list[Any]:
    """One result for each question, group of utterances by group of utterances.

    Args:
        chunks: The groups.
        items: The questions.
        system: Who encodes the utterances.
        speed: Where it counts them.
        work: From slots, (prompt, index in the slots) pairs and the indices of their questions to results.
    """
    order = chunks.order()
    found: list[Any] = [None] * len(items)
    for number, start in enumerate(range(0, len(order), chunks.size)):
        members = order[start : start + chunks.size]
        place = {clip: index for index, clip in enumerate(members)}
        wanted = [index for index, item in enumerate(items) if item.clip in place]
        if not wanted:
            continue
        slots = chunks.slots(number, members, system, speed)
        requests = [(items[index].prompt, place[items[index].clip]) for index in wanted]
        for index, value in zip(wanted, work(slots, requests, wanted), strict=True):
            found[index] = value
    return found


def _collect(config: EvalConfig, chosen: EvalSet, loader: Loader, folder: Path) -> dict[str, Asked]:
    """All answers to a set by system, read from disk: a run that was killed has no others."""
    found = {}
    for name in config.systems:
        seeds, items = [], []
        for seed in range(loader.seeds(name)):
            parts = [(u, i) for u, i in units(config, chosen, loader, name, seed) if u.group != BARE]
            items = [item for _, part in parts for item in part]
            far = {(twin.unit.group, twin.unit.task): twin for twin in twins(config, chosen, loader, name, seed)}
            replies = []
            for unit, _ in parts:
                mine, twin = load_answers(folder / ANSWERS, unit), far.get((unit.group, unit.task))
                if twin is not None:
                    distances = load_answers(folder / DIVERGENCES, twin.unit, kind=Divergence)
                    for place, distance in zip(twin.places, distances, strict=True):
                        mine[place] = replace(mine[place], divergence=distance)
                replies += mine
            seeds.append(replies)
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


def _known_rates(folder: Path) -> dict[str, Any]:
    """What earlier runs have measured of other systems."""
    path = folder / THROUGHPUT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _speed_table(speeds: dict[str, Speed]) -> Table:
    table = Table(title="Throughput of this run", title_justify="left")
    for column in ("system", "questions/s", "utterances/s", "tokens/s", "speech s/s", "seconds"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, speed in speeds.items():
        table.add_row(
            Text(printable(name)), *(f"{value:,.1f}" for value in speed.rates().values()), f"{speed.seconds:,.1f}"
        )
    return table
