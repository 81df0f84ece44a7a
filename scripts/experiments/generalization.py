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
from side_by_side import Run, select

# What is trained: share of the speech in percent, systems, seeds.
ALL = ("mtbi", "mtbi_kl", "mtbi_ce_kl", "imitation", "multitask_sft", "transcription_sft", "continuation")
ALL += ("no_instruction",)
PLAN = (
    (100, ALL, range(5)),
    (10, ("mtbi", "imitation", "transcription_sft", "continuation"), range(3)),
    (30, ("mtbi", "imitation", "transcription_sft", "continuation"), range(3)),
    (50, ("mtbi", "imitation", "transcription_sft", "continuation"), range(3)),
)
ADAPTERS = "model.lora={rank: 8, alpha: 16, target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2]}"
STYLE = "++data.reference_format='the answer is {}'"
# Under which conditions an effect appears: systems trained on all of the speech, and what differs from the plan's.
CONDITIONS = {
    # Adapters in the LLM, which is trained on speech then, and may answer text otherwise than before.
    "lora": (("mtbi", "imitation", "transcription_sft", "continuation"), ADAPTERS),
    # As many steps as the embedded default has: nearly three passes.
    "long": (("mtbi", "imitation", "transcription_sft"), "trainer.max_steps=1100"),
    # A quarter of all rows transcribe, not one in seventeen.
    "transcribe": (("mtbi",), "data.tasks_per_cut=4", "data.always_tasks=[transcribe]"),
    # Right answers in words that the LLM would not choose, as annotators write them.
    "style": (("multitask_sft",), STYLE),
    "style+lora": (("multitask_sft",), STYLE, ADAPTERS),
}
CONDITION_SEEDS = range(3)

# What is tested beside all against mtbi-100 (hypotheses H3, H4, H6 and H7).
PAIRS = [("mtbi-10", f"{rival}-10") for rival in ("transcription_sft", "continuation", "imitation")]
PAIRS += [("mtbi-50", "imitation-100"), ("mtbi-50", "mtbi-100")]
PAIRS += [
    (f"mtbi+{name}-100", f"{rival}+{name}-100") for name, (rivals, *_) in CONDITIONS.items() for rival in rivals[1:]
]


def runs(only: str = "") -> list[Run]:
    """The trainings of :data:`PLAN` and :data:`CONDITIONS`."""
    planned = [
        Run(rival, percent, seed, (f"+rival={rival}",))
        for percent, rivals, seeds in PLAN
        for rival in rivals
        for seed in seeds
    ]
    planned += [
        Run(f"{rival}+{name}", 100, seed, (f"+rival={rival}", *keys))
        for name, (rivals, *keys) in CONDITIONS.items()
        for rival in rivals
        for seed in CONDITION_SEEDS
    ]
    return select(planned, only)


def evaluation(out: Path, made: Iterable[Run], hours: float) -> dict:
    """The configuration of the report."""

    def place(run: Run) -> tuple:
        rival, _, condition = run.line.partition("+")
        return ["", *CONDITIONS].index(condition), -run.percent, ALL.index(rival), run.seed

    title = "Generalization of speech LLMs: MTBI and its rivals"
    settings = side_by_side.evaluation(out, sorted(made, key=place), hours, title)
    systems = settings["systems"]
    for name in [name for name in systems if "+lora" in name]:  # what has become of the LLM's answers to text
        systems[f"text of {name}"] = {"kind": "text", "of": name, "adapted": True}
    return {**settings, "compare": [list(pair) for pair in PAIRS if set(pair) <= set(systems)]}


if __name__ == "__main__":
    sys.exit(side_by_side.main(__doc__, runs, evaluation))
