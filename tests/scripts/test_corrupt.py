# SPDX-License-Identifier: Apache-2.0
"""A sample of the corruptions of ``scripts/experiments/corrupt.py``; the script makes 200."""

import random
import sys
from pathlib import Path
from unittest import mock

import pytest

EXPERIMENTS = str(Path(__file__).resolve().parents[2] / "scripts" / "experiments")


@pytest.fixture
def corrupt(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import corrupt

    yield corrupt
    for name in ("corrupt", "corrupt_stores"):
        del sys.modules[name]


def job(folder):
    """Worker: damages what the stores hold."""
    sys.path.insert(0, EXPERIMENTS)
    import corrupt

    from nemo_mtbi.io.digests import CheckedFile

    Path(folder, "right").mkdir()
    outcomes, failed = corrupt.run(16, 1, Path(folder, "right"))
    assert not failed, failed
    assert sum(outcomes.values()) == 16 and {kind for _, kind in outcomes} == {"refused", "right"}
    Path(folder, "blind").mkdir()
    with mock.patch.object(CheckedFile, "_check", lambda *unused: None):  # it notices that nothing is compared
        with mock.patch.object(corrupt, "corrupt", harm):
            _, failed = corrupt.run(1, 1, Path(folder, "blind"), corrupt.STORES[:1])
    assert ["other content was loaded" in line for line in failed] == [True]


def harm(rng, place):
    """Flip a bit of the connector."""
    import tarfile

    with tarfile.open(place / "model.nemo") as tar:
        member = tar.getmember("./model_weights.safetensors")
    data = bytearray((place / "model.nemo").read_bytes())
    data[member.offset_data + member.size - 50] ^= 1
    (place / "model.nemo").write_bytes(data)
    return "a flipped bit", "model.nemo"


@pytest.mark.slow
def test_damage_is_refused_or_does_not_matter(tmp_path, processes):
    """In a new process: those that it forks can't use the process groups of another test."""
    processes(job, tmp_path, count=1, timeout=600, fresh=True)


def test_every_corruption_changes_a_file(corrupt, tmp_path):
    for number, name in enumerate(sorted(corrupt.CORRUPTIONS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        rng = random.Random(name)
        content = {path: rng.randbytes(1000) for path in (folder / "a.x", folder / "b.x")}
        for path, data in content.items():
            path.write_bytes(data)
        corrupt.CORRUPTIONS[name](rng, folder / "a.x")
        assert {path: path.read_bytes() for path in content} != content, name


def test_a_message_must_name_what_is_damaged(corrupt, tmp_path):
    from corrupt_stores import Store

    def load(message):
        def fail(place):
            raise ValueError(message.replace("PLACE", str(place)))

        return fail

    for message, kind in (("PLACE/a is bad", "refused"), ("model.key=a is bad", "refused"), ("bad", "FAILED")):
        assert corrupt.judge(Store("one", None, load(message), ("model.key",)), tmp_path, "")[0] == kind
    other = corrupt.judge(Store("one", None, lambda place: "x"), tmp_path, "y")
    assert other == ("FAILED", "other content was loaded")
    assert corrupt.judge(Store("one", None, lambda place: 1 / 0), tmp_path, "")[0] == "FAILED"


def test_the_table_counts_outcomes(corrupt):
    table = corrupt.table({("a", "refused"): 2, ("a", "right"): 1, ("b", "FAILED"): 1})
    assert table.splitlines()[2:] == ["| a | 3 | 2 | 1 | 0 |", "| b | 1 | 0 | 0 | 1 |", "| all | 4 | 2 | 1 | 1 |"]
