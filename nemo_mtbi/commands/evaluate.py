# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its configuration to its report: ``examples/mtbi_eval.py``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nemo_mtbi.evaluation.answers import Unit, load_answers, load_divergences, save_answers
from nemo_mtbi.evaluation.figures import AnsweredSet, Resampling, SystemAnswers
from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.evaluation.items import BARE, Divergence, EvalSet, Item, Reply
from nemo_mtbi.evaluation.load import Loader
from nemo_mtbi.evaluation.results import THROUGHPUT, check_measurable, spare_inputs, write_evaluation
from nemo_mtbi.evaluation.settings import EvalConfig, read_sets
from nemo_mtbi.evaluation.systems import Slots, TextSystem
from nemo_mtbi.evaluation.units import ANSWERS, DIVERGENCES, OpenWork, open_work, twins, units
from nemo_mtbi.io.display import printable
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.agreement import agreed
from nemo_mtbi.parallel.settings import check_same
from nemo_mtbi.parallel.stop import Remedies, explained

Record = TypeVar("Record", Reply, Divergence)


@dataclass
class Speed:
    """Work of a system in this run, without that of earlier runs.

    Attributes:
        questions: Answers.
        utterances: Utterances that were loaded and encoded.
        tokens: Generated tokens.
        speech_seconds: Seconds of loaded speech.
        seconds: Wall clock.
    """

    questions: int = 0
    utterances: int = 0
    tokens: int = 0
    speech_seconds: float = 0.0
    seconds: float = 0.0

    def rates(self) -> dict[str, float]:
        """Return the counts for each second of wall clock."""
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
        """Return the indices of the utterances, by id."""
        return sorted(range(len(self.chosen.clips)), key=lambda index: self.chosen.clips[index].id)

    def slots(self, number: int, members: Sequence[int], system: TextSystem, speed: Speed) -> Slots:
        """Return the slots of one group, encoded now or kept from before; counts new ones in ``speed``."""
        if number not in self._kept:
            encoded = system.slots([self.chosen.clips[index] for index in members])
            speed.speech_seconds += encoded.seconds
            speed.utterances += len(members)
            # only the first stage has frames, and all must decide alike: encoding again is done by all together
            size = max(groups.gather_objects(encoded.size, "replica"))
            if size > self.room:
                return encoded
            self.room -= size
            self._kept[number] = encoded
        return self._kept[number]


