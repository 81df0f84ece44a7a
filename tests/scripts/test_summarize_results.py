# SPDX-License-Identifier: Apache-2.0
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "scripts" / "summarize_results.py"
spec = importlib.util.spec_from_file_location("summarize_results", PATH)
summarize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(summarize)


def run(seed: int, wer: float, agreement: float) -> dict:
    group = {"agreement": agreement, "text": 1.0, "speech": 0.5, "n": 10}
    return {
        "seed": seed,
        "transcription": {"wer": wer},
        "behavior": {name: dict(group) for name in summarize.GROUPS},
        "train": {"seconds": 100.0, "steps": 5, "peak_rss_gib": 1.5},
    }


def test_mean_and_spread_are_those_of_the_runs():
    text = summarize.table([run(0, 0.02, 0.9), run(1, 0.04, 0.8)], ["seed 0", "seed 1"])
    lines = text.splitlines()
    assert lines[0] == "| figure | seed 0 | seed 1 | mean ± sd |"
    assert lines[1].count("---") == 4
    assert "| transcription WER | 2.00% | 4.00% | 3.00% ± 1.41% |" in lines
    assert "| held-out tasks: agreement | 90.00% | 80.00% | 85.00% ± 7.07% |" in lines


def test_character_error_rate_is_shown_where_it_was_measured():
    measured = run(0, 0.5, 0.9)
    measured["transcription"]["cer"] = 0.04
    assert "| transcription CER | 4.00% |" in summarize.table([measured], ["x"])
    assert "CER" not in summarize.table([run(0, 0.5, 0.9)], ["x"])


def test_one_run_has_no_spread():
    assert "2.00% ± –" in summarize.table([run(0, 0.02, 0.9)], ["x"])


@pytest.mark.parametrize("labels", [[], ["a", "b"]])
def test_labels_must_match_the_runs(labels):
    with pytest.raises(ValueError, match="one label for each"):
        summarize.table([run(0, 0.1, 0.1)], labels)
