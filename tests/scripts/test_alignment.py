# SPDX-License-Identifier: Apache-2.0
"""The experiment on word boundaries, on a few sentences."""

import json
import re
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "experiments" / "alignment.py"


def test_boundaries_of_a_few_sentences(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path), "--utterances", "40"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (line,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("| espeak"))
    (report,) = json.loads((tmp_path / "alignment.json").read_text())
    assert report["counts"]["cuts"] == 40
    both = report["against_the_former"]["median_boundary_ms"]
    assert re.fullmatch(rf"\| espeak.* \| demo \| \d+ of 40 \| \d+ \| \d+ \| \d+ \| {both} \|", line)
    assert both <= 40
