# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation: figures, every answer, a Markdown table, a report for the browser.

``results.json`` has one schema, whatever wrote it:

- ``title``; ``systems``: kind, seeds and so on of each; ``sets``: for each set its counts, notes, ``comparisons`` and
  ``systems`` → group → figures, as :func:`nemo_mtbi.evaluation.figures.describe` returns them; ``not_measured``.
- After a training also ``seed``, ``train`` and ``nemo``, and the summary of its benchmark: ``transcription``,
  ``behavior`` and ``tasks`` (:mod:`nemo_mtbi.evaluation.summary`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nemo_mtbi.evaluation.curves import read_curves
from nemo_mtbi.evaluation.figures import AnsweredSet, Resampling, comparisons, describe, score
from nemo_mtbi.evaluation.files import rounded, write_json, write_text
from nemo_mtbi.evaluation.items import EvalSet, Item, find_metric
from nemo_mtbi.evaluation.report import render_report
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.evaluation.tables import group_order, markdown
from nemo_mtbi.evaluation.units import ANSWERS, DIVERGENCES
from nemo_mtbi.io.paths import refuse_overwriting

PREDICTIONS, RESULTS, TABLE, REPORT = "predictions.jsonl", "results.json", "results.md", "report.html"
THROUGHPUT = "throughput.json"
NOT_MEASURED = (
    "What only an outside judge could score (the quality of free-form answers, chain of thought) is left out.",
    "Intervals: bootstrap over utterances, 95%. `=` marks one of no width: all utterances are alike, which is no "
    "certainty. Worst wording and spread over wordings have the interval of their mean over seeds instead.",
)


def spare_inputs(config: EvalConfig, folder: Path) -> None:
    """Refuse a folder where the results would replace inputs, or the results of another script.

    Raises:
        ValueError: names the file.
    """
    inputs: dict[str, list[str | None]] = {}
    for name, system in config.systems.items():
        paths = (system.llm, system.asr, system.hypotheses)
        inputs[f"systems.{name}"] = [*system.nemos, *(path for path in paths if path != "demo")]
    for name, chosen in config.sets.items():
        inputs[f"sets.{name}"] = [path for path in (chosen.cuts, chosen.path, chosen.tasks) if path != "demo"]
    written = [folder / name for name in (PREDICTIONS, RESULTS, TABLE, REPORT, THROUGHPUT)]
    answers = [path for part in (ANSWERS, DIVERGENCES) for path in (folder / part).rglob("*.jsonl")]
    read = {key: [path for path in paths if path] for key, paths in inputs.items()}
    refuse_overwriting(read, {"output_dir": [*written, *answers]})
    there = next((path for path in written if path.exists()), None)
    if there is not None and not is_evaluation(folder):
        raise ValueError(
            f"output_dir={config.output_dir}: {there} is there and is not of an evaluation: give a folder of its own, "
            f"such as {folder / 'eval'}"
        )


def is_evaluation(folder: Path) -> bool:
    """Return whether the results in a folder, if any, are those of an evaluation."""
    if not (folder / RESULTS).exists():
        return (folder / ANSWERS).is_dir()
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(results, dict) and {"systems", "sets"} <= set(results) and "train" not in results


def write_evaluation(
    config: EvalConfig, answered: Sequence[AnsweredSet], folder: Path, resampling: Resampling, console: Console
) -> Path:
    """Write ``predictions.jsonl``, ``results.json``, ``results.md`` and ``report.html``; print the table.

    Returns:
        The path of ``report.html``.
    """
    results = rounded(collect_results(config, answered, resampling))
    write_text(folder / PREDICTIONS, "".join(_prediction_lines(config, answered)))
    write_json(folder / RESULTS, results)
    write_text(folder / TABLE, markdown(results))
    console.print(markdown(results, details=False), markup=False, highlight=False, soft_wrap=True)
    return write_text(folder / REPORT, render_report(results, _curves(config), answered, config))


def check_measurable(config: EvalConfig, sets: Sequence[EvalSet]) -> None:
    """Raise ValueError unless there will be figures to report.

    Raises:
        ValueError: a set has neither references nor a text system to compare with, or there are no learning curves
            where the configuration says.
    """
    for chosen in sets:
        able = [name for name, system in config.systems.items() if system.kind != "text" or not chosen.untranscribed]
        judged = any(item.reference is not None for item in chosen.items)
        if chosen.items and not judged and not any(config.text_of(name) in able for name in able):
            raise ValueError(
                f"set {chosen.name!r} has no right answers, and there is no text system to compare with: add "
                "references, or a system of kind text"
            )
    _curves(config)


def _curves(config: EvalConfig) -> dict[str, Any]:
    """Return the learning curves by system."""
    curves: dict[str, Any] = {}
    for name, system in config.systems.items():
        try:
            curves |= {name: read_curves(system.logs)} if system.logs else {}
        except ValueError as error:
            raise ValueError(f"systems.{name}.{error}: give the folder of its training, or leave logs out") from error
    return curves


def collect_results(config: EvalConfig, answered: Sequence[AnsweredSet], resampling: Resampling) -> dict[str, Any]:
    """Return all figures as one JSON value, the content of ``results.json``."""
    systems = {}
    for name, system in config.systems.items():
        about = {"kind": system.kind, "of": system.of, "against": config.text_of(name), "hours": system.hours}
        systems[name] = {**about, "line": system.line, "seeds": config.seeds(name)}
    sets = {part.chosen.name: _set_figures(config, part, resampling) for part in answered}
    return {"title": config.title, "systems": systems, "sets": sets, "not_measured": list(NOT_MEASURED)}


def _set_figures(config: EvalConfig, part: AnsweredSet, resampling: Resampling) -> dict[str, Any]:
    chosen, notes = part.chosen, list(part.chosen.notes)
    missing = [name for name in config.systems if name not in part.systems and chosen.items]
    if missing:
        notes.append(f"left out, since {chosen.untranscribed} utterances have no transcript: {', '.join(missing)}")
    groups = group_order(item.group for item in chosen.items)
    figures: dict[str, dict[str, Any]] = {}
    for name, asked in part.systems.items():
        other = config.text_of(name)
        text = part.systems.get(other) if other else None
        unprompted = part.bare.get(other) if other else None
        figures[name] = {}
        for group in groups:
            mine, twin = asked.in_group(group), text and text.in_group(group)
            bare = [unprompted.get(item.clip, "") for item in mine.items] if unprompted else None
            figures[name][group] = describe(chosen, mine, twin, bare, resampling)
    texts = {name: config.text_of(name) for name in config.systems}
    return {
        "groups": groups,
        "utterances": len(chosen.clips),
        "questions": len(chosen.items),
        "left_out": dict(sorted(chosen.left_out.items())),
        "notes": notes,
        "systems": figures,
        "comparisons": comparisons(chosen, part.systems, config.pairs, texts, resampling),
    }


def points_of(item: Item, answer: str) -> float | None:
    """Return the score of one answer by the first metric of its item; None where it has none of its own."""
    if item.reference is None or not item.metrics or not find_metric(item.metrics[0]).per_item:
        return None
    return score([item], [answer]).items[0]


def _prediction_lines(config: EvalConfig, answered: Sequence[AnsweredSet]) -> Iterator[str]:
    for part in answered:
        for name in config.systems:
            if name not in part.systems:
                continue
            runs = part.systems[name]
            for seed, replies in enumerate(runs.seeds):
                for item, reply in zip(runs.items, replies, strict=True):
                    clip = part.chosen.clips[item.clip]
                    line = {"set": part.chosen.name, "system": name, "seed": seed, "group": item.group}
                    line |= {"task": item.task, "utterance": clip.id, "prompt": item.prompt}
                    line |= {"transcript": clip.transcript, "reference": item.reference, "answer": reply.answer}
                    line |= {"score": points_of(item, reply.answer), "metric": (item.metrics or (None,))[0]}
                    line |= {"tokens": reply.tokens, "truncated": reply.truncated, "unheard": reply.unheard}
                    line |= {"kl": reply.divergence and reply.divergence.kl}
                    yield json.dumps(rounded(line), ensure_ascii=False) + "\n"
