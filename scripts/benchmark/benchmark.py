# SPDX-License-Identifier: Apache-2.0
"""Compares this project with NeMo's SALM, a plain loop and Hugging Face on equal work; see run.sh.

Systems take turns in one process with one thread. The CPU time of the process counts, so that other work on a machine
matters little. All ratios are ours ÷ theirs: below 1 this project is faster, or takes less memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from answering import Answering
from assets import Assets, draw_utterances, make_assets
from fill import make_corpus, measure_fill
from measure import peak_above_rest, take_turns
from systems import Plain, Project, Salm

from nemo_mtbi.commands.cli import quiet
from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.parallel import groups

STEPS = {"k1": (6, 1), "k8": (2, 8)}  # utterances of a step, rows of each
BATCHES = {"b1": 1, "b16": 16}  # utterances that are answered at once
NEW_TOKENS = 32


def compare_steps(assets: Assets, rounds: int) -> dict[str, Any]:
    """Return ratios of CPU time and of peak memory above rest of a training step, by rows of an utterance."""
    systems = {"project": Project(assets), "salm": Salm(assets), "plain": Plain(assets)}
    results: dict[str, Any] = {}
    for key, (utterances, rows) in STEPS.items():
        rng = random.Random(100 * utterances + rows)
        works = [draw_utterances(rng, utterances, rows) for _ in range(rounds + 1)]
        times = take_turns({name: system.step for name, system in systems.items()}, works, f"step {key}")
        peaks = {name: peak_above_rest(system.step(works[0])) for name, system in systems.items()}
        results[key] = {
            "salm": times.ratio("project", "salm"),
            "plain": times.ratio("project", "plain"),
            "memory_salm": peaks["project"] / peaks["salm"],
            "seconds": {name: times.median(name) for name in systems},
            "peak_gib": peaks,
        }
    return results


def compare_answers(assets: Assets, rounds: int) -> dict[str, Any]:
    """Return ratios of CPU time of answers to speech, by utterances that are answered at once."""
    project, salm = Project(assets), Salm(assets)
    project.model.eval()
    salm.model.eval()
    results = {}
    for key, count in BATCHES.items():
        rng = random.Random(count)
        works = [draw_utterances(rng, count, 1, prompt=(12, 12)) for _ in range(rounds + 1)]
        answerers = {
            "project": lambda work: project.answers(work, NEW_TOKENS),
            "salm": lambda work: salm.answers(work, NEW_TOKENS),
        }
        times = take_turns(answerers, works, f"generate {key}")
        seconds = {name: times.median(name) for name in answerers}
        results[key] = {**times.ratio("project", "salm"), "seconds": seconds}
    return results


def compare_targets(folder: Path, rounds: int, transcripts: int) -> dict[str, Any]:
    """Return the ratio of CPU time of target generation to Hugging Face's best batch size."""
    answering, rng = Answering(folder), random.Random(5)
    works = [answering.prompts(rng, transcripts) for _ in range(rounds + 1)]
    systems = answering.systems()
    times = take_turns(systems, works, "targets")
    best = min((name for name in systems if name != "project"), key=times.median)
    ours, theirs = answering.own(works[0]), answering.batched(works[0], len(works[0]))
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    rows = len(works[0])
    return {
        **times.ratio("project", best),
        "best": best,
        "equal_answers": equal,
        "rows_per_second": {name: rows / times.median(name) for name in systems},
    }


def fill_shares(assets: Assets, folder: Path, utterances: int) -> dict[str, float]:
    """Return the shares of a step that hold data, as the loader makes steps."""
    project = Project(assets)
    return measure_fill(make_corpus(folder, utterances), project.chat, project.model.frame_counter)


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge the figures: machine, versions, commit."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s)",
        "versions": {
            name: version(name) for name in ("torch", "nemo_toolkit", "megatron-core", "transformers", "peft")
        },
    }


def figures(details: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios alone, by the names that ``benchmark.json`` has them under."""
    step = {
        key: {"salm": x["salm"]["ratio"], "plain": x["plain"]["ratio"], "memory_salm": x["memory_salm"]}
        for key, x in details["step"].items()
    }
    return {
        "step": step,
        "generate": {key: x["ratio"] for key, x in details["generate"].items()},
        "targets": {"hf_best": details["targets"]["ratio"]},
        "fill": details["fill"],
    }


def table(details: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| work | ours ÷ theirs | lowest and highest round |", "|---|---|---|"]

    def add(name: str, ratio: dict[str, Any]) -> None:
        lines.append(f"| {name} | {ratio['ratio']:.2f} | {ratio['low']:.2f}–{ratio['high']:.2f} |")

    for key, step in details["step"].items():
        for base in ("salm", "plain"):
            add(f"training step, {key}, ÷ {base}", step[base])
        lines.append(f"| peak memory of a step above rest, {key}, ÷ salm | {step['memory_salm']:.2f} | |")
    for key, answers in details["generate"].items():
        add(f"answers, {key}, ÷ salm", answers)
    add(f"targets ÷ {details['targets']['best']}", details["targets"])
    lines += ["", "| fill | share |", "|---|---|"]
    lines += [f"| {name} | {share:.0%} |" for name, share in details["fill"].items()]
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the models and results")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: at most 15 minutes on 2 cores")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (9; 3 with --quick)")
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 9
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``benchmark.json`` and ``benchmark.md``."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    quiet()
    groups.initialize()
    folder, rounds = arguments.out / "models", arguments.rounds
    assets = make_assets(folder)
    details = {
        "step": compare_steps(assets, rounds),
        "generate": compare_answers(assets, rounds),
        "targets": compare_targets(folder, rounds, 8 if arguments.quick else 32),
        "fill": fill_shares(assets, folder, 240 if arguments.quick else 1000),
        "environment": environment(),
    }
    results = {**figures(details), "details": details}
    with replacing(arguments.out / "benchmark.json") as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")
    with replacing(arguments.out / "benchmark.md") as file:
        file.write(table(details).encode())
    print(table(details))
    return 0


if __name__ == "__main__":
    sys.exit(main())
