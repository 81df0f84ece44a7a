# SPDX-License-Identifier: Apache-2.0
import os
import pkgutil
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_mtbi
from nemo_mtbi.targets.generate import read_targets

FAKES = Path(__file__).parents[1] / "target_fakes.py"
fakes = SimpleNamespace(**runpy.run_path(str(FAKES)))
FakeLLM, content, generate, make_cuts = fakes.FakeLLM, fakes.content, fakes.generate, fakes.make_cuts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fakes.undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


def test_equal_bytes_in_another_folder(tmp_path, undisturbed):
    generate(tmp_path)
    assert content(tmp_path) == undisturbed[0]


def test_stopped_before_every_batch(tmp_path, undisturbed):
    expected, batches = undisturbed
    assert batches > 8
    for fatal in range(batches):
        folder, counts, second = tmp_path / str(fatal), Counter(), FakeLLM()
        with pytest.raises(KeyboardInterrupt):
            generate(folder, FakeLLM(fatal))
        with pytest.raises(RuntimeError, match="run again to finish"):
            read_targets(folder)
        generate(folder, second, counts=counts)
        assert content(folder) == expected
        assert len(second.batches) == batches - fatal, "no finished batch is asked again"


def test_stopped_again_and_again(tmp_path, undisturbed):
    expected, batches = undisturbed
    for _ in range(batches - 1):
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path, FakeLLM(fatal=1))
    llm = FakeLLM()
    generate(tmp_path, llm)
    assert len(llm.batches) == 1 and content(tmp_path) == expected


def test_partial_file_torn_at_any_byte(tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "torn", FakeLLM(fatal=3))
    (partial,) = (tmp_path / "torn").iterdir()
    whole = partial.read_bytes()
    assert whole.count(b"\n") == 4
    rng = random.Random(0)
    for size in [
        0,
        1,
        len(whole) - 1,
        whole.index(b"\n"),
        whole.index(b"\n") + 1,
        *rng.choices(range(len(whole)), k=8),
    ]:
        for tail in (b"", b"\0" * 9, b'{"batch": 0}\n'):  # what a crash may leave behind the end
            if not whole[:size].count(b"\n") and tail.endswith(b"\n"):
                continue  # a whole first line that is no header is refused: see below
            folder = tmp_path / f"{size}-{len(tail)}"
            folder.mkdir(exist_ok=True)
            (folder / partial.name).write_bytes(whole[:size] + tail)
            llm = FakeLLM()
            generate(folder, llm)
            assert content(folder) == undisturbed[0]
            finished = max(whole[:size].count(b"\n") - 1, 0)
            assert len(llm.batches) == undisturbed[1] - finished


@settings(max_examples=20, deadline=None)
@given(number=st.integers(1, 3), junk=st.binary(max_size=30), whole=st.booleans())
def test_damaged_lines_are_asked_again(tmp_path_factory, undisturbed, number, junk, whole):
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.raises(KeyboardInterrupt):
        generate(folder, FakeLLM(fatal=3))
    (partial,) = folder.iterdir()
    lines = partial.read_bytes().splitlines(keepends=True)
    lines[number] = junk + b"\n" * whole
    partial.write_bytes(b"".join(lines))
    generate(folder)
    assert content(folder) == undisturbed[0]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "pathlib.Path.unlink", "gzip.GzipFile.close"])
def test_killed_at_every_step_on_disk(tmp_path, undisturbed, monkeypatch, step):
    """Before each call of ``step`` in turn, until a run gets through without meeting one."""
    module, _, name = step.rpartition(".")
    real = getattr(pkgutil.resolve_name(module), name)
    kills = 0
    while True:
        calls = []

        def dying(*arguments, calls=calls, allowed=kills, **keywords):
            calls.append(None)
            if len(calls) > allowed:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        folder = tmp_path / str(kills)
        with monkeypatch.context() as patch:
            patch.setattr(step, dying)
            try:
                generate(folder)
                break
            except KeyboardInterrupt:
                pass
        generate(folder)
        assert content(folder) == undisturbed[0]
        kills += 1
    assert kills >= 3, "at least one for each shard"


