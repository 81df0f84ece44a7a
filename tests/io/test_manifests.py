# SPDX-License-Identifier: Apache-2.0
"""Manifests with byte order marks, CRLF, empty lines and every character of JSON, and files that are none."""

import gzip
import json

import pytest
from lhotse import AudioSource, CutSet, MonoCut, Recording, RecordingSet
from lhotse import serialization as lhotse_files
from lhotse.lazy import LazyJsonlIterator
from lhotse.serialization import load_jsonl

from nemo_mtbi.io.manifests import TextFile, TextOpener, check_manifest, read_cuts, register_opener

MARK = b"\xef\xbb\xbf"
ODD = "one\u2028two\u2029three\x85four"


@pytest.fixture(autouse=True)
def opener():
    """Ours in the place of Lhotse's, as in a run; afterwards what was there before."""
    before = lhotse_files.CURRENT_IO_BACKEND
    register_opener()
    yield
    lhotse_files.CURRENT_IO_BACKEND = before


def cut(name="c0"):
    recording = Recording(name, [AudioSource("file", [0], f"{name}.flac")], 16000, 16000, 1.0)
    return MonoCut(name, 0.0, 1.0, 0, recording=recording, custom={"said": ODD})


def lines_of(cuts):
    return [json.dumps(one.to_dict(), ensure_ascii=False).encode() for one in cuts]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_readers_of_lhotse_and_nemo_take_what_editors_write(tmp_path, mark, end, packed):
    entries = [{"text": ODD}, {"text": "où"}]
    content = mark + end.join(json.dumps(entry, ensure_ascii=False).encode() for entry in entries) + end * 3
    path = tmp_path / ("m.jsonl.gz" if packed else "m.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert list(LazyJsonlIterator(path)) == list(load_jsonl(str(path))) == entries


def test_empty_lines_between_entries_and_before_them_are_left_out(tmp_path):
    (tmp_path / "m.json").write_bytes(MARK + b"\r\n\n{}\n \n{}\n")
    assert list(load_jsonl(tmp_path / "m.json")) == [{}, {}]


def test_empty_lines_of_text_keep_their_places(tmp_path):
    """NeMo reads some texts line by line beside a manifest."""
    (tmp_path / "t.txt").write_bytes(MARK + b"one\n\nthree\n")
    with lhotse_files.open_best(tmp_path / "t.txt") as file:
        assert list(file) == ["one\n", "\n", "three\n"]


def test_whole_documents(tmp_path):
    CutSet.from_cuts([cut(), cut("c1")]).to_file(tmp_path / "cuts.json")
    (tmp_path / "cuts.json").write_bytes(MARK + (tmp_path / "cuts.json").read_bytes())
    assert [one.id for one in read_cuts(tmp_path / "cuts.json")] == ["c0", "c1"]


def test_all_else_is_left_to_the_opener_that_was_there(tmp_path):
    class Other(lhotse_files.BuiltinIOBackend):
        def open(self, identifier, mode):
            return identifier, mode

    ours = TextOpener(Other())
    for identifier, mode in (("-", "r"), ("pipe:cat x", "r"), ("s3://b/x", "r"), ("x", "rb"), ("x", "w"), ("x", "a")):
        assert ours.open(identifier, mode) == (identifier, mode)
    (tmp_path / "x").write_text("{}\n")
    with ours.open(tmp_path / "x", "r") as file:
        assert list(file) == ["{}\n"] and not file._raw.closed
    assert file._raw.closed
    lhotse_files.CURRENT_IO_BACKEND = Other()
    register_opener()
    register_opener()
    assert type(lhotse_files.CURRENT_IO_BACKEND.other) is Other


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path, packed):
    content = b"{}\n" * 5000 + '{"text": "où"}\n'.encode("latin-1")
    (tmp_path / "m.jsonl").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match="line 5001 of .*m.jsonl is not UTF-8 .byte 11 is 0xf9.: convert it, .*iconv"):
        list(load_jsonl(tmp_path / "m.jsonl"))
    (tmp_path / "m.jsonl").write_text("{}\n", encoding="utf-16")
    with pytest.raises(ValueError, match="line 1 of .*m.jsonl is UTF-16: convert it with iconv -f utf-16"):
        list(load_jsonl(tmp_path / "m.jsonl"))


def test_half_a_compressed_file_is_named(tmp_path):
    (tmp_path / "m.gz").write_bytes(gzip.compress(b"{}\n" * 9999)[:-9])
    with pytest.raises(ValueError, match="m.gz can't be read to its end .*: give a whole copy"):
        list(load_jsonl(tmp_path / "m.gz"))
    with pytest.raises(ValueError, match="m.gz can't be read to its end"), TextFile(tmp_path / "m.gz") as file:
        file.read()


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


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=f"--cuts={tmp_path} is a folder: name the manifest in it"):
        read_cuts(tmp_path, "--cuts")
    with pytest.raises(ValueError, match=f"--cuts={tmp_path}/none.jsonl does not exist"):
        read_cuts(tmp_path / "none.jsonl", "--cuts")


def test_cuts_come_anew_each_time_and_are_counted(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(MARK + b"\r\n".join(lines_of([cut("a"), cut("b")])) + b"\r\n\r\n")
    cuts = read_cuts(tmp_path / "c.jsonl")
    assert cuts.is_lazy
    assert [one.id for one in cuts] == [one.id for one in cuts] == ["a", "b"]
    assert list(cuts)[1].custom["said"] == ODD


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"id": "x", ', "at the entry after a .JSONDecodeError"),
        (b"null", "at the entry after a .TypeError"),
        (NEMO, "at the entry after a"),
        (b'{"id": "x", "type": "MonoCut"}', "at the entry after a"),
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
    with pytest.raises(ValueError, match="holds Recordings, not cuts"):
        read_cuts(tmp_path / "r.jsonl")
    (tmp_path / "c.txt").write_text("{}")
    with pytest.raises(ValueError, match="c.txt can't be read as cuts .*Not a valid manifest"):
        read_cuts(tmp_path / "c.txt")
