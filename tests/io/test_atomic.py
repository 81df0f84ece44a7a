# SPDX-License-Identifier: Apache-2.0
import os

import pytest

from nemo_mtbi.io.atomic import building, replacing


def test_a_file_is_replaced_when_the_new_one_is_whole_and_not_before(tmp_path):
    path = tmp_path / "new" / "a.nemo"
    for content in (b"one", b"two"):
        with replacing(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"three")
        raise KeyError
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.nemo"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_is_built_under_another_name_and_only_leftovers_make_room(tmp_path):
    path, leftover = tmp_path / "new" / "llm", tmp_path / "new" / "llm.partial"
    with pytest.raises(KeyError), building(path) as folder:
        (folder / "half").touch()
        raise KeyError
    assert (leftover / "half").exists() and not path.exists()
    with building(path) as folder:
        (folder / "whole").touch()
    assert [entry.name for entry in path.parent.iterdir()] == ["llm"]
    assert [entry.name for entry in path.iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="llm is there: give a new folder"), building(path):
        pass
    (path.parent / "other.partial").mkdir()
    (path.parent / "other.partial" / "mine").touch()
    with pytest.raises(ValueError, match="other.partial.* was not left by an interrupted run: rename it"):
        with building(path.parent / "other"):
            pass
    assert (path.parent / "other.partial" / "mine").exists()


def test_two_runs_do_not_build_one_folder(tmp_path):
    with building(tmp_path / "llm") as folder, pytest.raises(RuntimeError, match="is being written by another run"):
        with building(tmp_path / "llm"):
            pass
    assert not folder.exists() and (tmp_path / "llm").exists()
