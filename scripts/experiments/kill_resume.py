#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Kills a training run again and again, resumes it, and compares its last weights with those of an undisturbed run.

The kills are SIGKILL to all processes of the run: some at random moments of the training, some while a checkpoint is
being written. Prints one line for each kill, and ends with status 1 if a single bit of the connector differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "single": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["model.tensor_model_parallel_size=2"]),
    "pp2": (2, ["model.pipeline_model_parallel_size=2"]),
}
STARTED = "training ·"  # what a run prints before its first step
LONGEST_RUN = 900  # seconds, of one attempt


def command(layout: str, folder: Path, steps: int, every: int, extra: list[str]) -> list[str]:
    """The training run, small enough to be started many times."""
    processes, sizes = LAYOUTS[layout]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *(launcher if processes > 1 else [sys.executable]),
        str(ROOT / "examples" / "mtbi_train.py"),
        f"trainer.devices={processes}",
        *sizes,
        "data.train_utterances=300",
        "data.validation_utterances=4",
        "data.test_utterances=1",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={every}",  # which is also when checkpoints are written
        f"exp_manager.exp_dir={folder}",
        "exp_manager.resume_if_exists=true",
        *extra,
    ]


def weights(folder: Path) -> bytes:
    """The connector's weights as they stand in the ``.nemo`` of a run."""
    with tarfile.open(folder / "mtbi_demo" / "mtbi_demo.nemo") as archive:
        (member,) = (item for item in archive if item.name.endswith("model_weights.safetensors"))
        return archive.extractfile(member).read()


def wait_for(condition, process: subprocess.Popen, deadline: float) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        if time.monotonic() > deadline:
            end(process)
            raise SystemExit(f"a run took longer than {LONGEST_RUN} s: see its log")
        time.sleep(0.02)
    return False


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def attempt(
    run: list[str], folder: Path, log: Path, rng: random.Random, kill: str | None, longest: float
) -> str | None:
    """Starts or resumes the run; returns how it was killed, or ``None`` if it came to its end.

    ``longest`` is the latest moment of a random kill, in seconds after training began.
    """
    deadline = time.monotonic() + LONGEST_RUN
    with open(log, "ab") as output:
        position = output.tell()
        process = subprocess.Popen(run, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        if kill and wait_for(lambda: STARTED in log.read_text()[position:], process, deadline):
            saves = len(list(folder.rglob("*unfinished*")))
            if kill == "save":
                after = rng.uniform(0.0, 0.3)
                hit = wait_for(lambda: len(list(folder.rglob("*unfinished*"))) > saves, process, deadline)
                told = f"{after:.2f} s into a save"
            else:
                after, hit = rng.uniform(0.0, longest), True
                told = f"{after:.2f} s after the start"
            until = time.monotonic() + after
            if hit and wait_for(lambda: time.monotonic() >= until, process, deadline):
                end(process)
                return told
        wait_for(lambda: False, process, deadline)
        if process.returncode:
            raise SystemExit(f"the run failed with status {process.returncode}: see {log}")
        return None
    finally:
        if process.poll() is None:
            end(process)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="dp2")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, required=True, help="new folder for both runs and their logs")
    parser.add_argument("overrides", nargs="*", help="further keys for examples/mtbi_train.py")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    rng, kills = random.Random(args.seed), 0
    whole, broken = args.out / "undisturbed", args.out / "killed"
    straight = command(args.layout, whole, args.steps, args.every, args.overrides)
    attempt(straight, whole, args.out / "whole.log", rng, None, 0.0)
    seconds = json.loads((whole / "mtbi_demo" / "results.json").read_text())["train"]["seconds"]
    longest = 2.2 * seconds / args.kills  # so that the last kill still finds the run at work
    run = command(args.layout, broken, args.steps, args.every, args.overrides)
    while True:
        kind = None if kills == args.kills else ("save" if kills % 3 == 2 else "random")
        told = attempt(run, broken, args.out / "killed.log", rng, kind, longest)
        if told is None:
            break
        kills += 1
        print(f"{args.layout}: kill {kills}, {told}", flush=True)
    same = weights(whole) == weights(broken)
    print(f"{args.layout}: {kills} kills, last weights {'bitwise equal' if same else 'DIFFERENT'}", flush=True)
    return 0 if same and kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
