# SPDX-License-Identifier: Apache-2.0
"""The steps of ``scripts/build_demo_models.py``."""

from __future__ import annotations

import argparse

from nemo_mtbi.targets.tasks import TaskPool


def build_llm(args: argparse.Namespace) -> None:
    """Pre-train the demo's text LLM on the tasks of ``tasks.yaml``, and write it to the folder ``llm``."""
    from nemo_mtbi.demo import llm

    pool = TaskPool.from_yaml(args.out / "tasks.yaml")
    llm.build(args.out / "llm", pool, args.steps or 4000, args.seed, args.resume)


def build_encoder(args: argparse.Namespace) -> None:
    """Train the demo's speech encoder."""
    from nemo_mtbi.demo import encoder

    encoder.build(args.out, args.steps or 3000, args.seed)


def write_card(args: argparse.Namespace) -> None:
    """Score both models and write their card."""
    from nemo_mtbi.demo import card

    card.write(args.out)
