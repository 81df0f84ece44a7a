#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Trains MTBI and its rivals with several seeds and amounts of speech, then compares them: see generalization.md.

python scripts/experiments/generalization.py --out FOLDER [--at-once 2] [--only WORD] [--dry-run] [KEY=VALUE …]

Run it again to go on: a finished training is not repeated, and one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import side_by_side
from side_by_side import Run

# What is trained: share of the speech in percent, systems, seeds.
ALL = ("mtbi", "mtbi_kl", "mtbi_ce_kl", "imitation", "multitask_sft", "transcription_sft", "continuation")
ALL += ("no_instruction",)
PLAN = (
    (100, ALL, range(5)),
    (10, ("mtbi", "imitation", "transcription_sft", "continuation"), range(3)),
    (30, ("mtbi", "imitation", "transcription_sft", "continuation"), range(3)),
    (50, ("mtbi", "imitation", "transcription_sft", "continuation"), range(3)),
)
# With adapters in the LLM, which then learns to listen, and may forget how to read.
LORA = ("mtbi", "imitation", "transcription_sft", "continuation")
LORA_SEEDS = range(3)
ADAPTERS = "{rank: 8, alpha: 16, target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2]}"

# What is tested beside all against mtbi-100 (hypotheses H3, H4 and H6).
PAIRS = [("mtbi-10", f"{rival}-10") for rival in ("transcription_sft", "continuation", "imitation")]
PAIRS += [("mtbi-50", "imitation-100"), ("mtbi-50", "mtbi-100")]
PAIRS += [("mtbi+lora-100", f"{rival}+lora-100") for rival in LORA[1:]]


def runs(only: str = "") -> list[Run]:
    """All trainings, the first seed of each before the second of any: what is interrupted can be looked at."""
    found = [
        Run(rival, percent, seed, (f"+rival={rival}",))
        for percent, rivals, seeds in PLAN
        for rival in rivals
        for seed in seeds
    ]
    found += [
        Run(f"{rival}+lora", 100, seed, (f"+rival={rival}", f"model.lora={ADAPTERS}"))
        for rival in LORA
        for seed in LORA_SEEDS
    ]
    return sorted((run for run in found if only in run.system), key=lambda run: run.seed)


def evaluation(out: Path, made: Iterable[Run], hours: float) -> dict:
    """The configuration of the report."""

    def place(run: Run) -> tuple:
        rival, _, adapted = run.line.partition("+")
        return adapted, -run.percent, ALL.index(rival), run.seed

    title = "Generalization of speech LLMs: MTBI and its rivals"
    settings = side_by_side.evaluation(out, sorted(made, key=place), hours, title)
    systems = settings["systems"]
    for name in [name for name in systems if "+lora" in name]:  # what has become of the LLM's answers to text
        systems[f"text of {name}"] = {"kind": "text", "of": name, "adapted": True}
    return {**settings, "compare": [list(pair) for pair in PAIRS if set(pair) <= set(systems)]}


if __name__ == "__main__":
    sys.exit(side_by_side.main(__doc__, runs, evaluation))
