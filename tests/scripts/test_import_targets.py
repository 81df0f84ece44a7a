# SPDX-License-Identifier: Apache-2.0
import gzip
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment

import nemo_mtbi
from nemo_mtbi.targets.store import read_targets

ROOT = Path(nemo_mtbi.__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "import_targets.py"
_spec = importlib.util.spec_from_file_location("import_targets", SCRIPT)
import_targets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(import_targets)


def line(cut="c0", task="say", prompt="say it", response="hello", finish_reason="stop", **more):
    item = dict(cut_id=cut, task=task, prompt=prompt, response=response, finish_reason=finish_reason, **more)
    return {key: value for key, value in item.items() if value is not None}


def make_cuts(path, ids=("c0", "c1", "c2")):
    cuts = []
    for name in ids:
        recording = Recording(name, [AudioSource("file", [0], f"{name}.flac")], 16000, 16000, 1.0)
        segment = SupervisionSegment(name, name, 0.0, 1.0, text="héllo")
        cuts.append(MonoCut(name, 0.0, 1.0, 0, supervisions=[segment], recording=recording))
    with CutSet.open_writer(path) as writer:
        for cut in cuts:
            writer.write(cut)
    return path


def run(tmp_path, lines, *options, name="targets.jsonl", ids=("c0", "c1", "c2")):
    targets = tmp_path / name
    text = "".join((item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)) + "\n" for item in lines)
    targets.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    cuts = make_cuts(tmp_path / "in.jsonl.gz", ids)
    arguments = ["--cuts", cuts, "--targets", targets, "--llm", "my-llm", "--out", tmp_path / "out", *options]
    return import_targets.main([str(argument) for argument in arguments])


def complete():
    return [line("c0"), line("c1"), line("c2")]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["targets.jsonl", "targets.jsonl.gz"])
