# SPDX-License-Identifier: Apache-2.0
"""Puts several runs side by side: a Markdown table of their results.json, with mean and spread.

python scripts/summarize_results.py RUN/results.json [RUN/results.json ...] [--label NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

GROUPS = {"seen": "seen prompts", "heldout_wordings": "held-out wordings", "heldout_tasks": "held-out tasks"}


def figures(results: dict) -> dict[str, tuple[float, str]]:
    """Name of a figure → its value and how it is printed."""
    rows = {"transcription WER": (results["transcription"]["wer"], "{:.2%}")}
    if "cer" in results["transcription"]:
        rows["transcription CER"] = (results["transcription"]["cer"], "{:.2%}")
    for group, name in GROUPS.items():
        for kind, what in (("agreement", "agreement"), ("text", "text right"), ("speech", "speech right")):
            if results["behavior"][group].get(kind) is not None:
                rows[f"{name}: {what}"] = (results["behavior"][group][kind], "{:.2%}")
    rows["training, seconds"] = (results["train"]["seconds"], "{:.0f}")
    rows["peak memory, GiB"] = (results["train"]["peak_rss_gib"], "{:.2f}")
    return rows


def table(runs: list[dict], labels: list[str]) -> str:
    """Markdown: a column for each run, then mean and standard deviation (over runs, with n - 1).

    Raises:
        ValueError: if there is no run, or not one label for each.
    """
    if not runs or len(labels) != len(runs):
        raise ValueError(f"{len(runs)} results, but {len(labels)} labels: give one label for each results.json")
    columns = [figures(run) for run in runs]
    lines = [f"| figure | {' | '.join(labels)} | mean ± sd |", "|---" * (len(runs) + 2) + "|"]
    for name, (_, form) in columns[0].items():
        values = [column[name][0] for column in columns if name in column and column[name][0] is not None]
        spread = form.format(statistics.stdev(values)) if len(values) > 1 else "–"
        shown = [form.format(value) for value in values]
        lines.append(f"| {name} | {' | '.join(shown)} | {form.format(statistics.mean(values))} ± {spread} |")
    return "\n".join(lines)


def read_results(path: Path) -> dict:
    """The figures of a run.

    Raises:
        ValueError: if the file is not what training writes.
    """
    from nemo_mtbi.io.text import parse_json_object, read_text

    results = parse_json_object(read_text(path), str(path))
    try:
        figures(results)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks {error}: give the results.json of a training with benchmark.cuts") from error
    return results


def main(argv: list[str] | None = None) -> int:
    """Print a summary of several runs; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--label", nargs="+", help="column heads (default: seed N)")
    args = parser.parse_args(argv)
    try:
        runs = [read_results(path) for path in args.results]
        print(table(runs, args.label or [f"seed {run.get('seed')}" for run in runs]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
