# SPDX-License-Identifier: Apache-2.0
"""Trainings of the embedded default that differ in a few keys, several at once, then one evaluation of all of them.

Run again, it goes on: a finished training is not repeated, one that was interrupted goes on from its checkpoint, and
answers are kept.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
UTTERANCES = 3000  # all of the speech
# What differs from the embedded default: shorter, so that a training takes about 100 s on one thread of two.
PROFILE = ("trainer.max_steps=400", "trainer.val_check_interval=100", "data.validation_utterances=20")
# Tasks of a kind that is not trained in any form: their answers are letters. A set of their own in the evaluation.
NEW_FAMILY = ("spell",)


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        line: runs that differ in nothing but the seed and the amount of speech share it.
        percent: of the speech.
        seed: of the training.
        keys: of the configuration, that make it what it is.
    """

    line: str
    percent: int
    seed: int
    keys: tuple[str, ...]

    @property
    def system(self) -> str:
        """Name of its row: runs that differ in nothing but the seed share it."""
        return f"{self.line}-{self.percent}"

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"seed{self.seed}"

    def folder(self, out: Path) -> Path:
        """Return the folder of the experiment."""
        return out / "runs" / self.system / self.name

    def nemo(self, out: Path) -> Path:
        """Return the ``.nemo`` that the training writes."""
        return self.folder(out) / f"{self.name}.nemo"

    def finished(self, out: Path) -> bool:
        """Return whether its ``.nemo`` is there: it is written last, and whole or not at all."""
        return self.nemo(out).exists()

    def command(self, out: Path, extra: Sequence[str]) -> list[str]:
        """Return the command that trains it."""
        return [
            sys.executable,
            str(ROOT / "examples" / "mtbi_train.py"),
            f"name={self.name}",
            f"seed={self.seed}",
            f"data.train_utterances={UTTERANCES * self.percent // 100}",
            f"data.cache_dir={out / 'cache'}",
            f"model.encoder_cache={out / 'encoder'}",
            f"exp_manager.exp_dir={out / 'runs' / self.system}",
            "exp_manager.resume_if_exists=true",
            "benchmark.enabled=false",
            *PROFILE,
            *self.keys,
            *extra,
        ]


def select(runs: Sequence[Run], only: str) -> list[Run]:
    """Return the runs of the system of that name, or else of those whose name holds it.

    The first seed of each comes before the second of any, so that the results of an interrupted experiment are of use.
    """
    exact = any(run.system == only for run in runs)
    wanted = [run for run in runs if (run.system == only if exact else only in run.system)]
    return sorted(wanted, key=lambda run: run.seed)


@dataclass(frozen=True)
class Job:
    """A process on one thread.

    Attributes:
        name: for messages.
        command: what is started.
        log: what it prints is appended here.
    """

    name: str
    command: Sequence[str]
    log: Path


def run_all(jobs: Sequence[Job], at_once: int) -> list[Job]:
    """Runs several at once; returns those that failed."""
    waiting, active, failed, started = list(jobs), {}, [], time.monotonic()
    while waiting or active:
        while waiting and len(active) < at_once:
            job = waiting.pop(0)
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "ab") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                active[job] = subprocess.Popen(job.command, stdout=log, stderr=log, env=environment), time.monotonic()
        for job, (process, began) in list(active.items()):
            if process.poll() is None:
                continue
            del active[job]
            if process.returncode:
                failed.append(job)
            done, now = len(jobs) - len(waiting) - len(active), time.monotonic()
            left = (now - started) / done * (len(jobs) - done)
            state = f"FAILED, see {job.log}" if process.returncode else f"finished in {now - began:.0f} s"
            print(f"{done}/{len(jobs)} · {job.name} {state} · {left / 60:.0f} min left", flush=True)
        time.sleep(0.2)
    return failed


