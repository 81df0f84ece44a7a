# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest

from nemo_mtbi.io.locks import exclusive

HOLD = """
import sys
from nemo_mtbi.io.locks import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    output = tmp_path / "new" / "out.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=f"output_filename=.*another run .process {other.pid}."):
            with exclusive(output, "output_filename"):
                pass
        other.kill()
        other.wait()
    with exclusive(output):
        assert os.listdir(output.parent) == [".out.jsonl.lock"]
    with exclusive(output):  # free again within one process too
        pass
    assert os.listdir(output.parent) == []


def test_a_lock_elsewhere_names_the_output(tmp_path):
    with exclusive(tmp_path / "out", "output_dir", tmp_path / "out" / "part"):
        assert os.listdir(tmp_path / "out") == [".part.lock"]
        with pytest.raises(RuntimeError, match=f"output_dir={tmp_path / 'out'} is being written by another run"):
            with exclusive(tmp_path / "out", "output_dir", tmp_path / "out" / "part"):
                pass
        with exclusive(tmp_path / "out", "output_dir", tmp_path / "out" / "other"):
            pass
    (tmp_path / "file").touch()
    for place in ("file/out", "file/deep/out"):
        with (
            pytest.raises(ValueError, match=f"output_dir=.*{place}: .* is not a folder"),
            exclusive(tmp_path / place, "output_dir"),
        ):
            pass
