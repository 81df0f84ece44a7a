# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from nemo_mtbi.io.paths import make_folder, named_files, refuse_overwriting


@pytest.fixture
def cuts(tmp_path):
    (tmp_path / "cuts.jsonl").write_text("{}\n")
    return tmp_path / "cuts.jsonl"


@pytest.mark.parametrize("how", ["same", "relative", "symbolic link", "hard link", "linked folder", "dots"])
def test_every_name_of_an_input_is_refused(tmp_path, monkeypatch, cuts, how):
    monkeypatch.chdir(tmp_path)
    os.symlink(cuts, tmp_path / "soft")
    os.link(cuts, tmp_path / "hard")
    os.symlink(tmp_path, tmp_path / "folder")
    output = {
        "same": cuts,
        "relative": "cuts.jsonl",
        "symbolic link": "soft",
        "hard link": "hard",
        "linked folder": tmp_path / "folder" / "cuts.jsonl",
        "dots": tmp_path / "x" / ".." / "cuts.jsonl",
    }[how]
    with pytest.raises(ValueError, match="output_dir would replace .* is an input .cuts_path"):
        refuse_overwriting({"cuts_path": [cuts]}, {"output_dir": [tmp_path / "other", output]})
    with pytest.raises(ValueError, match="is an input"):
        refuse_overwriting({"cuts_path": [output]}, {"output_dir": [cuts]})


def test_other_files_beside_an_input_are_legal(tmp_path, cuts):
    (tmp_path / "copy").write_bytes(cuts.read_bytes())
    refuse_overwriting(
        {"cuts_path": [cuts, tmp_path / "missing"]}, {"output_dir": [tmp_path / "copy", tmp_path / "new"]}
    )


def test_output_folders_are_made_and_files_in_their_way_named(tmp_path, cuts):
    assert make_folder(tmp_path / "a" / "b", "--out").is_dir()
    assert make_folder(tmp_path / "a" / "b", "--out") == tmp_path / "a" / "b"
    for path in (cuts, cuts / "below"):
        with pytest.raises(ValueError, match=f"--out={path}: {cuts}.* is a file: name a folder"):
            make_folder(path, "--out")


def test_parts_of_a_folder_are_inputs_however_the_folder_holds_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("blobs/linked", "hard", "model/config.json"):
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path / "blobs" / "linked", tmp_path / "model" / "weights")
    os.link("hard", "model/hard")
    for output in ("model/config.json", "model/new", "model/new/deep", "blobs/linked", "hard", "model"):
        with pytest.raises(ValueError, match=f"out would replace {output}, which is an input .llm: model"):
            refuse_overwriting({"llm": ["model"]}, {"out": [output]})
    refuse_overwriting({"llm": ["model"]}, {"out": ["modelled", "blobs/other", "other"]})


def test_a_folder_that_is_replaced_takes_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm.partial" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "llm.partial" / "link")
    for source in ("llm.partial", "llm.partial/deep", "llm.partial/link", "llm.partial/deep/missing"):
        with pytest.raises(ValueError, match=f"which is an input .source: {source}"):
            refuse_overwriting({"source": [source]}, {"out": ["llm", "llm.partial"]})
    refuse_overwriting({"source": ["elsewhere"]}, {"out": ["llm.partial"]})


def test_names_that_no_file_system_takes_are_compared_without_an_error(tmp_path):
    names = ["a" * 5000, "~nosuchuser/a", "a\0b", "caf\udce9"]
    refuse_overwriting({"audio": names}, {"out": [tmp_path / "out"]})
    with pytest.raises(ValueError, match="audio"):
        refuse_overwriting({"audio": names}, {"out": [names[1]]})


def test_sources_of_data_name_their_files(tmp_path):
    inner, outer = tmp_path / "inner.yaml", tmp_path / "outer.yaml"
    inner.write_text("- {type: lhotse, cuts_path: deep.jsonl.gz}\n- {type: group, input_cfg: outer.yaml}\n")
    outer.write_text(f"- {{type: group, weight: 0.5, input_cfg: {inner}}}\n- {{manifest_filepath: [[m.json, 0.3]]}}\n")
    assert {"deep.jsonl.gz", "m.json", str(inner)} <= set(named_files(str(outer)))
    assert {"a_0.json", "a_1.json"} <= set(named_files({"manifest_filepath": "a__OP_0..1_CL_.json"}))
    assert {"a_0.json", "a_1.json"} <= set(named_files(["a_{0..1}.json"]))
    assert {"x(1).json", "x{1}.json"} >= set(named_files("x(1).json")) > set()
    assert list(named_files(["s3://bucket/a.json", "pipe:cat a", None, 3])) == []
    outer.write_text(f"- {{input_cfg: {outer}}}\n")  # in itself
    assert str(outer) in set(named_files(str(outer)))
