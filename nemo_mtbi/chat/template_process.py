# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a process of their own, with limits of time, memory and length.

The process starts with the first template, answers all of them, and ends with this one. It has none of this one's
environment.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CPU_SECONDS, MEMORY, LONGEST = 1, 2**29, 2**20  # for one conversation: seconds, bytes, characters
_PATIENCE = 120.0  # seconds by the clock, on a machine that has other work
_KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # without which some pythons do not start
# Some templates name today's date: a prompt must not change over night. This is the date of Llama 3.1's own.
DATE = datetime(2024, 7, 26)


class TemplateError(ValueError):
    """A template refuses a conversation, or takes more than it may."""


class _Worker:
    """A process that renders templates."""

    def __init__(self) -> None:
        packages = {_folder_of(name) for name in ("jinja2", "markupsafe")}
        limits = map(str, (CPU_SECONDS, MEMORY, LONGEST))
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py")), *limits, *packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process that renders chat templates has no pipes")
        self._requests, self._answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        self._rest = b""  # of an answer, read ahead
        if "ready" not in (self._read() or {}):
            self.close()
            raise RuntimeError(f"{sys.executable} can't start the process that renders chat templates")

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the answer to a request; ``None`` if the process has met its limits."""
        try:
            self._write(json.dumps(request).encode() + b"\n")
        except OSError:
            return None
        return self._read()

    def _write(self, content: bytes) -> None:
        while content:
            content = content[os.write(self._requests, content) :]

    def _read(self) -> dict[str, Any] | None:
        end = time.monotonic() + _PATIENCE
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                return None
            block = os.read(self._answers, 2**16)
            if not block:
                return None
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process, unless it is that of the process this one was forked from."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


def _folder_of(package: str) -> str:
    """Return the folder that a package lies in."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is not installed, and chat templates can't be rendered: install nemo_mtbi anew")
    return str(Path(spec.origin).parents[1])


_worker: _Worker | None = None
_lock = threading.Lock()


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """Return the text that a template makes of a conversation.

    Args:
        template: Jinja's, in the dialect of transformers.
        variables: plain values: ``messages``, ``add_generation_prompt`` and others.

    Raises:
        TemplateError: if it raises an error, or takes more than :data:`CPU_SECONDS`, :data:`MEMORY` or
            :data:`LONGEST` allow.
    """
    global _worker
    request = {"template": template, "variables": dict(variables), "date": DATE.isoformat()}
    with _lock:
        if _worker is not None and (_worker.owner != os.getpid() or _worker.process.poll() is not None):
            _worker.close()
            _worker = None
        if _worker is None:
            _worker = _Worker()
        answer = _worker.answer(request)
        if answer is None:
            _worker.close()
            _worker = None
    if answer is None:
        raise TemplateError(
            f"it takes more than {CPU_SECONDS} s or {MEMORY >> 20} MiB for one conversation: give the LLM another "
            "chat template, or name a prompt format, as in model.chat={format: llama3}"
        )
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


@atexit.register
def _end() -> None:
    if _worker is not None:
        _worker.close()
