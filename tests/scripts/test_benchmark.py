# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own parts: equal work for all systems, turns, figures. What it measures needs SALM's packages."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"
MODULES = ("assets", "measure", "systems", "answering", "fill", "benchmark")


@pytest.fixture(scope="module")
def parts():
    """The scripts as modules; their names are free for others afterwards."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)


def test_draws_depend_on_the_seed_alone(parts):
    draw = parts["assets"].draw_utterances
    first, second, other = (draw(random.Random(seed), 2, 3) for seed in (1, 1, 2))
    assert [u.rows for u in first] == [u.rows for u in second] != [u.rows for u in other]
    for utterance, same in zip(first, second, strict=True):
        assert torch.equal(utterance.samples, same.samples)
        assert 4.0 <= len(utterance.samples) / parts["assets"].SAMPLE_RATE <= 16.0
        assert len(utterance.rows) == 3
        for before, behind, response in utterance.rows:
            assert 8 <= len(before) <= 32 and len(behind) == 6 and 8 <= len(response) <= 64


def test_systems_take_turns_and_the_first_round_does_not_count(parts, monkeypatch, capsys):
    measure, ran = parts["measure"], []
    costs = {"a": 2, "b": 4}  # seconds of a round, as the clock tells them
    now = [0.0]
    monkeypatch.setattr(measure.time, "process_time", lambda: now[0])

    def system(name):
        def prepare(work):
            now[0] += 100  # preparing is not timed

            def run():
                ran.append((work, name))
                now[0] += costs[name] * (50 if work == 0 else 1)

            return run

        return prepare

    times = measure.take_turns({name: system(name) for name in costs}, [0, 1, 2], "work")
    assert ran == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert times.seconds == {"a": [2, 2], "b": [4, 4]}
    assert times.ratio("a", "b") == {"ratio": 0.5, "low": 0.5, "high": 0.5}
    assert "work 2/2: a 2.00 s, b 4.00 s" in capsys.readouterr().err


def test_a_ratio_has_the_spread_of_the_rounds(parts):
    times = parts["measure"].Times({"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 2.0]})
    assert times.ratio("a", "b") == {"ratio": 1.0, "low": 0.5, "high": 1.5}


def test_memory_above_rest_is_that_of_the_body(parts):
    size = 64 * 2**20

    def take():
        return len(bytearray(b"\1" * size))

    measured = parts["measure"].peak_above_rest(take) * 2**30
    assert size * 0.9 < measured < size * 3  # the text and its copy


def test_the_file_has_the_promised_figures(parts):
    ratio = {"ratio": 0.5, "low": 0.4, "high": 0.6}
    step = {"salm": ratio, "plain": {**ratio, "ratio": 0.9}, "memory_salm": 0.7}
    details = {
        "step": {"k1": step, "k8": step},
        "generate": {"b1": ratio, "b16": ratio},
        "targets": {**ratio, "best": "hf_64"},
        "fill": {"decoder": 0.8, "encoder": 0.7, "step": 0.6},
    }
    figures = json.loads(json.dumps(parts["benchmark"].figures(details)))
    assert figures["step"]["k8"] == {"salm": 0.5, "plain": 0.9, "memory_salm": 0.7}
    assert figures["generate"] == {"b1": 0.5, "b16": 0.5} and figures["targets"] == {"hf_best": 0.5}
    assert figures["fill"]["decoder"] == 0.8
    table = parts["benchmark"].table(details)
    assert "| training step, k1, ÷ plain | 0.90 | 0.40–0.60 |" in table and "| targets ÷ hf_64 | 0.50 |" in table


def test_rounds_are_at_least_one(parts, capsys):
    with pytest.raises(SystemExit):
        parts["benchmark"].parse_arguments(["out", "--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
    assert parts["benchmark"].parse_arguments(["out", "--quick"]).rounds == 3
