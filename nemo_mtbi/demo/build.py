# SPDX-License-Identifier: Apache-2.0
"""What ``scripts/build_demo_models.py`` runs."""

from __future__ import annotations

import argparse

from nemo_mtbi.targets.tasks import TaskPool


def build_llm(args: argparse.Namespace) -> None:
    from nemo_mtbi.demo import llm

    pool = TaskPool.from_yaml(args.out / "tasks.yaml")
    llm.build(args.out / "llm", pool, args.steps or 4000, args.seed, args.resume)


def build_encoder(args: argparse.Namespace) -> None:
    from nemo_mtbi.demo import encoder

    encoder.build(args.out, args.steps or 3000, args.seed)


def write_card(args: argparse.Namespace) -> None:
    from nemo_mtbi.demo import card

    card.write(args.out)