def test_joined_in_the_order_of_cuts_and_lines(tmp_path, name, capsys):
    lines = [
        line("c2", "keys", "", " ünder\n", "eos", logprob=-1.5),
        line("c0", finish_reason="length"),
        line("c1", response=""),
        "",
        line("c0", prompt="say it again"),
        line("c1", "keys", response=" ", finish_reason="length"),
    ]
    decoding = ["--chat", "abc", "--decoding", '{"max_new_tokens": 5}', "--shard-size", "2"]
    assert run(tmp_path, lines, *decoding, name=name) == 0
    cuts = list(read_targets(tmp_path / "out"))
    assert sorted(content(tmp_path / "out")) == ["cuts-00000.jsonl.gz", "cuts-00001.jsonl.gz", "targets.json"]
    behaviors = {
        cut.id: [tuple(row[key] for key in ("task", "prompt", "response", "truncated")) for row in cut.behaviors]
        for cut in cuts
    }
    assert list(behaviors.items()) == [
        ("c0", [("say", "say it", "hello", True), ("say", "say it again", "hello", False)]),
        ("c1", [("say", "say it", "", False)]),
        ("c2", [("keys", "", "ünder", False)]),
    ]
    for cut in cuts:
        assert cut.behaviors_from == {"llm": "my-llm", "chat": "abc", "decoding": {"max_new_tokens": 5}}
        assert cut.supervisions[0].text == "héllo"
    out = capsys.readouterr().out
    assert "3 cuts with 4 rows in 2 shards" in out and "limit: 2, of these empty and dropped: 1" in out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not a line of JSON"),
        ("[1]", "line 2: not a JSON object but list"),
        (line(cut=None), "line 2: 'cut_id' must be there and a string, got None"),
        (line(response=3), "line 2: 'response' must be there and a string, got 3"),
        (line(task=""), "line 2: 'task' is empty"),
        (line(finish_reason="abort"), "line 2: finish_reason 'abort' is not one of stop, eos, length"),
        (line(finish_reason=None), "line 2: 'finish_reason' must be there"),
        (json.dumps(line(response="\ud83d")), "line 2: 'response' holds half of a surrogate pair"),
        (line(response="another"), "line 2: the same cut, task and prompt as in"),
        (line("elsewhere"), "targets of 1 cut (elsewhere), which"),
    ],
)
def test_errors_name_the_place_and_write_nothing(tmp_path, capsys, bad, message):
    assert run(tmp_path, [line("c0"), bad, line("c1"), line("c2")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_byte_order_marks_and_separators_of_unicode(tmp_path):
    text = json.dumps(line("c0", response="one\u2028two\x85three"), ensure_ascii=False)
    assert run(tmp_path, ["\ufeff" + text + "\r", line("c1"), "\r", line("c2")]) == 0
    first, *_ = read_targets(tmp_path / "out")
    assert first.behaviors[0]["response"] == "one\u2028two\x85three"


def test_cuts_that_are_none_are_named(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(json.dumps(line()) + "\n")
    (tmp_path / "latin.jsonl").write_bytes("où\n".encode("latin-1"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    cuts = make_cuts(tmp_path / "in.jsonl.gz", ["c0"])
    for given, out, message in (
        (tmp_path, "out", "is a folder"),
        (tmp_path / "none.jsonl", "out", "does not exist"),
        (tmp_path / "latin.jsonl", "out", "is not UTF-8"),
        (tmp_path / "empty.jsonl", "out", "holds no cuts"),
        (cuts, "file", "is not a folder: give another path"),
    ):
        arguments = ["--cuts", given, "--targets", tmp_path / "t.jsonl", "--llm", "x", "--out", tmp_path / out]
        assert import_targets.main([str(argument) for argument in arguments]) == 1
        assert message in capsys.readouterr().err


def test_the_tokens_of_answers_are_kept(tmp_path):
    lines = [line("c0", ids=[5, 6]), line("c1", response="", ids=[]), line("c2")]
    assert run(tmp_path, lines) == 0
    found = [cut.custom["behaviors"][0].get("ids") for cut in read_targets(tmp_path / "out")]
    assert found == [[5, 6], [], None]


@pytest.mark.parametrize("ids", ["5 6", [5, "6"], [-1], [True]])
def test_malformed_tokens_are_refused(tmp_path, capsys, ids):
    assert run(tmp_path, [*complete()[:2], line("c2", ids=ids)]) == 1
    assert "line 3: 'ids' must be a list of token ids" in capsys.readouterr().err


def test_not_utf8_and_damaged_gzip(tmp_path, capsys):
    path, counts = tmp_path / "t.jsonl", import_targets.Counter()
    path.write_bytes(b'{"cut_id": "\xff"}\n')
    with pytest.raises(ValueError, match="t.jsonl, line 1: not a line of JSON in UTF-8"):
        import_targets.load_targets([path], counts)
    path = tmp_path / "t.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(line(f"c{n}")) + "\n" for n in range(5000)).encode())
    for data in (whole[:-2000], b"plain", whole[:1000] + b"\0" * 50 + whole[1050:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"t.jsonl.gz: can't be read past line \d+|t.jsonl.gz, line \d+: "):
            import_targets.load_targets([path], counts)
    with pytest.raises(ValueError, match="missing.jsonl: can't be read past line 0"):
        import_targets.load_targets([tmp_path / "missing.jsonl"], counts)


def test_cuts_without_targets(tmp_path, capsys):
    lines = [line("c1"), line("c2", response="", finish_reason="length")]
    assert run(tmp_path, lines) == 1
    assert "2 cuts (c0, c2) of 3 would be left without targets" in capsys.readouterr().err
    assert run(tmp_path, lines, "--on-missing", "skip") == 0
    assert "cuts left out without targets: 2" in capsys.readouterr().out
    assert [cut.id for cut in read_targets(tmp_path / "out")] == ["c1"]
    assert run(tmp_path, [], "--on-missing", "skip", "--overwrite") == 1
    assert "none of the 3 cuts" in capsys.readouterr().err


def test_unknown_cuts_can_be_skipped(tmp_path, capsys):
    assert run(tmp_path, [*complete(), line("x"), line("y"), line("y", "keys")], "--on-unknown", "skip") == 0
    assert "their cut is unknown: 2 cuts" in capsys.readouterr().out
    assert [cut.id for cut in read_targets(tmp_path / "out")] == ["c0", "c1", "c2"]


def test_bad_manifests_of_cuts(tmp_path, capsys):
    assert run(tmp_path, complete(), ids=("c0", "c1", "c2", "c1")) == 1
    assert "two cuts have the id c1" in capsys.readouterr().err
    assert run(tmp_path, complete(), "--cuts", str(tmp_path / "none.jsonl")) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(SupervisionSegment("s", "r", 0.0, 1.0).to_dict()) + "\n")
    assert run(tmp_path, complete(), "--cuts", str(other)) == 1
    assert "holds a SupervisionSet, not cuts" in capsys.readouterr().err


def test_overwrite(tmp_path, capsys):
    assert run(tmp_path, complete(), "--shard-size", "1") == 0
    before = content(tmp_path / "out")
    assert run(tmp_path, complete()) == 1
    assert "holds targets already" in capsys.readouterr().err and content(tmp_path / "out") == before
    assert run(tmp_path, complete(), "--overwrite") == 0
    assert sorted(content(tmp_path / "out")) == ["cuts-00000.jsonl.gz", "targets.json"]
    assert run(tmp_path, complete(), "--overwrite", "--shard-size", "1") == 0
    assert content(tmp_path / "out") == before, "equal input gives equal bytes"


@pytest.mark.parametrize("wrong", [["--shard-size", "0"], ["--decoding", "[]"], ["--decoding", "{"]])
def test_illegal_options(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, complete(), *wrong)
    assert wrong[0] in capsys.readouterr().err


def children_seconds():
    """CPU time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_loads_nothing_heavy():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--help"]
    used = children_seconds()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "finish_reason" in done.stdout and children_seconds() - used < 5
    loaded = {entry.rsplit("|", 1)[-1].strip() for entry in done.stderr.splitlines()}
    assert loaded.isdisjoint({"torch", "lhotse", "nemo", "numpy"}) and "argparse" in loaded
