# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

from nemo_mtbi.evaluation.files import write_json, write_text


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = write_text(tmp_path / "new" / "a.txt", "one\r\nä")
    assert path.read_bytes() == "one\r\nä".encode() and os.listdir(path.parent) == ["a.txt"]

    def die(*unused):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        write_text(path, "two")
    assert path.read_bytes() == "one\r\nä".encode()
    write_text(path, "three")  # what the kill has left is in nobody's way
    assert path.read_text() == "three" and os.listdir(path.parent) == ["a.txt"]


def test_equal_figures_give_equal_bytes(tmp_path):
    one = write_json(tmp_path / "a", {"b": 0.1 + 0.2, "a": [1, None, {"x": (True,)}]}).read_bytes()
    assert one == write_json(tmp_path / "b", {"a": [1, None, {"x": [True]}], "b": 0.3}).read_bytes()
    assert json.loads(one) == {"a": [1, None, {"x": [True]}], "b": 0.3}
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        write_json(tmp_path / "c", {"a": float("nan")})
