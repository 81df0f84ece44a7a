# SPDX-License-Identifier: Apache-2.0
import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from nemo_mtbi.io import heartbeat
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text, time_text


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)


def test_a_log_gets_a_line_again_and_again():
    console = Console(file=io.StringIO(), width=20)
    with Heartbeat(lambda: "at [1] of 2\x1b[2J", console):
        time.sleep(0.3)
    lines = console.file.getvalue().splitlines()
    assert len(lines) > 3 and set(lines) == {"at [1] of 2\\x1b[2J"}
    time.sleep(0.1)
    assert console.file.getvalue().splitlines() == lines, "it ends with its body"


@pytest.mark.parametrize("terminal, show", [(True, True), (False, False)])
def test_a_terminal_has_its_bar(terminal, show):
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ={"TERM": "xterm"})
    with Heartbeat(lambda: "x", console, show, last=True):
        time.sleep(0.1)
    assert console.file.getvalue() == ""


def test_bars_in_one_line():
    bar = Progress(disable=True)
    task = bar.add_task("answers", total=10)
    bar.add_task("others", total=3, start=False)
    bar.advance(task, 4)
    assert bar_text(bar).startswith("answers: 4/10 in 0:00:00") and bar_text(bar).endswith("others: 0/3 in 0:00:00")
    assert time_text(3725.4) == "1:02:05"


def test_a_bar_of_unknown_length_shows_what_is_done():
    bar = Progress(disable=True)
    bar.advance(bar.add_task("aligning", total=None), 7)
    assert bar_text(bar).startswith("aligning: 7 in 0:00:00")
