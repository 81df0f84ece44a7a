# SPDX-License-Identifier: Apache-2.0
"""Processes that stay alive between tests, since importing NeMo takes far longer than what a test computes.

A job is a function at the top of a test file, called in ``n`` processes whose environment is that of ``torchrun``. All
processes are forked from one that has imported NeMo and runs nothing else, so that a process costs milliseconds.
"""

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

# Imported once, by the process that the others are forked from. scripts/experiments/small_runs.py forks from it too.
PRELOADED = [
    "nemo_mtbi.models.mtbi_model",
    "nemo_mtbi.commands.train",
    "nemo_mtbi.parallel.strategy",
    "nemo_mtbi.testing",
    "nemo.collections.asr.models",
    "nemo.utils.exp_manager",
    "pytest",
]
_START, _LEAVE = 600.0, 10.0  # seconds to import NeMo in, and to end in
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _environment(**values: str):
    """Environment variables that hold within the block: a process that is started there keeps them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def forking_context() -> multiprocessing.context.BaseContext:
    """The context whose processes are forked from one that has imported :data:`PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_script(arguments: Sequence[str], folder: Path, log: Path, timeout: float) -> int:
    """Run a Python script as ``python`` does, in a new process that has imported NeMo already.

    Args:
        arguments: path of the script, and its arguments.
        folder: in which it runs.
        log: file for all that it prints.
        timeout: seconds after which it is killed.

    Returns:
        Its exit status; negative: number of the signal that ended it.
    """
    with _environment(**_ENVIRONMENT):
        process = forking_context().Process(target=_script, args=(list(arguments), str(folder), str(log)))
        process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _script(arguments: list[str], folder: str, log: str) -> None:
    """Main function of a process of :func:`run_script`."""
    _begin(log)
    os.chdir(folder)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def _begin(log: str) -> None:
    """Make a forked process like one that a shell has started, except that all that it prints goes to a file."""
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(_ENVIRONMENT)
    random.seed()  # or all would draw as the process that they are forked from
    # multiprocessing would start the processes of data loaders as it has started this one
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)


class WorkerPool:
    """Starts processes when they are first needed; ends all of them when a job fails, since the others may hang."""

    def __init__(self, log_dir: Path):
        self.log_dir = log_dir
        self.workers: list[tuple[multiprocessing.Process, Connection]] = []
        self._context = forking_context()

    def _start(self, count: int) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with _environment(**_ENVIRONMENT, PYTHONPATH=path):  # of the process that is forked from
            while len(self.workers) < count:
                ours, theirs = self._context.Pipe()
                log = self.log_dir / f"worker{len(self.workers)}.log"
                process = self._context.Process(target=_work, args=(theirs, str(log)))
                process.start()
                theirs.close()
                self.workers.append((process, ours))

    def run(
        self, file: str, function: str, arguments: list[str], count: int, timeout: float, fresh: bool = False
    ) -> None:
        """Run one job.

        Args:
            file: where the function stands at the top.
            function: its name.
            arguments: what it is called with.
            count: number of processes.
            timeout: seconds; those in which NeMo is imported are not counted.
            fresh: in processes that have run no other job.

        Raises:
            AssertionError: with what each process reports, if one fails or the time is over.
        """
        if fresh:
            self.stop()
        self._start(count)
        job = {"file": file, "function": function, "arguments": arguments, "timeout": timeout}
        job["environment"] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        waiting, failures = {}, []
        for rank, (_, connection) in enumerate(self.workers[:count]):
            if not connection.poll(_START):
                self.stop()
                raise AssertionError(f"process {rank} was not ready after {_START} s\n{self._logs()}")
            connection.recv()
            connection.send({**job, "rank": str(rank)})
            waiting[connection] = rank
        deadline = time.monotonic() + timeout
        while waiting and not failures:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                failures.append(f"no end after {timeout} s in processes {sorted(waiting.values())}")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    problem = connection.recv()
                except (EOFError, ConnectionResetError):
                    problem = "died"
                if problem is not None:
                    failures.append(f"process {rank}: {problem}")
        if failures:
            self.stop()
            raise AssertionError("\n".join([*failures, self._logs()]))

    def _logs(self) -> str:
        tails = [(path.name, path.read_text()[-3000:]) for path in sorted(self.log_dir.glob("worker*.log"))]
        return "\n".join(f"--- {name}\n{tail}" for name, tail in tails if tail)

    def stop(self) -> None:
        """End all processes: by the end of their jobs, so that they end their own, or else by force."""
        for _, connection in self.workers:
            connection.close()
        deadline = time.monotonic() + _LEAVE
        for process, _ in self.workers:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
        self.workers.clear()


def _work(jobs: Connection, log: str) -> None:
    """Main function of a process of the pool: says that it is ready, takes a job, and answers with what went wrong."""
    _begin(log)
    modules = {}
    while True:
        try:
            jobs.send("ready")
            job = jobs.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the pool has no more jobs
        os.environ.update(job["environment"], RANK=job["rank"], LOCAL_RANK=job["rank"])
        faulthandler.dump_traceback_later(0.9 * job["timeout"])  # where it hangs goes to the log
        try:
            file = job["file"]
            if file not in modules:
                spec = importlib.util.spec_from_file_location(Path(file).stem, file)
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            getattr(modules[file], job["function"])(*job["arguments"])
            from nemo_mtbi.parallel import groups

            groups.shut_down()
            problem = None
        except BaseException:
            problem = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        jobs.send(problem)
