#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Trains MTBI with other units, shares and schedules of interleaving on a tenth of the speech, and compares them.

python scripts/experiments/interleaving.py --out FOLDER [--at-once 2] [--only WORD] [--dry-run] [KEY=VALUE …]

The embedded default with 400 steps and seeds 0 to 2: little speech is where interleaving was found to matter (see
generalization.md). Run it again to go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import side_by_side
from side_by_side import Run, select

SEEDS = range(3)
PERCENT = 10
KEYS = {
    "span": (),  # the default: three rows in ten, up to half of the words
    "never": ("model.interleave=null",),
    "often": ("model.interleave.probability=0.8",),
    "word": ("model.interleave.unit=word",),
    "all_text": ("model.interleave.all_text=0.2",),
    # ten passes over a tenth of the speech: from much text to little in the first half
    "schedule": ("model.interleave.schedule={epochs: 5, probability: 0.8, text_share: 0.9}",),
    "wave": ("model.interleave.level=wave",),
}


def runs(only: str = "") -> list[Run]:
    """The trainings, with some seeds for each way."""
    return select([Run(way, PERCENT, seed, KEYS[way]) for seed in SEEDS for way in KEYS], only)


def evaluation(out: Path, made: Sequence[Run], hours: float) -> dict:
    """The configuration of the report."""
    ordered = sorted(made, key=lambda run: (list(KEYS).index(run.line), run.seed))
    return side_by_side.evaluation(out, ordered, hours, "Ways to interleave speech and text")


if __name__ == "__main__":
    sys.exit(side_by_side.main(__doc__, runs, evaluation))
