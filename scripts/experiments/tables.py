#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The tables and figures of RESULTS.md, from what an experiment left in its folder.

python scripts/experiments/tables.py OUT [--figures FOLDER]

Prints Markdown: every system with its intervals and the command that makes its row anew, what LLMs with adapters still
answer to text, whose answers have a foreign style, agreement by task, agreement in validation by step, and every
comparison. With ``--figures`` writes the curves as SVG.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from nemo_mtbi.evaluation import charts
from nemo_mtbi.evaluation.curves import read_curves
from nemo_mtbi.evaluation.report import stylesheet

# Columns of the table: title, set, group, figure, and whether it is a share.
FIGURES = (
    ("seen prompts", "test", "seen", "agreement", True),
    ("held-out wordings", "test", "heldout_wordings", "agreement", True),
    ("held-out tasks", "test", "heldout_tasks", "agreement", True),
    ("new family", "letters", "heldout_tasks", "agreement", True),
    ("held-out tasks: right", "test", "heldout_tasks", "right", True),
    ("held-out tasks: KL", "test", "heldout_tasks", "mean_kl", False),
)
GROUPS = {"seen": "seen prompts", "heldout_wordings": "held-out wordings", "heldout_tasks": "held-out tasks"}
NO_SPEECH = ("text", "cascade")  # their answers are part of every evaluation
OPENING = "the answer is "  # of the targets of the condition ``style``
_LEGEND = 26  # height of a row of names above a chart, in its units


