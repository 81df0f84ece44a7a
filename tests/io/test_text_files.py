# SPDX-License-Identifier: Apache-2.0
"""Text files with byte order marks, CRLF, empty lines and every character of JSON, as Lhotse's readers get them."""

import gzip
import json

import pytest
from lhotse import AudioSource, CutSet, MonoCut, Recording
from lhotse import serialization as lhotse_files
from lhotse.lazy import LazyJsonlIterator
from lhotse.serialization import load_jsonl

from nemo_mtbi.io import reading
from nemo_mtbi.io.text_files import TextFile, TextOpener

MARK = b"\xef\xbb\xbf"
ODD = "one\u2028two\u2029three\x85four"


@pytest.fixture(autouse=True)
def opener():
    """Ours in the place of Lhotse's, as in a run; afterwards what was there before."""
    before = lhotse_files.CURRENT_IO_BACKEND
    reading.install()
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
    assert [one.id for one in CutSet.from_file(tmp_path / "cuts.json")] == ["c0", "c1"]


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
    reading.install()
    reading.install()
    assert type(lhotse_files.CURRENT_IO_BACKEND.inner.other) is Other


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
