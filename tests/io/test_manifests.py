# SPDX-License-Identifier: Apache-2.0
"""What the first line of a file says of it, in messages that name the file."""

import json

import pytest
from lhotse import AudioSource, MonoCut, Recording

from nemo_mtbi.io.manifests import check_manifest

MARK = b"\xef\xbb\xbf"


def cut(name="c0"):
    recording = Recording(name, [AudioSource("file", [0], f"{name}.flac")], 16000, 16000, 1.0)
    return MonoCut(name, 0.0, 1.0, 0, recording=recording)


def lines_of(cuts):
    return [json.dumps(one.to_dict(), ensure_ascii=False).encode() for one in cuts]


NEMO = b'{"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}\n'


@pytest.mark.parametrize(
    "content, kind, message",
    [
        (b"", "cuts", "holds no cuts: it is empty"),
        (MARK + b"\r\n \n", "nemo", "holds no entries: it is empty"),
        (b"[1]\n", "lines", "first line of cuts_path=.* is not a JSON object"),
        (b"plain\n", "nemo", "first line of cuts_path=.* is not JSON"),
        (b"\xff\x00\n", "lines", "line 1 of .* is not UTF-8"),
        (b"- {}\n", "nemo", "is not JSON"),
        (NEMO, "cuts", "is a NeMo manifest and holds no cuts: give it as manifest_filepath, or make cuts"),
        (lines_of([cut()])[0], "nemo", "is not an entry of a NeMo manifest: it is a Lhotse cut: .*cuts_path"),
        (b'{"text": "a"}\n', "nemo", "must have the key audio_filepath"),
    ],
)
def test_the_first_line_says_what_a_file_is(tmp_path, content, kind, message):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        check_manifest(tmp_path / "m.jsonl", "cuts_path", kind)
    assert str(tmp_path / "m.jsonl") in str(error.value)


def test_what_may_be_a_manifest_passes(tmp_path):
    for kind, content in (("nemo", NEMO), ("cuts", lines_of([cut()])[0]), ("lines", b'{"conversations": []}')):
        (tmp_path / "m.jsonl").write_bytes(MARK + b"\n" + content)
        check_manifest(tmp_path / "m.jsonl", "cuts_path", kind)
