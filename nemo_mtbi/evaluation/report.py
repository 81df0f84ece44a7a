# SPDX-License-Identifier: Apache-2.0
"""The report for the browser: one HTML file that needs nothing else, with charts, tables and audio players inside.

This module prepares the values; ``templates/report.html.j2`` lays them out, and escapes all of them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import soundfile
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.evaluation import charts
from nemo_mtbi.evaluation.charts import Point
from nemo_mtbi.evaluation.examples import Example, displayed, examples_of, pick_examples, speech_system
from nemo_mtbi.evaluation.figures import AnsweredSet
from nemo_mtbi.evaluation.items import Clip, load_clip
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.evaluation.tables import (
    BEHAVIOR,
    behavior,
    comparison_rows,
    group_title,
    measured,
    percent,
    transcription_rows,
)
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.metrics.scorers import exact

Curves = Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]]
_KINDS = {
    "speech": "answers the speech",
    "cascade": "reads the transcript of a recognizer",
    "text": "reads the reference transcript",
}
_PLAYED = FrameCounter((LengthStage(1, 1),), 16000)  # any audio of one sample or more
_UNSEEN = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}  # a model may write any
_LONGEST = 20.0  # seconds of audio that the page takes


@dataclass
class ChartFigure:
    """Charts with a common title and caption.

    Attributes:
        title: Of the figure.
        caption: Below it.
        legend: CSS colors by name.
        charts: Title and SVG of each chart, under ``title`` and ``svg``.
    """

    title: str
    caption: str
    legend: dict[str, str] = field(default_factory=dict)
    charts: list[dict[str, str | Markup]] = field(default_factory=list)

    def add(self, title: str, svg: Markup) -> None:
        """Add a chart, unless it is empty."""
        if svg:
            self.charts.append({"title": title, "svg": svg})


def render_report(
    results: Mapping[str, Any], curves: Curves, answered: Sequence[AnsweredSet], config: EvalConfig
) -> str:
    """Return the report as HTML.

    Args:
        results: What ``results.collect_results`` returned.
        curves: Learning curves by system, see ``curves.read_curves``.
        answered: The answers, for examples.
        config: Has the number of examples and the text system of each speech system.
    """
    palette = _palette(results["systems"])
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=results["title"],
            systems=_systems(results["systems"]),
            sets=[_set(results, palette, part, config) for part in answered],
            training=_curves(curves, palette),
            not_measured=results["not_measured"],
        )
    )
    return page.translate(_UNSEEN)


def stylesheet() -> str:
    """Return the CSS of the report, which charts need for their colors."""
    return _environment().get_template("style.css.j2").render()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = PackageLoader("nemo_mtbi.evaluation")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _systems(systems: Mapping[str, Any]) -> list[list[str]]:
    rows = [["system", "what it does", "seeds", "hours of speech"]]
    for name, about in systems.items():
        hours = "-" if about["hours"] is None else f"{about['hours']:g}"
        rows.append([name, _KINDS[about["kind"]], str(about["seeds"]), hours])
    return rows


def _set(
    results: Mapping[str, Any], palette: Mapping[str, int], part: AnsweredSet, config: EvalConfig
) -> dict[str, Any]:
    """Return the values of one section."""
    name, systems = part.chosen.name, results["systems"]
    about = results["sets"][name]
    keys = ("utterances", "questions", "left_out", "notes")
    section: dict[str, Any] = {"name": name, **{key: about[key] for key in keys}}
    section |= {"figures": [], "tables": None, "examples": [], "speech": speech_system(part, config)}
    if about["systems"]:
        figures = [
            _bars(name, about, _largest(systems, palette)),
            _gap_over_hours(name, about, systems, palette),
            _wordings(name, about, palette),
        ]
        section["figures"] = [figure for figure in figures if figure.charts]
        section["tables"] = _tables(about, systems)
        section["examples"] = [_card(x) for x in pick_examples(examples_of(part, config), config.examples)]
    return section


def _palette(systems: Mapping[str, Any]) -> dict[str, int]:
    """Return the color of each system; systems of one line, trained on other amounts of speech, share it."""
    lines = list(dict.fromkeys(about["line"] or name for name, about in systems.items()))
    return {name: lines.index(about["line"] or name) for name, about in systems.items()}


def _largest(systems: Mapping[str, Any], palette: Mapping[str, int]) -> dict[str, int]:
    """Return the color of the system of each line that was trained on most speech."""
    best: dict[int, str] = {}
    for name, index in palette.items():
        if index not in best or (systems[name]["hours"] or 0) > (systems[best[index]]["hours"] or 0):
            best[index] = name
    return {name: index for name, index in palette.items() if best[index] == name}


def _legend(colors: Mapping[str, int]) -> dict[str, str]:
    return {name: charts.color(index) for name, index in colors.items()}


def _point(x: float, figure: Mapping[str, Any] | None) -> Point | None:
    if figure is None or figure["value"] is None:
        return None
    return Point(x, figure["value"], figure["low"], figure["high"])


def _bars(name: str, about: Mapping[str, Any], colors: Mapping[str, int]) -> ChartFigure:
    figure = ChartFigure(
        "Generalization",
        "Shares with 95% intervals over utterances: trained tasks under wordings that were trained on, under wordings "
        "that were not, and tasks that were never trained on.",
    )
    drawn = set()
    for key, title in (("agreement", "Agreement with the answer to the text"), ("right", "Right answers")):
        has = {system: {g for g, f in groups.items() if key in f} for system, groups in about["systems"].items()}
        groups = [group for group in about["groups"] if any(group in of for of in has.values())]
        shown = [system for system in colors if has.get(system)]
        if not groups:
            continue
        values = {system: about["systems"][system] for system in shown}
        series = [(x, colors[x], [_point(0.0, values[x].get(g, {}).get(key)) for g in groups]) for x in shown]
        figure.add(title, charts.bars(f"{title}, {name}", [group_title(g) for g in groups], series))
        drawn |= set(shown)
    figure.legend = _legend({system: index for system, index in colors.items() if system in drawn})
    return figure


def _wordings(name: str, about: Mapping[str, Any], colors: Mapping[str, int]) -> ChartFigure:
    figure = ChartFigure(
        "Prompt sensitivity",
        "Each dot is one wording of one task; the line goes from the lowest to the highest, the mark is the mean.",
    )
    for group in about["groups"]:
        rows = []
        for system, index in colors.items():
            wordings = about["systems"].get(system, {}).get(group, {}).get("wordings", [])
            dots = [(f"{w['task']}: {w['prompt'] or '(empty)'}", w["right"]) for w in wordings]
            rows.append((system, index, dots))
        if any(dots for *_, dots in rows):
            label = f"Right answers by wording, {group_title(group)}, {name}"
            figure.add(group_title(group), charts.strips(label, rows))
    return figure


def _gap_over_hours(
    name: str, about: Mapping[str, Any], systems: Mapping[str, Any], colors: Mapping[str, int]
) -> ChartFigure:
    figure = ChartFigure(
        "Behavior gap against hours of speech",
        "Right answers to speech divided by right answers to text: 100% loses nothing.",
    )
    trained = {system: facts for system, facts in systems.items() if facts["hours"] is not None}
    if len({facts["hours"] for facts in trained.values()}) < 2:
        return figure
    families = {facts["line"] or system: colors[system] for system, facts in trained.items()}
    for group in about["groups"]:
        series = []
        for family, index in families.items():
            points = [
                _point(facts["hours"], about["systems"].get(system, {}).get(group, {}).get("behavior_gap"))
                for system, facts in trained.items()
                if colors[system] == index
            ]
            series.append((family, index, sorted((p for p in points if p is not None), key=lambda p: p.x)))
        label = f"Behavior gap against hours of speech, {group_title(group)}, {name}"
        chart = charts.lines(label, series, "hours of speech trained on", shares=True, markers=True, log_x=True)
        figure.add(group_title(group), chart)
    figure.legend = _legend(families)
    return figure


def _curves(curves: Curves, colors: Mapping[str, int]) -> ChartFigure:
    caption = "From the TensorBoard logs of the trainings; one line for each run."
    figure = ChartFigure("Learning curves", caption, _legend({n: i for n, i in colors.items() if curves.get(n)}))
    for tag in dict.fromkeys(tag for of_system in curves.values() for tag in of_system):
        series = [
            (name, colors[name], [Point(step, value) for step, value in run])
            for name, of_system in curves.items()
            for run in of_system.get(tag, ())
        ]
        few = all(len(points) <= 30 for _, _, points in series)
        figure.add(tag, charts.lines(f"{tag} over steps", series, "step", tag == "val_agreement", markers=few))
    return figure


def _tables(about: Mapping[str, Any], systems: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of all tables of a set."""
    closeness, steadiness = list(BEHAVIOR)[:4], list(BEHAVIOR)[4:]
    counts = ("abstained", "truncated", "unheard", "n")
    right = [["system", "prompts", "right", *(BEHAVIOR[key] for key in closeness)]]
    steady = [["system", "prompts", *(BEHAVIOR[key] for key in steadiness), *counts]]
    tasks = [["system", "prompts", "task", "metric", "value", "abstained", "n"]]
    for system, groups in about["systems"].items():
        for group, figures in groups.items():
            head = [system, group_title(group)]
            cells = {key: behavior(figures, key) for key in BEHAVIOR}
            right.append([*head, percent(figures.get("right")), *(cells[key] for key in closeness)])
            shown = (str(figures.get(key, "-")) for key in counts)
            steady.append([*head, *(cells[key] for key in steadiness), *shown])
            tasks += [
                [*head, task, metric, measured(metric, value), str(value["abstained"]), str(value["n"])]
                for task, of_task in figures["tasks"].items()
                for metric, value in of_task["metrics"].items()
            ]
    details = {"Transcription": transcription_rows(about, systems), "Paired comparison": comparison_rows(about)}
    return {"right": right, "counts": steady, "details": {**details, "Task by task": tasks}}


