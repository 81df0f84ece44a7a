#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Trains MTBI with every kind of connector, and compares them.

python scripts/experiments/connectors.py --out FOLDER [--at-once 2] [--only WORD] [--dry-run] [KEY=VALUE …]

The embedded default with 400 steps, all of the speech and seeds 0 to 2; all at 6.25 frames per second and a width of
512 but for the learning rate, which attention wants lower. Run it again to go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import side_by_side
from side_by_side import Run, select

SEEDS = range(3)
KEYS = {
    "conv": (),
    "stack": ("model.connector.kind=stack",),
    "cif": ("model.connector.kind=cif",),
    "qformer": ("model.connector.kind=qformer", "model.optim.lr=5.0e-4"),
    "conformer": ("model.connector.kind=conformer", "model.optim.lr=5.0e-4"),
}


def runs(only: str = "") -> list[Run]:
    """The trainings, with some seeds for each kind."""
    return select([Run(kind, 100, seed, KEYS[kind]) for seed in SEEDS for kind in KEYS], only)


def evaluation(out: Path, made: Sequence[Run], hours: float) -> dict:
    """The configuration of the report."""
    ordered = sorted(made, key=lambda run: (list(KEYS).index(run.line), run.seed))
    return side_by_side.evaluation(out, ordered, hours, "Connectors of MTBI")


if __name__ == "__main__":
    sys.exit(side_by_side.main(__doc__, runs, evaluation))
