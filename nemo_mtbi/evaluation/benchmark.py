# SPDX-License-Identifier: Apache-2.0
"""The benchmark at the end of a training: an evaluation of one speech system, in memory, with its LLM as reference."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.data.behaviors import custom_value, transcript
from nemo_mtbi.evaluation.figures import AnsweredSet, Resampling, SystemAnswers
from nemo_mtbi.evaluation.items import Clip, EvalSet, Item, check_references, metrics_of
from nemo_mtbi.evaluation.questions import questions
from nemo_mtbi.evaluation.results import collect_results
from nemo_mtbi.evaluation.settings import EvalConfig, SystemConfig
from nemo_mtbi.evaluation.summary import summary
from nemo_mtbi.evaluation.systems import TextSystem
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text
from nemo_mtbi.targets.tasks import TaskPool

SET, SPEECH, TEXT = "test", "mtbi", "text"  # names in the results, as in conf/mtbi_eval.yaml


@dataclass(frozen=True)
class TrainingRecord:
    """Measurements of a training.

    Attributes:
        seconds: Wall clock of the training alone.
        steps: Optimizer steps.
        peak_rss_gib: Most memory of the process, in GiB.
    """

    seconds: float
    steps: int
    peak_rss_gib: float


def benchmark_set(cuts: Iterable[Cut], pool: TaskPool, seed: int) -> EvalSet:
    """Return the set of every task for every cut; right answers are those of the custom field ``references``.

    Raises:
        ValueError: there is no cut, two have the same id, or a reference breaks the format of its task.
    """
    cuts = list(cuts)
    clips = [Clip(cut.id, cut, transcript(cut)) for cut in cuts]
    references = [custom_value(cut, "references") or {} for cut in cuts]
    items = [
        Item(
            question.utterance,
            question.task.name,
            question.group,
            question.prompt,
            metrics_of(question.task),
            references[question.utterance].get(question.task.name),
        )
        for question in questions(cuts, pool, seed)
    ]
    chosen = EvalSet(SET, clips, items)
    check_references(chosen)
    return chosen


def run_benchmark(speech: TextSystem, text: TextSystem, chosen: EvalSet, progress: bool = True) -> AnsweredSet:
    """Answer every question from the transcript and from the speech, all in one batch of requests.

    Args:
        speech: The trained model.
        text: Its LLM on transcripts, as it was before the training.
        chosen: The questions.
        progress: Show a bar.

    Raises:
        BadAudioError: an utterance can't be used. A benchmark leaves nothing out.
    """
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
    requests = [(item.prompt, item.clip) for item in chosen.items]
    frames = speech.slots(chosen.clips)
    for slot in frames.values:
        if isinstance(slot, BadAudioError):
            raise slot  # before any question is answered
    seeds = {}
    with bar if progress else nullcontext(), Heartbeat(lambda: bar_text(bar), bar.console, progress):
        lines = {name: bar.add_task(f"answers to {name}", total=len(requests)) for name in ("text", "speech")}
        slots = text.slots(chosen.clips)
        seeds[TEXT] = text.ask(slots, requests, "raise", lambda n: bar.advance(lines["text"], n))
        seeds[SPEECH] = speech.ask(frames, requests, "raise", lambda n: bar.advance(lines["speech"], n))
    return AnsweredSet(chosen, {name: SystemAnswers(chosen.items, [seeds[name]]) for name in (SPEECH, TEXT)}, {})


def benchmark_config(title: str, nemo: Path, llm: str | None = None) -> EvalConfig:
    """Return the configuration of the evaluation that a benchmark is.

    Args:
        title: Of the results.
        nemo: The saved model.
        llm: The text LLM, where it is another one than that of the model.
    """
    text = SystemConfig(kind="text", of=None if llm else SPEECH, llm=llm)
    systems = {SPEECH: SystemConfig(nemo=str(nemo)), TEXT: text}
    return EvalConfig(str(nemo.parent), title, systems, {}, compare_with=SPEECH)


def benchmark_results(config: EvalConfig, answered: AnsweredSet, seed: int, train: TrainingRecord) -> dict[str, Any]:
    """Return ``results.json`` of a training: that of an evaluation, with a summary and the facts of the training.

    Args:
        config: What :func:`benchmark_config` returned.
        answered: What :func:`run_benchmark` returned.
        seed: Of the training.
        train: Its measurements.
    """
    results = collect_results(config, [answered], Resampling(config.resamples, config.seed))
    facts: dict[str, Any] = {"seed": seed, "train": asdict(train), "nemo": config.systems[SPEECH].nemo}
    return results | summary(answered, results["sets"][SET]["systems"], SPEECH, TEXT) | facts
