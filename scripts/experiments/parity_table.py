#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Runs the parity suite and prints a Markdown table: how far each parallel layout is from a single process.

python scripts/experiments/parity_table.py

Relative errors of the whole vector of losses, gradients and weights: the largest over all cases of a precision and all
processes of a layout. The exit status is pytest's. About ten minutes on two cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
SUITE = "tests/parallel/test_parity.py"
PRECISIONS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16 LLM"}
KEYS = ("losses", "gradients", "weights")


def precision_of(case: str) -> str:
    """The trainer's own step, and all cases without a name of a precision, are as the suite has them."""
    return case if case in PRECISIONS else "float64"


def read_report(report: Path) -> tuple[dict[tuple[str, str, str], float], Mapping[str, set[str]], int]:
    """Largest error by (layout, precision, key), the cases of each layout, and the number of failures."""
    worst: dict[tuple[str, str, str], float] = defaultdict(float)
    cases: dict[str, set[str]] = defaultdict(set)
    failures = 0
    for test in ElementTree.parse(report).iter("testcase"):
        name = re.fullmatch(r"test_parity\[([^-]+)-([^-]+)\]", test.get("name", ""))
        if name is None:
            continue
        layout, case = name.groups()
        cases[layout].add(case)
        failures += test.find("failure") is not None or test.find("error") is not None
        for item in test.iter("property"):
            if item.get("name") in KEYS:
                place = layout, precision_of(case), item.get("name")
                worst[place] = max(worst[place], float(item.get("value")))
    return dict(worst), cases, failures


def table(worst: Mapping[tuple[str, str, str], float], cases: Mapping[str, set[str]]) -> str:
    """Markdown: a row for each layout."""
    columns = [(precision, key) for precision in PRECISIONS for key in KEYS]
    lines = [
        "| layout | cases | " + " | ".join(f"{PRECISIONS[precision]} {key}" for precision, key in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for layout in cases:
        figures = [worst.get((layout, *column)) for column in columns]
        shown = ["–" if value is None else f"{value:.1e}" for value in figures]
        lines.append(f"| {layout} | {len(cases[layout])} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the suite and print its table; return pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--full", SUITE, f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        if not report.exists():
            return status
        worst, cases, failures = read_report(report)
    print(table(worst, cases))
    print(f"\n{sum(map(len, cases.values()))} comparisons, {failures} failed")
    return status


if __name__ == "__main__":
    sys.exit(main())