def test_sigkill_at_random_moments(tmp_path, undisturbed):
    seed = random.randrange(2**32)
    print("seed of the moments:", seed)  # pytest shows it where the test fails
    rng = random.Random(seed)
    root = Path(nemo_mtbi.__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    for run in range(2):
        process = subprocess.Popen([sys.executable, str(FAKES), str(tmp_path)], env=env)
        before, deadline = answers_in(tmp_path), time.monotonic() + 120
        while answers_in(tmp_path) in (None, before) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)  # until it has written new answers
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"run {run} ended by itself"
    llm = FakeLLM()
    generate(tmp_path, llm)
    assert content(tmp_path) == undisturbed[0]
    assert len(llm.batches) < undisturbed[1]


def answers_in(folder):
    """Like `content`, without locks and headers, or None where another process renames or removes a file meanwhile."""
    try:
        found = content(folder)
    except FileNotFoundError:
        return None
    return {name: data for name, data in found.items() if not name.endswith(".lock") and data.count(b"\n") > 1}


def test_finished_work_is_not_done_again(tmp_path, undisturbed):
    generate(tmp_path / "resumed")
    (tmp_path / "resumed" / "cuts-00001.jsonl.gz").unlink()
    (tmp_path / "resumed" / "cuts-00002.partial.jsonl").write_text("left by a kill between rename and removal")
    counts, first, llm = Counter(), Counter(), FakeLLM()
    generate(tmp_path / "other", counts=first)
    generate(tmp_path / "resumed", llm, counts=counts)
    assert 0 < len(llm.batches) < undisturbed[1] and counts["reused_shards"] == 2
    for name in ("rows", "cuts", "truncated", "dropped_empty"):
        assert counts[name] == first[name], name
    assert content(tmp_path / "resumed") == undisturbed[0]


def test_newer_cuts_with_the_same_text_keep_their_answers(tmp_path):
    generate(tmp_path / "a")
    moved = make_cuts().map(lambda cut: cut.with_custom("kept", "newer"))
    llm = FakeLLM(fatal=0)
    generate(tmp_path / "a", llm, cuts=moved)
    generate(tmp_path / "b", cuts=moved)
    assert content(tmp_path / "a") == content(tmp_path / "b")


# ------------------------------------------------------------------------------------------------ two runs at once


def during(folder, shard, action):
    """An LLM that does something once, while it answers the first batch of a shard."""
    llm, done = FakeLLM(), []

    def respond(batch):
        if not done and (folder / f"cuts-{shard:05d}.partial.jsonl").exists():
            done.append(True)
            action()
        return llm(batch)

    return respond, done


@pytest.mark.parametrize(
    "shard, changes, held",
    [
        (0, {}, ""),
        (2, {}, ""),
        (1, {"overwrite": True, "shard_size": 20}, ""),
        (1, {"rank": 1, "world_size": 2}, "cuts-00001.jsonl.gz"),
    ],
)
def test_a_second_run_on_the_same_shards_is_refused(tmp_path, undisturbed, shard, changes, held):
    joined = tmp_path / "cuts.jsonl.gz"
    joined.write_bytes(b"of the first run")

    def begin_another():
        message = f"output_dir={tmp_path / held} is being written by another run"
        with pytest.raises(RuntimeError, match=message):
            generate(tmp_path, FakeLLM(), outdated=[joined], **changes)

    respond, done = during(tmp_path, shard, begin_another)
    generate(tmp_path, respond)
    assert done and joined.read_bytes() == b"of the first run"
    joined.unlink()
    found, expected = (dict(files) for files in (content(tmp_path), undisturbed[0]))
    assert b'"cuts.jsonl.gz"' in found.pop("targets.json") and expected.pop("targets.json")  # with its digest
    assert found == expected


def test_processes_that_share_the_shards_work_at_once(tmp_path, undisturbed):
    respond, done = during(tmp_path, 0, lambda: generate(tmp_path, rank=1, world_size=2))
    generate(tmp_path, respond, rank=0, world_size=2)
    assert done and content(tmp_path) == undisturbed[0]


def test_overwrite_removes_what_was_made_from_the_shards_first(tmp_path):
    joined = tmp_path / "cuts.jsonl.gz"
    generate(tmp_path)
    joined.touch()
    generate(tmp_path, outdated=[joined])
    assert joined.exists()
    generate(tmp_path, outdated=[joined], overwrite=True)
    assert not joined.exists()