def train_all(wanted: Sequence[Run], out: Path, at_once: int, extra: Sequence[str]) -> list[Job]:
    """Trains what is not finished; returns what failed."""
    todo = [run for run in wanted if not run.finished(out)]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} trainings are finished", flush=True)
    jobs = {}
    for run in todo:
        name = f"{run.system} {run.name}"
        jobs[run] = Job(name, tuple(run.command(out, extra)), out / "logs" / f"{run.system}-{run.name}.txt")
    failed = run_all(list(jobs.values()), at_once)
    # one that was stopped by a signal has ended well, but before its end
    return failed + [job for run, job in jobs.items() if job not in failed and not run.finished(out)]


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluation(out: Path, made: Sequence[Run], hours: float, title: str) -> dict:
    """The configuration of ``examples/mtbi_eval.py``: a system for each line and amount, a .nemo for each seed.

    Args:
        out: folder of all that is made.
        made: in the order of the tables; all are compared with the first.
        hours: of the whole speech.
        title: of the report.
    """
    systems: dict[str, dict] = {}
    for run in made:
        system = systems.setdefault(run.system, {"kind": "speech", "nemo": [], "line": run.line, "logs": []})
        system["hours"] = round(hours * run.percent / 100, 3)
        system["nemo"].append(str(run.nemo(out)))
        if run.percent == 100 and run.seed == 0:
            system["logs"].append(str(run.folder(out)))
    first = next(iter(systems))
    systems["cascade"] = {"kind": "cascade", "llm": "demo", "asr": "demo"}
    systems["text"] = {"kind": "text", "llm": "demo"}
    (cuts,) = (out / "cache").glob("synthetic-test-*/cuts.jsonl.gz")
    pool = yaml.safe_load((ROOT / "nemo_mtbi" / "assets" / "demo" / "tasks.yaml").read_text())
    names = [task["name"] for task in pool["tasks"]]
    questions = {"test": [name for name in names if name not in NEW_FAMILY], "letters": list(NEW_FAMILY)}
    return {
        "output_dir": str(out / "evaluation"),
        "title": title,
        "systems": systems,
        "sets": {name: {"cuts": str(cuts), "only": only, "wordings": 2} for name, only in questions.items()},
        "batch_size": 256,
        "kl_utterances": 30,
        "max_new_tokens": 40,
        "compare_with": first,
    }


def parts_of(settings: dict) -> dict[str, dict]:
    """The configuration of each system alone, beside the text, so that several can be evaluated at once.

    Answers are kept by system in one folder, where the whole evaluation finds them; what these write about one system
    is replaced by it.
    """
    systems = settings["systems"]
    alone = {"resamples": 1, "compare": [], "compare_with": None, "examples": 0}
    parts = {}
    for name, system in systems.items():
        if name != "text" and not system.get("adapted"):
            adapted = {key: value for key, value in systems.items() if value.get("adapted") and value["of"] == name}
            parts[name] = {**settings, **alone, "systems": {name: system, "text": systems["text"], **adapted}}
    return parts


def hours_of_speech(out: Path) -> float:
    """Of all the speech, from the largest training corpus that was made: where that is a part, by its share."""
    from lhotse import CutSet

    corpora = [list(CutSet.from_file(path)) for path in (out / "cache").glob("synthetic-train-*/cuts.jsonl.gz")]
    largest = max(corpora, key=len)
    return sum(cut.duration for cut in largest) / len(largest) * UTTERANCES / 3600


def evaluate_all(settings: dict, out: Path, at_once: int) -> int:
    """Asks each system, several at once, then writes the report of all; returns an exit status."""

    def command(name: str, values: dict) -> tuple[str, ...]:
        (out / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        script = str(ROOT / "examples" / "mtbi_eval.py")
        return sys.executable, script, f"--config-path={out}", f"--config-name={name}"

    parts = {f"evaluation-{name}": values for name, values in parts_of(settings).items()}
    jobs = [Job(name, command(name, values), out / "logs" / f"{name}.txt") for name, values in parts.items()]
    # one first: it evaluates the text system too, with which all are compared
    if run_all(jobs[:1], 1) or run_all(jobs[1:], at_once):
        print("evaluations failed: run the same command again to go on", flush=True)
        return 1
    return subprocess.run(command("evaluation", settings)).returncode


# -------------------------------------------------------------------------------------------------------- command line


def main(
    description: str, runs: Callable[[str], list[Run]], judge: Callable[[Path, Sequence[Run], float], dict]
) -> int:
    """The command line of an experiment; returns its exit status.

    Args:
        description: of it.
        runs: the trainings whose system holds a word.
        judge: the evaluation of those that were made: see :func:`evaluation`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1)), help="trainings side by side")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="the system of this name, or else those whose name holds it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("keys", nargs="*", help="further keys for examples/mtbi_train.py")
    args = parser.parse_args()
    out, wanted = args.out.resolve(), runs(args.only)
    if args.dry_run:
        print("\n".join(shlex.join(run.command(out, args.keys)) for run in wanted))
        return 0
    failed = train_all(wanted, out, args.at_once, args.keys)
    if failed:
        print(f"{len(failed)} trainings failed: run the same command again to go on", flush=True)
        return 1
    return evaluate_all(judge(out, wanted, hours_of_speech(out)), out, args.at_once)
