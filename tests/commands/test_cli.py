# SPDX-License-Identifier: Apache-2.0
"""How a script that fails ends: its last line is the message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import atexit
import sys
from pathlib import Path

from nemo_mtbi.commands.cli import hydra_main


@hydra_main(config_name="thing", config_path=Path(__file__).resolve().parent)
def main(cfg):
    atexit.register(lambda: print("what a thread says later", file=sys.stderr))
    raise ValueError("size is 3: set it to \\x1b[2J4")


main()
"""


@pytest.mark.slow
def test_the_last_line_of_a_failure_is_its_message_and_torchrun_gets_it(tmp_path):
    (tmp_path / "thing.yaml").write_text("size: 3\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    told = tmp_path / "error.json"
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "TORCHELASTIC_ERROR_FILE": str(told),
        },
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: size is 3: set it to \\x1b[2J4"  # shown, and not obeyed
    assert "\x1b" not in done.stderr and "in main" in done.stderr  # where it happened
    assert json.loads(told.read_text())["message"]["message"] == "ValueError: size is 3: set it to \x1b[2J4"
