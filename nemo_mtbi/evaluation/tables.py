# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation as Markdown, and as text for any table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nemo_mtbi.evaluation.benchmark import NEW_TASKS, NEW_WORDINGS, SEEN
from nemo_mtbi.evaluation.items import find_metric
from nemo_mtbi.evaluation.report import GROUPS
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
    """Groups as they stand in tables: those of a task pool first, in their order."""
    known = (SEEN, NEW_WORDINGS, NEW_TASKS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def group_title(name: str) -> str:
    """A group as readers see it."""
    return GROUPS.get(name, name.replace("_", " "))


def markdown(results: Mapping[str, Any], details: bool = True) -> str:
    """Return the figures as Markdown tables; with ``details`` task by task, too."""
    lines = [f"# {in_markdown(results['title'])}", ""]
    for name, found in results["sets"].items():
        lines += [
            f"## {in_markdown(name)}",
            "",
            f"{found['utterances']} utterances, {found['questions']} questions.",
            "",
        ]
        if found["systems"]:
            lines += _right_table(found) + _transcription_table(found, results["systems"]) + _behavior_table(found)
            lines += (_metric_table(found) if details or not _right_table(found) else []) + _comparison_table(found)
        lines += [f"Left out: {count} items {in_markdown(why)}." for why, count in found["left_out"].items()]
        lines += [f"Note: {in_markdown(note)}." for note in found["notes"]] + [""]
    lines += [f"- {line}" for line in results["not_measured"]]
    return "\n".join(lines) + "\n"


def _right_table(found: Mapping[str, Any]) -> list[str]:
    groups = [g for g in found["groups"] if any("right" in s[g] for s in found["systems"].values())]
    if not groups:
        return []
    rows = [["system", *(f"{group_title(g)}: right" for g in groups), "abstained", "truncated", "seeds"]]
    for name, figures in found["systems"].items():
        cells = [percent(figures[g].get("right")) for g in groups]
        counts = [str(sum(figures[g].get(key, 0) for g in figures)) for key in ("abstained", "truncated")]
        rows.append([name, *cells, *counts, str(max(figures[g]["seeds"] for g in figures))])
    return table(rows)


def transcription_rows(found: Mapping[str, Any], systems: Mapping[str, Any]) -> list[list[str]]:
    """Error rates of transcripts, under a head; systems that read the transcript are left out."""
    rows = [["system", "prompts", "WER of the transcription", "CER of the transcription", "n"]]
    for name, figures in found["systems"].items():
        for group in found["groups"]:
            rates = figures[group].get("transcription")
            if rates and systems[name]["kind"] != "text":
                cells = [percent(rates["wer"]), percent(rates["cer"]), str(rates["wer"]["n"])]
                rows.append([name, group_title(group), *cells])
    return rows


def _transcription_table(found: Mapping[str, Any], systems: Mapping[str, Any]) -> list[str]:
    rows = transcription_rows(found, systems)
    return table(rows) if len(rows) > 1 else []


def _behavior_table(found: Mapping[str, Any]) -> list[str]:
    rows = [["system", "prompts", *BEHAVIOR.values()]]
    for name, figures in found["systems"].items():
        for group in found["groups"]:
            cells = [behavior(figures[group], key) for key in BEHAVIOR]
            if any(cell != _MISSING for cell in cells):
                rows.append([name, group_title(group), *cells])
    return table(rows) if len(rows) > 1 else []


def _metric_table(found: Mapping[str, Any]) -> list[str]:
    """Metrics task by task, where they are more than the share of right answers."""
    rows = [["system", "prompts", "task", "metric", "value", "n"]]
    for name, figures in found["systems"].items():
        for group in found["groups"]:
            for task, of_task in figures[group]["tasks"].items():
                for metric, value in of_task["metrics"].items():
                    rows.append([name, group_title(group), task, metric, measured(metric, value), str(value["n"])])
    return ["<details><summary>Task by task</summary>", "", *table(rows), "</details>", ""] if len(rows) > 1 else []


def _comparison_table(found: Mapping[str, Any]) -> list[str]:
    if not found["comparisons"]:
        return []
    return table(comparison_rows(found))


def comparison_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Differences between systems, under a head."""
    rows = [["system", "minus", "prompts", "measure", "difference", "p", "p (Holm)"]]
    for row in found["comparisons"]:
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
    """Return a text of others as one line of Markdown in which nothing is HTML, a link, an image or a cell's end."""
    line = printable(" ".join(text.split()))
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in line)


def percent(figure: Mapping[str, Any] | None) -> str:
    """A share with its interval, in percent."""
    return _with_interval(figure, lambda value: f"{100 * value:.1f}")


def ratio(figure: Mapping[str, Any] | None) -> str:
    """A ratio with its interval."""
    return _with_interval(figure, lambda value: f"{value:.3f}")


def behavior(figures: Mapping[str, Any], key: str) -> str:
    """One measure of :data:`BEHAVIOR` with its interval."""
    return (ratio if key in NO_SHARES else percent)(figures.get(key))


def measured(metric: str, figure: Mapping[str, Any] | None) -> str:
    """A value of a metric with its interval: those from 0 to 1 in percent."""
    return (percent if find_metric(metric).scale == 1.0 else ratio)(figure)


def _with_interval(figure: Mapping[str, Any] | None, shown: Callable[[float], str]) -> str:
    if figure is None or figure["value"] is None:
        return _MISSING
    value, low, high = figure["value"], figure["low"], figure["high"]
    if low is None or high is None:
        return shown(value)
    return f"{shown(value)}=" if figure.get("flat") else f"{shown(value)} ({shown(low)} to {shown(high)})"
