# SPDX-License-Identifier: Apache-2.0
"""Processes that stay alive between tests, since importing NeMo takes far longer than what a test asks of them.

A job is a function at the top of a test file, called in ``n`` processes whose environment is that of ``torchrun``.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path

_LEAVE = 10.0  # seconds to end in


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WorkerPool:
    """Starts processes when they are first needed; ends all of them when a job fails, since the others may hang."""

    def __init__(self, log_dir: Path):
        self.log_dir = log_dir
        self.processes: list[subprocess.Popen] = []

    def _start(self, count: int) -> None:
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        while len(self.processes) < count:
            log = open(self.log_dir / f"worker{len(self.processes)}.log", "a")
            process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
            log.close()
            self.processes.append(process)

    def run(self, file: str, function: str, arguments: list[str], count: int, timeout: float) -> None:
        """Runs one job.

        Raises:
            AssertionError: with what each process reports, if one fails or the time is over.
        """
        self._start(count)
        job = {"file": file, "function": function, "arguments": arguments, "port": free_port(), "world": count}
        job["timeout"] = timeout
        waiting = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes[:count]):
                process.stdin.write(json.dumps({**job, "rank": rank}).encode() + b"\n")
                process.stdin.flush()
                selector.register(process.stdout, selectors.EVENT_READ, rank)
                waiting[rank] = process
            deadline, failures = time.monotonic() + timeout, []
            while waiting and not failures:
                events = selector.select(max(deadline - time.monotonic(), 0))
                if not events:
                    failures.append(f"no end after {timeout} s in processes {sorted(waiting)}")
                for key, _ in events:
                    answer = key.fileobj.readline()
                    selector.unregister(key.fileobj)
                    waiting.pop(key.data)
                    if answer != b'"done"\n':
                        failures.append(f"process {key.data}: " + (json.loads(answer) if answer else "died"))
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures + [self._logs()]))

    def _logs(self) -> str:
        tails = [(path.name, path.read_text()[-3000:]) for path in sorted(self.log_dir.glob("worker*.log"))]
        return "\n".join(f"--- {name}\n{tail}" for name, tail in tails if tail)

    def stop(self) -> None:
        """Ends all processes: by the end of their input, so that they end their own, or else by force."""
        for process in self.processes:
            process.stdin.close()
        deadline = time.monotonic() + _LEAVE
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        self.processes.clear()


def _work() -> None:
    """Main function of a process of the pool: jobs come in by line, and one line answers each."""
    import faulthandler
    import importlib.util
    import traceback

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what jobs print goes to the log
    modules = {}
    for line in sys.stdin:
        job = json.loads(line)
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]),
            RANK=str(job["rank"]),
            LOCAL_RANK=str(job["rank"]),
            WORLD_SIZE=str(job["world"]),
        )
        faulthandler.dump_traceback_later(0.9 * job["timeout"])  # where it hangs goes to the log
        try:
            if job["file"] not in modules:
                spec = importlib.util.spec_from_file_location(Path(job["file"]).stem, job["file"])
                modules[job["file"]] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[job["file"]])
            getattr(modules[job["file"]], job["function"])(*job["arguments"])
            from nemo_mtbi.parallel import groups

            groups.shut_down()
            answer = "done"
        except BaseException:
            answer = traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _work()