def cell(figure: Mapping | None, share: bool = True) -> str:
    """Value, 95% interval over utterances, and deviation over seeds."""
    if figure is None or figure["value"] is None:
        return "–"
    scale, digits = (100, 1) if share else (1, 3)
    value, low, high = (f"{scale * figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    deviation = (figure.get("seeds") or {}).get("deviation")
    spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{value} ({low}–{high}){spread}"


def systems_table(results: Mapping) -> str:
    """All systems: agreement by group, right answers, KL, WER and the command of the row."""
    titles = [title for title, *_ in FIGURES]
    rows = [["system", "seeds", *titles, "WER", "made by"]]
    for name, system in results["systems"].items():
        figures = {key: chosen["systems"][name] for key, chosen in results["sets"].items()}
        shown = [cell(figures[key].get(group, {}).get(figure), share) for _, key, group, figure, share in FIGURES]
        wer = cell(figures["test"]["seen"]["metrics"].get("wer"))
        made = "any" if name in NO_SPEECH else f"`--only {name.removeprefix('text of ')}`"
        rows.append([name, str(system["seeds"]), *shown, wer, made])
    return markdown(rows)


def text_table(results: Mapping) -> str:
    """Right answers to text of the LLM as it was, and of each that was trained along."""
    columns = [column for column in FIGURES if column[3] == "agreement"]
    rows = [["LLM", *(title for title, *_ in columns)]]
    for name, system in results["systems"].items():
        if system["kind"] == "text":
            values = [results["sets"][key]["systems"][name][group]["right"] for _, key, group, *_ in columns]
            rows.append([name, *(cell(figure) for figure in values)])
    return markdown(rows)


def style_table(predictions: Path) -> str:
    """Systems some of whose answers open in the style of the condition ``style``: share of these, and of right ones.

    Right: what follows the opening is the LLM's own answer to the text.
    """
    total, styled, right = collections.Counter(), collections.Counter(), collections.Counter()
    with predictions.open() as lines:
        for line in lines:
            answer = json.loads(line)
            key = answer["system"], answer["set"], answer["group"]
            opens = answer["answer"].startswith(OPENING)
            total[key] += 1
            styled[key] += opens
            right[key] += opens and answer["answer"].removeprefix(OPENING) == answer["reference"]
    columns = [column for column in FIGURES if column[3] == "agreement"]
    rows = [["system", *(title for title, *_ in columns)]]
    for name in dict.fromkeys(system for (system, *_), count in styled.items() if count):
        keys = [(name, key, group) for _, key, group, *_ in columns]
        rows.append(
            [name, *(f"{100 * styled[k] / total[k]:.1f}, right {100 * right[k] / total[k]:.1f}" for k in keys)]
        )
    return markdown(rows)


def tasks_table(results: Mapping, names: Sequence[str]) -> str:
    """Agreement by task, in percent."""
    rows = [["group", "task", *names]]
    for key, chosen in results["sets"].items():
        systems = chosen["systems"]
        for group in (group for group in ("seen", "heldout_tasks") if group in systems[names[0]]):
            for task in systems[names[0]][group]["tasks"]:
                values = [systems[name][group]["tasks"][task]["agreement"]["value"] for name in names]
                title = "new family" if key == "letters" else GROUPS[group]
                rows.append([title, task, *(f"{100 * value:.1f}" for value in values)])
    return markdown(rows)


def comparisons_table(results: Mapping) -> str:
    """Differences of agreement, in points, with interval and p value."""
    rows = [["set", "prompts", "system", "minus", "difference", "p", "p by Holm"]]
    for key, chosen in results["sets"].items():
        for found in chosen["comparisons"]:
            if found["measure"] == "agreement":
                low, high, difference = (100 * found[name] for name in ("low", "high", "difference"))
                shown = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
                tested = [f"{found[name]:.4f}" for name in ("p", "p_holm")]
                rows.append([key, GROUPS[found["group"]], found["system"], found["against"], shown, *tested])
    return markdown(rows)


def validation(out: Path) -> dict[str, list[charts.Point]]:
    """Agreement of validation by step for each system: mean over seeds, and one deviation to both sides.

    The sides of a share may lie below 0 or above 1.
    """
    curves = {}
    for folder in sorted((out / "runs").iterdir()):
        by_step: dict[float, list[float]] = {}
        for run in read_curves([str(run) for run in sorted(folder.glob("seed*"))]).get("val_agreement", []):
            for step, value in run:
                by_step.setdefault(step + 1, []).append(value)
        curves[folder.name] = [
            charts.Point(step, statistics.mean(values), *_sides(values)) for step, values in sorted(by_step.items())
        ]
    return curves


def _sides(values: Sequence[float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return mean - deviation, mean + deviation


def validation_table(curves: Mapping[str, Sequence[charts.Point]]) -> str:
    """Agreement of validation by step, one table for each set of steps."""
    by_steps: dict[tuple, list[list[str]]] = {}
    for name, points in curves.items():
        shown = [f"{100 * p.y:.1f}" + ("" if p.high is None else f" ± {100 * (p.high - p.y):.1f}") for p in points]
        by_steps.setdefault(tuple(p.x for p in points), []).append([name, *shown])
    return "\n\n".join(markdown([["system", *(f"step {s:g}" for s in steps)], *r]) for steps, r in by_steps.items())


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def standalone(chart: str, names: Sequence[str]) -> str:
    """A chart of the report as a file of its own: with its colors, on a ground, with names above it."""
    keys, left = [], 56
    for index, name in enumerate(names):
        keys.append(f'<rect x="{left}" y="-20" width="11" height="11" rx="3" fill="{charts.color(index)}"/>')
        keys.append(f'<text class="tick" x="{left + 16}" y="-10">{name}</text>')
        left += 34 + 7 * len(name)
    start, _, rest = str(chart).partition(">")
    box = start.split('viewBox="')[1].split('"')[0]
    _, _, width, height = (float(part) for part in box.split())
    start = start.replace(f'viewBox="{box}"', f'viewBox="0 {-_LEGEND} {width:g} {height + _LEGEND:g}"')
    start = start.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ')
    ground = f'<rect y="{-_LEGEND}" width="{width:g}" height="{height + _LEGEND:g}" fill="var(--card)"/>'
    return f"{start}><style>{stylesheet()}</style>{ground}{''.join(keys)}{rest}\n"


def hours_chart(results: Mapping, group: str, lines: Sequence[str]) -> str:
    """Agreement against hours of speech."""
    systems, of_test = results["systems"], results["sets"]["test"]["systems"]
    series = []
    for index, line in enumerate(lines):
        names = sorted((n for n, s in systems.items() if s.get("line") == line), key=lambda n: systems[n]["hours"])
        figures = [(systems[name]["hours"], of_test[name][group]["agreement"]) for name in names]
        series.append((line, index, [charts.Point(x, f["value"], f["low"], f["high"]) for x, f in figures]))
    title = f"Agreement with the answer to text, {GROUPS[group]}, against hours of speech"
    chart = charts.lines(title, series, "hours of speech trained on", shares=True, markers=True, log_x=True)
    return standalone(chart, lines)


def steps_chart(curves: Mapping[str, Sequence[charts.Point]], names: Sequence[str]) -> str:
    """Agreement of validation by step."""
    series = [(name, index, curves[name]) for index, name in enumerate(names)]
    return standalone(charts.lines("Agreement in validation by step", series, "step", True, True), names)


def write_figures(folder: Path, results: Mapping, curves: Mapping[str, Sequence[charts.Point]]) -> None:
    """The figures that RESULTS.md shows."""
    rivals = ("mtbi", "imitation", "transcription_sft", "continuation")
    endings = {"steps-100": "-100", "steps-10": "-10", "steps-long": "+long-100", "steps-lora": "+lora-100"}
    steps = {name: [rival + end for rival in rivals if rival + end in curves] for name, end in endings.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for group in ("heldout_wordings", "heldout_tasks"):
        (folder / f"hours-{group}.svg").write_text(hours_chart(results, group, rivals))
    for name, shown in ((name, shown) for name, shown in steps.items() if shown):
        (folder / f"{name}.svg").write_text(steps_chart(curves, shown))


def main() -> None:
    """Print the tables of an experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that generalization.sh made")
    parser.add_argument("--figures", type=Path, help="write the curves here, as SVG")
    args = parser.parse_args()
    results, curves = json.loads((args.out / "evaluation" / "results.json").read_text()), validation(args.out)
    order = list(yaml.safe_load((args.out / "evaluation.yaml").read_text())["systems"])
    results["systems"] = {name: results["systems"][name] for name in order}  # JSON has them by name
    names = [name for name, s in results["systems"].items() if s["kind"] == "speech" and s.get("hours")]
    most = max(results["systems"][name]["hours"] for name in names)
    whole = [name for name in names if results["systems"][name]["hours"] == most]
    print("## Systems", systems_table(results), sep="\n\n", end="\n\n")
    print("## Text of the LLMs", text_table(results), sep="\n\n", end="\n\n")
    answers = args.out / "evaluation" / "predictions.jsonl"
    print(f"## Answers that open with {OPENING!r}", style_table(answers), sep="\n\n", end="\n\n")
    print("## Agreement by task", tasks_table(results, whole), sep="\n\n", end="\n\n")
    print("## Agreement in validation", validation_table(curves), sep="\n\n", end="\n\n")
    print("## Comparisons", comparisons_table(results), sep="\n\n")
    if args.figures:
        write_figures(args.figures, results, curves)


if __name__ == "__main__":
    main()
