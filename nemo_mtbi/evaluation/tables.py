# SPDX-License-Identifier: Apache-2.0
"""Tables of an evaluation as Markdown, and the text of their cells for any format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nemo_mtbi.evaluation.items import find_metric
from nemo_mtbi.evaluation.questions import GROUPS
from nemo_mtbi.io.display import printable

_MISSING = "-"
_MARKUP = "<>&|[]\\`"  # character references stay text in every dialect of Markdown
BEHAVIOR = {
    "agreement": "agreement with text",
    "behavior_gap": "behavior gap",
    "mean_kl": "KL from text, nats per token",
    "anchor_bias": "anchor bias",
    "prompt_worst": "worst wording",
    "prompt_spread": "spread over wordings",
}
NO_SHARES = ("behavior_gap", "mean_kl")  # of these; all others are shown in percent


def group_order(names: Iterable[str]) -> list[str]:
    """Return groups as they stand in tables: those of a task pool first, in their order."""
    known = list(GROUPS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def group_title(name: str) -> str:
    """Return the name of a group for readers."""
    return GROUPS.get(name, name.replace("_", " "))


def markdown(results: Mapping[str, Any], details: bool = True) -> str:
    """Return the figures as Markdown tables; with ``details`` task by task, too."""
    lines = [f"# {in_markdown(results['title'])}", ""]
    for name, about in results["sets"].items():
        lines += [
            f"## {in_markdown(name)}",
            "",
            f"{about['utterances']} utterances, {about['questions']} questions.",
            "",
        ]
        if about["systems"]:
            lines += _right_table(about) + _transcription_table(about, results["systems"]) + _behavior_table(about)
            lines += (_metric_table(about) if details or not _right_table(about) else []) + _comparison_table(about)
        lines += [f"Left out: {count} items {in_markdown(why)}." for why, count in about["left_out"].items()]
        lines += [f"Note: {in_markdown(note)}." for note in about["notes"]] + [""]
    lines += [f"- {line}" for line in results["not_measured"]]
    return "\n".join(lines) + "\n"


def _right_table(about: Mapping[str, Any]) -> list[str]:
    groups = [g for g in about["groups"] if any("right" in s[g] for s in about["systems"].values())]
    if not groups:
        return []
    rows = [["system", *(f"{group_title(g)}: right" for g in groups), "abstained", "truncated", "seeds"]]
    for name, figures in about["systems"].items():
        cells = [percent(figures[g].get("right")) for g in groups]
        counts = [str(sum(figures[g].get(key, 0) for g in figures)) for key in ("abstained", "truncated")]
        rows.append([name, *cells, *counts, str(max(figures[g]["seeds"] for g in figures))])
    return table(rows)


def transcription_rows(about: Mapping[str, Any], systems: Mapping[str, Any]) -> list[list[str]]:
    """Return the error rates of transcripts, under a head; systems that read the transcript are left out."""
    rows = [["system", "prompts", "WER of the transcription", "CER of the transcription", "n"]]
    for name, figures in about["systems"].items():
        for group in about["groups"]:
            rates = figures[group].get("transcription")
            if rates and systems[name]["kind"] != "text":
                cells = [percent(rates["wer"]), percent(rates["cer"]), str(rates["wer"]["n"])]
                rows.append([name, group_title(group), *cells])
    return rows


def _transcription_table(about: Mapping[str, Any], systems: Mapping[str, Any]) -> list[str]:
    rows = transcription_rows(about, systems)
    return table(rows) if len(rows) > 1 else []


def _behavior_table(about: Mapping[str, Any]) -> list[str]:
    rows = [["system", "prompts", *BEHAVIOR.values()]]
    for name, figures in about["systems"].items():
        for group in about["groups"]:
            cells = [behavior(figures[group], key) for key in BEHAVIOR]
            if any(cell != _MISSING for cell in cells):
                rows.append([name, group_title(group), *cells])
    return table(rows) if len(rows) > 1 else []


def _metric_table(about: Mapping[str, Any]) -> list[str]:
    """Return the metrics task by task, folded away."""
    rows = [["system", "prompts", "task", "metric", "value", "n"]]
    for name, figures in about["systems"].items():
        for group in about["groups"]:
            for task, of_task in figures[group]["tasks"].items():
                for metric, value in of_task["metrics"].items():
                    rows.append([name, group_title(group), task, metric, measured(metric, value), str(value["n"])])
    return ["<details><summary>Task by task</summary>", "", *table(rows), "</details>", ""] if len(rows) > 1 else []


def _comparison_table(about: Mapping[str, Any]) -> list[str]:
    if not about["comparisons"]:
        return []
    return table(comparison_rows(about))


def comparison_rows(about: Mapping[str, Any]) -> list[list[str]]:
    """Return the differences between systems, under a head."""
    rows = [["system", "minus", "prompts", "measure", "difference", "p", "p (Holm)"]]
    for row in about["comparisons"]:
        p_values = [_MISSING if row[key] is None else f"{row[key]:.4f}" for key in ("p", "p_holm")]
        names = [
            row["system"],
            row["against"],
            group_title(row["group"]),
            BEHAVIOR.get(row["measure"], row["measure"]),
        ]
        rows.append([*names, percent({**row, "value": row["difference"]}), *p_values])
    return rows


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose first row is its head, and an empty line."""
    escaped = [[in_markdown(cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def in_markdown(text: str) -> str:
    """Return an untrusted text as one line of Markdown in which nothing is HTML, a link, an image or a cell's end."""
    line = printable(" ".join(text.split()))
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in line)


def percent(figure: Mapping[str, Any] | None) -> str:
    """Return a share with its interval, in percent."""
    return _with_interval(figure, lambda value: f"{100 * value:.1f}")


def ratio(figure: Mapping[str, Any] | None) -> str:
    """Return a ratio with its interval."""
    return _with_interval(figure, lambda value: f"{value:.3f}")


def behavior(figures: Mapping[str, Any], key: str) -> str:
    """Return one measure of :data:`BEHAVIOR` with its interval."""
    return (ratio if key in NO_SHARES else percent)(figures.get(key))


def measured(metric: str, figure: Mapping[str, Any] | None) -> str:
    """Return the value of a metric with its interval: metrics from 0 to 1 in percent."""
    return (percent if find_metric(metric).scale == 1.0 else ratio)(figure)


def _with_interval(figure: Mapping[str, Any] | None, shown: Callable[[float], str]) -> str:
    if figure is None or figure["value"] is None:
        return _MISSING
    value, low, high = figure["value"], figure["low"], figure["high"]
    if low is None or high is None:
        return shown(value)
    return f"{shown(value)}=" if figure.get("flat") else f"{shown(value)} ({shown(low)} to {shown(high)})"
