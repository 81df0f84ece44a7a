# SPDX-License-Identifier: Apache-2.0
"""Hostile archives, made from the parts of good ones: no code runs, nothing gets out, nothing is written elsewhere."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = str(Path(__file__).resolve().parents[2] / "scripts" / "experiments")


@pytest.fixture
def hostile(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import hostile

    yield hostile
    for name in ("hostile", "hostile_parts"):
        del sys.modules[name]


def test_archives_are_refused_by_name_or_harmless(hostile, tmp_path):
    outcomes = hostile.attack(tmp_path, 100, seed=1)
    assert sum(outcomes.values()) >= 100
    assert sum(number for (_, outcome), number in outcomes.items() if outcome == "refused") > 60
    assert {kind for kind, _ in outcomes} == {"small", "rich", "full", "tensors", "encoder"}


def test_the_watch_sees_what_it_is_for(hostile, tmp_path):
    """That nothing was seen above means that nothing was done."""
    watch, inside, outside = hostile.Watch(tmp_path / "work"), tmp_path / "work", tmp_path / "outside"
    inside.mkdir()
    with watch.watching():
        (inside / "a").write_text("x")
        (inside / "a").read_text()
        Path(__file__).read_text()
    assert not watch.seen
    acts = [
        lambda: outside.write_text("x"),
        lambda: outside.with_name("folder").mkdir(),
        lambda: os.system("true"),
        lambda: subprocess.run(["true"]),
        lambda: pickle.loads(pickle.dumps(hostile.Runs(outside))),
    ]
    for act in acts:
        with watch.watching():
            act()
        assert len(watch.seen) >= 1
