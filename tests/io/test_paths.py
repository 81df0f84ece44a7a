# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from nemo_mtbi.io.paths import make_folder, refuse_overwriting


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
