# SPDX-License-Identifier: Apache-2.0
"""scripts/prepare/corpus.py and scripts/summarize_results.py on inputs that are not what they should be."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

import nemo_mtbi

SCRIPTS = Path(nemo_mtbi.__file__).resolve().parents[1] / "scripts"


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, SCRIPTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus, summarize = load("prepare/corpus.py"), load("summarize_results.py")
export, align = load("prepare/export.py"), load("align.py")


@pytest.fixture
def manifest(tmp_path):
    """Three files, one of them stereo, with a byte order mark and CRLF."""
    lines = []
    for name, channels in (("a", 1), ("b", 2), ("c", 1)):
        soundfile.write(tmp_path / f"{name}.WAV", np.full((16000, channels), 0.1), 16000)
        lines.append({"audio_filepath": f"{name}.WAV", "duration": 1.0, "text": f"word {name}", "speaker": name})
    path = tmp_path / "m.json"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(line) + "\r\n" for line in lines).encode())
    return path


def run(script, *arguments):
    return script.main([str(argument) for argument in arguments])


def test_a_manifest_becomes_cuts(manifest, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.write_bytes(b"\xef\xbb\xbfa Word a.\r\nb Word\xe2\x80\xa8b.\r\n")
    assert run(corpus, "manifest", manifest, "--out", tmp_path / "out", "--texts", texts) == 0
    cuts = list(CutSet.from_file(tmp_path / "out" / "cuts.jsonl.gz"))
    assert [cut.supervisions[0].text for cut in cuts] == ["Word a.", "Word\u2028b."]
    assert [cut.supervisions[0].speaker for cut in cuts] == ["a", "b"] and cuts[1].num_channels == 2
    assert "left out, without a text: 1" in capsys.readouterr().out


@pytest.fixture
def wrong(tmp_path):
    """Inputs that no script can read, by what they are."""
    kinds = {"folder": tmp_path, "missing": tmp_path / "missing.jsonl"}
    contents = {
        "empty": b"",
        "Latin-1": '{"audio_filepath": "où"}\n'.encode("latin-1"),
        "UTF-16": "{}\n".encode("utf-16"),
        "binary": bytes(range(256)),
        "another list": b"[1,2]\n",
    }
    for kind, content in contents.items():
        kinds[kind] = tmp_path / f"{kind}.jsonl"
        kinds[kind].write_bytes(content)
    return kinds


@pytest.mark.parametrize("kind", ["folder", "missing", "empty", "Latin-1", "UTF-16", "binary", "another list"])
def test_an_input_that_can_not_be_read_is_one_line_with_its_name(manifest, wrong, kind, tmp_path, capsys):
    path, out = wrong[kind], tmp_path / "out"
    calls = {
        "manifest": (corpus, "manifest", path, "--out", out),
        "texts": (corpus, "manifest", manifest, "--out", out, "--texts", path),
        "times": (corpus, "manifest", manifest, "--out", out, "--times", path),
        "exported cuts": (export, "--cuts", path, "--out", out, "--format", "shar"),
        "aligned cuts": (align, "--cuts", path, "--asr", "demo", "--out", out),
        "results": (summarize, path),
    }
    for name, call in calls.items():
        assert run(*call) == 1, name
        said = capsys.readouterr().err
        error = said[said.index("error: ") :]
        assert str(path) in error and error.count("\n") == 1 and "Errno" not in error, name
        assert not list(out.glob("*")), name


def test_an_output_that_is_a_file_is_named(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(corpus, "manifest", manifest, "--out", tmp_path / "cuts") == 0
    out.write_text("kept")
    cuts = tmp_path / "cuts" / "cuts.jsonl.gz"
    for call in ((corpus, "manifest", manifest), (export, "--cuts", cuts, "--format", "shar")):
        assert run(*call, "--out", out) == 1
        assert f"--out={out}: {out} is a file: name a folder" in capsys.readouterr().err
    assert out.read_text() == "kept"


@pytest.mark.parametrize("option", ["lower", "=1", "a=[", "a"])
def test_options_of_recipes_are_keys_and_values(tmp_path, option, capsys):
    assert run(corpus, "librispeech", tmp_path, "--out", tmp_path / "out", "--option", option) == 1
    assert f"--option {option} must be KEY=VALUE" in capsys.readouterr().err


def test_a_folder_that_is_not_the_corpus_of_the_recipe(tmp_path, capsys):
    assert run(corpus, "timit", tmp_path, "--out", tmp_path / "out") == 1
    assert "Lhotse's recipe timit refuses" in capsys.readouterr().err


@pytest.mark.parametrize("content", [{}, {"transcription": None}, {"transcription": {"wer": 0.1}, "behavior": {}}])
def test_results_of_another_kind_are_named(tmp_path, content, capsys):
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert run(summarize, tmp_path / "results.json") == 1
    assert f"error: {tmp_path}/results.json" in capsys.readouterr().err
