# SPDX-License-Identifier: Apache-2.0
"""The report for the browser: one HTML file that needs nothing else, with charts, tables and audio players inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import soundfile

from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.evaluation import charts
from nemo_mtbi.evaluation.charts import Point
from nemo_mtbi.evaluation.items import Clip, load_clip
from nemo_mtbi.evaluation.report import pick_examples, shown
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.evaluation.style import SCRIPT, STYLE
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

if TYPE_CHECKING:
    from nemo_mtbi.evaluation.figures import Answered

Curves = Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]]
_PLAYED = FrameCounter((LengthStage(1, 1),), 16000)  # any audio of one sample or more
_UNSEEN = {code: "\ufffd" for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}  # a model may write any
_LONGEST = 20.0  # seconds of audio that the page takes


@dataclass(frozen=True)
class Example:
    """A question with the answers of all systems; what ``report.pick_examples`` chooses from."""

    cut_id: str
    task: str
    prompt: str
    group: str
    text: str
    speech: str
    clip: Clip
    reference: Any
    answers: Mapping[str, str]

    @property
    def agrees(self) -> bool:
        """Whether text and speech are answered alike."""
        return exact(self.text, self.speech) == 1.0


def render_page(results: Mapping[str, Any], curves: Curves, answered: Sequence[Answered], config: EvalConfig) -> str:
    """Return the report as HTML.

    Args:
        results: What ``results.summarize`` returned.
        curves: Learning curves by system, see ``curves.read_curves``.
        answered: The answers, for examples.
        config: For their number and for who is measured against whom.
    """
    palette = _palette(results["systems"])
    parts = [f"<h1>{escape(results['title'])}</h1>", _systems(results["systems"])]
    for part in answered:
        name = part.chosen.name
        found = results["sets"][name]
        parts.append(f'<section><h2>{escape(name)}</h2><p class="quiet">{found["utterances"]} utterances, ')
        parts.append(f"{found['questions']} questions.</p>")
        if found["systems"]:
            largest = _largest(results["systems"], palette)
            parts += [_bars(name, found, largest), _gap_over_hours(name, found, results["systems"], palette)]
            parts += [_wordings(name, found, palette), _tables(found, results["systems"]), _examples(part, config)]
        parts += [f'<p class="note">Left out: {n} items {escape(why)}.</p>' for why, n in found["left_out"].items()]
        parts += [f'<p class="note">{escape(note)}.</p>' for note in found["notes"]] + ["</section>"]
    parts.append(_curves(curves, palette))
    parts += ["<section><h2>How to read this</h2><ul>"]
    parts += [f"<li>{escape(line)}</li>" for line in results["not_measured"]] + ["</ul></section>"]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{_icon()}'
    title = f"<title>{escape(results['title'])}</title>"
    body = "\n".join(part for part in parts if part)
    page = (
        f'<!doctype html>\n<html lang="en"><head>{head}{title}<style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )
    return page.translate(_UNSEEN)


def _icon() -> str:
    """An empty icon: without one a browser asks the server for it."""
    return '<link rel="icon" href="data:,">'


def _systems(systems: Mapping[str, Any]) -> str:
    kinds = {
        "speech": "hears the speech",
        "cascade": "reads the transcript of a recognizer",
        "text": "reads the reference transcript",
    }
    rows = [["system", "what it does", "seeds", "hours of speech"]]
    for name, found in systems.items():
        hours = "-" if found["hours"] is None else f"{found['hours']:g}"
        rows.append([name, kinds[found["kind"]], str(found["seeds"]), hours])
    return _table(rows)


def _palette(systems: Mapping[str, Any]) -> dict[str, int]:
    """The color of each system; systems of one line, trained on other amounts of speech, share it."""
    lines = list(dict.fromkeys(about["line"] or name for name, about in systems.items()))
    return {name: lines.index(about["line"] or name) for name, about in systems.items()}


def _largest(systems: Mapping[str, Any], palette: Mapping[str, int]) -> dict[str, int]:
    """Of each line the system that was trained on most."""
    best: dict[int, str] = {}
    for name, index in palette.items():
        if index not in best or (systems[name]["hours"] or 0) > (systems[best[index]]["hours"] or 0):
            best[index] = name
    return {name: index for name, index in palette.items() if best[index] == name}


def _points(found: Mapping[str, Any], system: str, groups: Sequence[str], key: str) -> list[Point | None]:
    figures = found["systems"].get(system, {})
    return [_point(0.0, figures.get(group, {}).get(key)) for group in groups]


def _point(x: float, figure: Mapping[str, Any] | None) -> Point | None:
    if figure is None or figure["value"] is None:
        return None
    return Point(x, figure["value"], figure["low"], figure["high"])


def _figure(title: str, caption: str, *parts: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{''.join(parts)}<figcaption>{escape(caption)}</figcaption></figure>"


def _bars(name: str, found: Mapping[str, Any], colors: Mapping[str, int]) -> str:
    parts, drawn = [], set()
    for key, title in (("agreement", "Agreement with the answer to the text"), ("right", "Right answers")):
        has = {system: {g for g, f in groups.items() if key in f} for system, groups in found["systems"].items()}
        groups = [group for group in found["groups"] if any(group in of for of in has.values())]
        shown = [system for system in colors if has.get(system)]
        if not groups:
            continue
        series = [(system, colors[system], _points(found, system, groups, key)) for system in shown]
        chart = charts.bars(f"{title}, {name}", [group_title(g) for g in groups], series)
        parts.append(f"<h4>{escape(title)}</h4>{chart}")
        drawn |= set(shown)
    if not parts:
        return ""
    caption = (
        "Shares with 95% intervals over utterances: trained tasks under wordings that were trained on, under wordings "
        "that were not, and tasks that were never trained on."
    )
    keys = charts.legend({system: index for system, index in colors.items() if system in drawn})
    return _figure("Generalization", caption, keys, *parts)


def _wordings(name: str, found: Mapping[str, Any], colors: Mapping[str, int]) -> str:
    parts = []
    for group in found["groups"]:
        rows = [
            (
                system,
                index,
                [(f"{w['task']}: {w['prompt'] or '(empty)'}", w["right"]) for w in _of(found, system, group)],
            )
            for system, index in colors.items()
        ]
        if any(dots for *_, dots in rows):
            label = f"Right answers by wording, {group_title(group)}, {name}"
            parts.append(f"<h4>{escape(group_title(group))}</h4>{charts.strips(label, rows)}")
    if not parts:
        return ""
    caption = (
        "Each dot is one wording of one task; the line goes from the lowest to the highest, the mark is the mean."
    )
    return _figure("Prompt sensitivity", caption, *parts)


def _of(found: Mapping[str, Any], system: str, group: str) -> Sequence[Mapping[str, Any]]:
    return found["systems"].get(system, {}).get(group, {}).get("wordings", [])


def _gap_over_hours(name: str, found: Mapping[str, Any], systems: Mapping[str, Any], colors: Mapping[str, int]) -> str:
    trained = {system: about for system, about in systems.items() if about["hours"] is not None}
    if len({about["hours"] for about in trained.values()}) < 2:
        return ""
    families = {about["line"] or system: colors[system] for system, about in trained.items()}
    parts = []
    for group in found["groups"]:
        series = []
        for family, index in families.items():
            points = [
                _point(about["hours"], found["systems"].get(system, {}).get(group, {}).get("behavior_gap"))
                for system, about in trained.items()
                if colors[system] == index
            ]
            kept = sorted((p for p in points if p is not None), key=lambda p: p.x)
            series.append((family, index, kept))
        label = f"Behavior gap against hours of speech, {group_title(group)}, {name}"
        chart = charts.lines(label, series, "hours of speech trained on", shares=True, markers=True, log_x=True)
        parts += [f"<h4>{escape(group_title(group))}</h4>", chart] if chart else []
    if not parts:
        return ""
    caption = "Right answers to speech divided by right answers to text: 100% loses nothing."
    return _figure("Behavior gap against hours of speech", caption, charts.legend(families), *parts)


def _curves(curves: Curves, colors: Mapping[str, int]) -> str:
    tags = list(dict.fromkeys(tag for found in curves.values() for tag in found))
    parts = []
    for tag in tags:
        series = [
            (name, colors[name], [Point(step, value) for step, value in run])
            for name, found in curves.items()
            for run in found.get(tag, ())
        ]
        few = all(len(points) <= 30 for _, _, points in series)
        chart = charts.lines(f"{tag} over steps", series, "step", shares=tag == "val_agreement", markers=few)
        parts.append(f"<h4>{escape(tag)}</h4>{chart}")
    if not parts:
        return ""
    caption = "From the TensorBoard logs of the trainings; one line for each run."
    keys = charts.legend({name: index for name, index in colors.items() if curves.get(name)})
    return f"<section><h2>Training</h2>{_figure('Learning curves', caption, keys, *parts)}</section>"


def _tables(found: Mapping[str, Any], systems: Mapping[str, Any]) -> str:
    closeness, steadiness = list(BEHAVIOR)[:4], list(BEHAVIOR)[4:]
    counts = ("abstained", "truncated", "unheard", "n")
    right = [["system", "prompts", "right", *(BEHAVIOR[key] for key in closeness)]]
    sure = [["system", "prompts", *(BEHAVIOR[key] for key in steadiness), *counts]]
    tasks = [["system", "prompts", "task", "metric", "value", "abstained", "n"]]
    for system, groups in found["systems"].items():
        for group, f in groups.items():
            name = [system, group_title(group)]
            shown_as = {key: behavior(f, key) for key in BEHAVIOR}
            right.append([*name, percent(f.get("right")), *(shown_as[key] for key in closeness)])
            sure.append([*name, *(shown_as[key] for key in steadiness), *(str(f.get(key, "-")) for key in counts)])
            tasks += [
                [*name, task, metric, measured(metric, v), str(v["abstained"]), str(v["n"])]
                for task, about in f["tasks"].items()
                for metric, v in about["metrics"].items()
            ]
    caption = "Percent; behavior gap is a ratio. In parentheses 95% intervals; = marks one of no width."
    parts = [_figure("All figures", caption, _table(right), "<h4>Wordings and counts</h4>", _table(sure))]
    spoken = transcription_rows(found, systems)
    details = {"Transcription": spoken, "Paired comparison": comparison_rows(found), "Task by task": tasks}
    for title, body in details.items():
        if len(body) > 1:
            parts.append(f"<details><summary>{title}</summary>{_table(body)}</details>")
    return "".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _examples(part: Answered, config: EvalConfig) -> str:
    speaking = next((n for n in part.systems if config.systems[n].kind == "speech"), None)
    if speaking is None or config.examples < 1:
        return ""
    text = config.text_of(speaking)
    text = text if text in part.systems else None
    listed = {name: asked.answers(0) for name, asked in part.systems.items()}
    candidates = []
    for index, item in enumerate(part.systems[speaking].items):
        answers = {name: found[index] for name, found in listed.items()}
        clip = part.chosen.clips[item.clip]
        candidates.append(
            Example(
                clip.id,
                item.task,
                item.prompt,
                item.group,
                answers[text] if text else "",
                answers[speaking],
                clip,
                item.reference,
                answers,
            )
        )
    cards = "".join(_card(example) for example in pick_examples(candidates, config.examples))
    caption = f"Answers of the first seed. Half of them are questions that {speaking} answers unlike the text."
    return _figure("Examples", caption, f'<div class="cards">{cards}</div>')


def _card(example: Example) -> str:
    said = example.clip.transcript
    lines = [_player(example.clip), f"<p><b>said</b> {escape(shown(said))}</p>" if said else ""]
    lines.append(f"<p><b>asked</b> {escape(shown(example.prompt))}</p>")
    lines.append(f'<p class="quiet">{escape(example.task)}, {escape(group_title(example.group))}</p><dl>')
    if isinstance(example.reference, str):
        lines.append(f"<dt>right answer</dt><dd>{escape(shown(example.reference))}</dd>")
    for name, answer in example.answers.items():
        same = isinstance(example.reference, str) and exact(example.reference, answer) == 1.0
        mark = ' class="same"' if same else ""
        lines.append(f"<dt>{escape(name)}</dt><dd{mark}>{escape(shown(answer))}</dd>")
    return f"<article>{''.join(lines)}</dl></article>"


def _player(clip: Clip) -> str:
    samples = load_clip(clip, _PLAYED)
    if isinstance(samples, BadAudioError):
        return f'<p class="note">no audio: {escape(samples.reason)}</p>'
    cut = samples[: int(_LONGEST * _PLAYED.sample_rate)]
    content = io.BytesIO()
    soundfile.write(content, cut.numpy(), _PLAYED.sample_rate, format="FLAC", subtype="PCM_16")
    data = base64.b64encode(content.getvalue()).decode("ascii")
    label = escape(f"utterance {clip.id}", quote=True)
    return f'<audio controls preload="metadata" aria-label="{label}" src="data:audio/flac;base64,{data}"></audio>'