def _card(example: Example) -> dict[str, Any]:
    """Return the values of one example."""
    reference = example.reference if isinstance(example.reference, str) else None
    said = example.clip.transcript
    answers = [
        {
            "system": name,
            "text": displayed(answer),
            "right": reference is not None and exact(reference, answer) == 1.0,
        }
        for name, answer in example.answers.items()
    ]
    return {
        **_audio(example.clip),
        "utterance": example.clip.id,
        "transcript": displayed(said) if said else "",
        "prompt": displayed(example.prompt),
        "task": example.task,
        "group": group_title(example.group),
        "reference": None if reference is None else displayed(reference),
        "answers": answers,
    }


def _audio(clip: Clip) -> dict[str, str]:
    """Return the beginning of an utterance as FLAC in base64, or the reason why there is none."""
    samples = load_clip(clip, _PLAYED)
    if isinstance(samples, BadAudioError):
        return {"audio": "", "no_audio": samples.reason}
    beginning = samples[: int(_LONGEST * _PLAYED.sample_rate)]
    content = io.BytesIO()
    soundfile.write(content, beginning.numpy(), _PLAYED.sample_rate, format="FLAC", subtype="PCM_16")
    return {"audio": base64.b64encode(content.getvalue()).decode("ascii"), "no_audio": ""}
