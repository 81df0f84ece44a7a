# SPDX-License-Identifier: Apache-2.0
"""Manifests of cuts as every editor writes them, and files that are none."""

import json

import pytest
from lhotse import AudioSource, MonoCut, Recording, RecordingSet

from nemo_mtbi.data.gate import open_manifest
from nemo_mtbi.io.sources import FILES, ForbiddenSourceError

MARK = b"\xef\xbb\xbf"
ODD = "one\u2028two\u2029three\x85four"
NEMO = b'{"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}\n'


def read_cuts(path, key=""):
    return open_manifest(path, FILES, key=key)


def cut(name="c0"):
    recording = Recording(name, [AudioSource("file", [0], f"{name}.flac")], 16000, 16000, 1.0)
    return MonoCut(name, 0.0, 1.0, 0, recording=recording, custom={"said": ODD})


def lines_of(cuts):
    return [json.dumps(one.to_dict(), ensure_ascii=False).encode() for one in cuts]


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"--cuts={tmp_path} is a folder: name the manifest in it"):
        read_cuts(tmp_path, "--cuts")
    with pytest.raises(ValueError, match=f"--cuts={tmp_path}/none.jsonl does not exist"):
        read_cuts(tmp_path / "none.jsonl", "--cuts")


def test_cuts_come_anew_each_time_and_are_counted(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(MARK + b"\r\n".join(lines_of([cut("a"), cut("b")])) + b"\r\n\r\n")
    cuts = read_cuts(tmp_path / "c.jsonl")
    assert [one.id for one in cuts] == [one.id for one in cuts] == ["a", "b"]
    assert list(cuts)[1].custom["said"] == ODD


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"id": "x", ', "line 2 of .* is not JSON"),
        (b"null", "line 2 of .* is not a JSON object"),
        (NEMO, "line 2 of .* has no id"),
        (b'{"id": "x", "type": "MonoCut"}', "line 2 of .* start must be seconds"),
        ("\xe9".encode("latin-1"), "line 2 of .* is not UTF-8"),
    ],
)
def test_damage_further_on_is_named_too(tmp_path, line, message):
    (tmp_path / "c.jsonl").write_bytes(lines_of([cut("a")])[0] + b"\n" + line + b"\n")
    cuts = read_cuts(tmp_path / "c.jsonl", "--cuts") if line != "\xe9".encode("latin-1") else None
    with pytest.raises(ValueError, match=message) as error:
        list(cuts or read_cuts(tmp_path / "c.jsonl", "--cuts"))
    assert "c.jsonl" in str(error.value)


def test_other_manifests_of_lhotse_are_no_cuts(tmp_path):
    RecordingSet.from_recordings([cut().recording]).to_file(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="holds a RecordingSet, not cuts"):
        read_cuts(tmp_path / "r.jsonl")
    (tmp_path / "c.txt").write_text("{}")
    with pytest.raises(ValueError, match="the data source cannot be read.*Not a valid manifest"):
        read_cuts(tmp_path / "c.txt")


def test_a_manifest_that_is_a_command_or_elsewhere_is_not_opened():
    for path in ("pipe:touch canary", "https://example.org/cuts.jsonl.gz"):
        with pytest.raises(ForbiddenSourceError, match="--cuts="):
            read_cuts(path, "--cuts")
