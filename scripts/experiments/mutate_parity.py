# SPDX-License-Identifier: Apache-2.0
"""Takes out what makes parallel training right, one thing at a time, and shows that the parity suite notices.

python scripts/experiments/mutate_parity.py [--only WORD] [--timeout SECONDS]

Each mutation of ``parity_mutations.yaml`` replaces one piece of source text in a temporary copy of the package; the
working tree is not touched. The test that it names must pass on the unchanged copy and fail on the mutated one; a hang
fails too. Prints a Markdown table; the exit status is 1 if a mutation survives. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_name("parity_mutations.yaml")
SUITE = "tests/parallel/test_parity.py"
HELPERS = ("conftest", "matrix", "parity_data", "parity_layouts", "workers")
SUITE_FILES = (SUITE, *(f"tests/{name}.py" for name in HELPERS), "pyproject.toml")
PATIENCE = 600  # seconds for the imports and the reference, apart from what each layout may take


@dataclass(frozen=True)
class Mutation:
    """One change of the package.

    Attributes:
        name: what is taken out.
        file: in the package.
        old: source text that stands there once.
        new: what takes its place.
        test: the one that must notice, as ``layout-case``.
    """

    name: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, source: str) -> str:
        """The mutated source.

        Raises:
            ValueError: if the text to replace does not stand there exactly once.
        """
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.file} has {source.count(self.old)} times the text of the mutation {self.name!r}: bring its "
                f"text in {DATA.name} up to date: {self.old!r}"
            )
        return source.replace(self.old, self.new)


def read_mutations() -> list[Mutation]:
    """All of them."""
    return [Mutation(**entry) for entry in yaml.safe_load(DATA.read_text())]


@dataclass(frozen=True)
class Verdict:
    """Verdict of the suite on a mutation.

    Attributes:
        test: the first that failed; ``None``: the mutation survived.
        reason: in a line.
        seconds: of all the tests that were run.
    """

    test: str | None
    reason: str
    seconds: float


class Workspace:
    """A copy of the package and of the suite, whose reference is made once.

    Args:
        folder: empty.
        timeout: seconds for each layout.
    """

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder, timeout
        ignored = shutil.ignore_patterns("__pycache__", "assets")  # the suite makes its own tiny models
        shutil.copytree(ROOT / "nemo_mtbi", folder / "nemo_mtbi", ignore=ignored)
        for name in SUITE_FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    def run(self, tests: Sequence[str]) -> Verdict:
        """Runs tests on the copy as it is now.

        Raises:
            RuntimeError: if they could not be run at all, so that nothing can be said.
        """
        report, started = self.folder / "report.xml", time.monotonic()
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--full", "--tb=short", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}"]
        command += [f"{SUITE}::test_parity[{test}]" for test in tests]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"PARITY_TIMEOUT": str(self.timeout), "PARITY_REFERENCE": str(self.folder / "reference")}
        limit = PATIENCE + self.timeout * len(tests)
        status, log = _run(command, self.folder, environment, limit)
        if status not in (0, 1) or not report.is_file():
            raise RuntimeError(f"pytest ended with {status}:\n{log[-3000:]}")
        failure = first_failure(report.read_text())
        if status and failure is None:
            raise RuntimeError(f"the tests did not come to run:\n{log[-3000:]}")
        return Verdict(*(failure or (None, "")), time.monotonic() - started)

    def judge(self, mutation: Mutation) -> Verdict:
        """Runs the test of a mutation on the mutated copy, which is afterwards what it was."""
        path = self.folder / "nemo_mtbi" / mutation.file
        source = path.read_text()
        path.write_text(mutation.apply(source))
        try:
            return self.run([mutation.test])
        finally:
            path.write_text(source)


def _run(command: list[str], folder: Path, environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Exit status (``None``: no end within ``limit`` seconds) and output; none of the processes is left behind."""
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its workers: they are in the same session
                process.wait()
        log.seek(0)
        return status, log.read()


def first_failure(report: str) -> tuple[str, str] | None:
    """Test and reason in a JUnit report; ``None`` without one. What failed before a test began does not count."""
    for case in ElementTree.fromstring(report).iter("testcase"):
        failure = case.find("failure")
        if failure is not None:
            message = failure.get("message", "")  # pytest shortens it
            return case.get("name"), _reason(failure.text or message if "Traceback" in message else message)
    return None


def _reason(message: str) -> str:
    """The line that says what went wrong: the last of a traceback, else the first."""
    lines = message.split("--- worker")[0].strip().splitlines()
    if any("Traceback" in line for line in lines):
        lines = [line for line in lines if line and not line[0].isspace()][::-1]
    line = lines[0] if lines else "no message"
    return line.removeprefix("AssertionError: ").removeprefix("Failed: ").replace("|", "/")[:110]


def table(verdicts: dict[Mutation, Verdict]) -> str:
    """Markdown."""
    lines = ["| taken out | file | noticed by | how | seconds |", "|---|---|---|---|---|"]
    for mutation, verdict in verdicts.items():
        test = f"`{verdict.test}`" if verdict.test else "**nothing: it survives**"
        lines.append(f"| {mutation.name} | {mutation.file} | {test} | {verdict.reason} | {verdict.seconds:.0f} |")
    return "\n".join(lines)


def main(mutations: Sequence[Mutation], timeout: float) -> int:
    """Judges all mutations; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="mutate-parity-") as folder:
        workspace, verdicts = Workspace(Path(folder), timeout), {}
        control = workspace.run(sorted({mutation.test for mutation in mutations}))
        if control.test:
            print(f"{control.test} fails without any mutation: {control.reason}", file=sys.stderr)
            return 1
        print(f"unchanged: all tests pass, {control.seconds:.0f} s", file=sys.stderr)
        for mutation in mutations:
            verdicts[mutation] = verdict = workspace.judge(mutation)
            print(f"{mutation.name}: {verdict.test or 'SURVIVES'} {verdict.reason}", file=sys.stderr, flush=True)
    print(table(verdicts))
    survivors = [mutation.name for mutation, verdict in verdicts.items() if verdict.test is None]
    print(f"\n{len(verdicts) - len(survivors)} of {len(verdicts)} mutations are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mutations whose name holds it")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a layout hangs")
    options = parser.parse_args()
    chosen = [mutation for mutation in read_mutations() if options.only in mutation.name]
    if not chosen:
        parser.error(f"no mutation's name holds {options.only!r}")
    sys.exit(main(chosen, options.timeout))