@explained(
    Remedies(
        go_on="Answers that were finished are kept: start the same command again to go on",
        place="output_dir",
        patience="the time limit of torch.distributed",
        work="while it evaluated",
    )
)
def run(config: EvalConfig, console: Console | None = None) -> Path | None:
    """Answer all questions that have no answer on disk, score all answers and write the results.

    Args:
        config: Checked configuration.
        console: Where to show progress and tables.

    Returns:
        The path of ``report.html``; None off the first process.

    Raises:
        ValueError: the configuration, the sets or earlier answers are wrong, or the folder holds inputs or results
            of another script.
        RuntimeError: another evaluation writes into the folder, or another process is lost.
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
        return _run(config, sets, Loader(config), folder, console)


def _run(config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path, console: Console) -> Path | None:
    speeds = _work(config, sets, loader, folder, console)
    if not groups.is_global_first():
        return None
    answered = [
        AnsweredSet(chosen, _collect(config, chosen, loader, folder), _bare(config, chosen, loader, folder))
        for chosen in sets
    ]
    if speeds:
        write_json(folder / THROUGHPUT, _known_rates(folder) | {n: vars(s) | s.rates() for n, s in speeds.items()})
        console.print(_speed_table(speeds))
    return write_evaluation(config, answered, folder, Resampling(config.resamples, config.seed), console)


def _work(
    config: EvalConfig, sets: Sequence[EvalSet], loader: Loader, folder: Path, console: Console
) -> dict[str, Speed]:
    """Answer every unit that is not on disk, and compare it with the text."""
    open_parts = open_work(config, sets, loader, folder)
    loader.check(dict.fromkeys(part.name for part in open_parts), sets)
    speeds: dict[str, Speed] = {}
    shown = groups.is_global_first() and bool(open_parts)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )
    with bar, Heartbeat(lambda: bar_text(bar), console, shown):
        line = bar.add_task("answers", total=sum(part.size for part in open_parts))
        for (name, seed), parts in groupby(open_parts, lambda part: (part.name, part.seed)):
            system = loader.load(name, seed)
            for part in parts:
                _finish(config, part, system, folder, speeds.setdefault(name, Speed()), bar, line)
            del system  # frees this model before the next is loaded
    return speeds


def _finish(
    config: EvalConfig, part: OpenWork, system: TextSystem, folder: Path, speed: Speed, bar: Progress, line: TaskID
) -> None:
    """Answer and compare the open units of one system in one set, and save each."""
    chunks = _Chunks(part.chosen, config.batch_size, config.cache_gib * 2**30)

    def show(unit: Unit, action: str) -> None:
        bar.update(line, description=printable(f"{part.name}, {part.chosen.name}: {action} {unit.task}"))

    for unit, items in part.answers:
        show(unit, "asked")
        replies = _ask(system, chunks, items, config.on_bad_audio, speed, lambda n: bar.advance(line, n))
        if groups.is_global_first():
            save_answers(folder / ANSWERS, unit, replies)
    for twin in part.divergences:
        show(twin.unit, "compared on")
        read = _stored(load_answers(folder / ANSWERS, twin.text), twin.text) if groups.is_global_first() else None
        read = groups.broadcast_object(read, "world")
        divergences = _compare(system, chunks, twin.items, [read[place] for place in twin.places])
        bar.advance(line, len(divergences))
        if groups.is_global_first():
            save_answers(folder / DIVERGENCES, twin.unit, divergences)


def _stored(records: list[Record] | None, unit: Unit) -> list[Record]:
    """Return records that this run, or one before it, has written."""
    if records is None:
        raise RuntimeError(
            f"the answers of {unit.system} to {unit.group}, {unit.task} of {unit.dataset} were deleted while this "
            "evaluation ran: start it again, and it makes them anew"
        )
    return records


def _ask(
    system: TextSystem,
    chunks: _Chunks,
    items: Sequence[Item],
    on_bad_audio: str,
    speed: Speed,
    progress: Callable[[int], None],
) -> list[Reply]:
    """Return the answers to questions."""
    started = time.monotonic()
    replies = _in_chunks(
        chunks, items, system, speed, lambda slots, requests, _: system.ask(slots, requests, on_bad_audio, progress)
    )
    speed.seconds += time.monotonic() - started
    speed.questions += len(replies)
    speed.tokens += sum(reply.tokens for reply in replies)
    return replies


def _compare(system: TextSystem, chunks: _Chunks, items: Sequence[Item], answers: Sequence[Reply]) -> list[Divergence]:
    """Return the divergences from the text at the tokens of its answers to the same questions."""

    def work(slots: Slots, requests: Sequence[tuple[str, int]], wanted: Sequence[int]) -> list[Divergence]:
        transcripts = [chunks.chosen.clips[items[index].clip].transcript or "" for index in wanted]
        return system.divergences(slots, requests, transcripts, [answers[index] for index in wanted])

    return _in_chunks(chunks, items, system, Speed(), work)  # no part of the throughput


def _in_chunks(chunks: _Chunks, items: Sequence[Item], system: TextSystem, speed: Speed, work: Callable) -> list[Any]:
    """Return one result for each question, made group of utterances by group of utterances.

    Args:
        chunks: The groups.
        items: The questions.
        system: Encodes the utterances.
        speed: Counts them.
        work: From slots, (prompt, index in the slots) pairs and the indices of their questions to results.
    """
    order = chunks.order()
    results: list[Any] = [None] * len(items)
    for number, start in enumerate(range(0, len(order), chunks.size)):
        members = order[start : start + chunks.size]
        place = {clip: index for index, clip in enumerate(members)}
        wanted = [index for index, item in enumerate(items) if item.clip in place]
        if not wanted:
            continue
        slots = chunks.slots(number, members, system, speed)
        requests = [(items[index].prompt, place[items[index].clip]) for index in wanted]
        for index, value in zip(wanted, work(slots, requests, wanted), strict=True):
            results[index] = value
    return results


def _collect(config: EvalConfig, chosen: EvalSet, loader: Loader, folder: Path) -> dict[str, SystemAnswers]:
    """Return all answers to a set by system, read from disk: those of earlier runs are nowhere else."""
    systems = {}
    for name in config.systems:
        seeds, items = [], []
        for seed in range(loader.seeds(name)):
            parts = [(u, i) for u, i in units(config, chosen, loader, name, seed) if u.group != BARE]
            items = [item for _, part in parts for item in part]
            compared = {(twin.unit.group, twin.unit.task): twin for twin in twins(config, chosen, loader, name, seed)}
            replies: list[Reply] = []
            for unit, _ in parts:
                mine = _stored(load_answers(folder / ANSWERS, unit), unit)
                if (twin := compared.get((unit.group, unit.task))) is not None:
                    divergences = _stored(load_divergences(folder / DIVERGENCES, twin.unit), twin.unit)
                    for place, divergence in zip(twin.places, divergences, strict=True):
                        mine[place] = replace(mine[place], divergence=divergence)
                replies += mine
            seeds.append(replies)
        if items:
            systems[name] = SystemAnswers(items, seeds)
    return systems


def _bare(config: EvalConfig, chosen: EvalSet, loader: Loader, folder: Path) -> dict[str, dict[int, str]]:
    """Return the answers of each text system to the transcripts without a prompt, by index of the utterance."""
    answers = {}
    for name, system in config.systems.items():
        for unit, items in units(config, chosen, loader, name, 0) if system.kind == "text" else ():
            if unit.group == BARE:
                replies = _stored(load_answers(folder / ANSWERS, unit), unit)
                answers[name] = {item.clip: reply.answer for item, reply in zip(items, replies, strict=True)}
    return answers


def _known_rates(folder: Path) -> dict[str, Any]:
    """Return the throughput of other systems, as earlier runs measured it."""
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
