# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.io.text import is_writable_text, read_json_lines, read_json_object, read_lines, read_text


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_lines_of_editors_on_every_system(tmp_path, mark, end):
    (tmp_path / "t").write_bytes(mark + b"one" + end + b"two" + end)
    assert read_lines(tmp_path / "t") == ["one", "two"]


@given(st.lists(st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"])), max_size=5))
def test_only_a_line_feed_ends_a_line(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("lines") / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [line["text"] for _, line in read_json_lines(path)] == texts


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_separators_of_unicode_belong_to_the_text(tmp_path, character):
    (tmp_path / "t").write_text(f"one{character}two\n", encoding="utf-8")
    assert read_lines(tmp_path / "t") == [f"one{character}two"]


def test_files_that_are_not_text_are_refused_by_name(tmp_path):
    (tmp_path / "latin").write_bytes("où?\n".encode("latin-1"))
    (tmp_path / "packed").write_bytes(gzip.compress(b"{}\n"))
    for name, reason in (("latin", "not UTF-8"), ("packed", "compressed"), ("", "is a folder"), ("none", "can't be")):
        with pytest.raises(ValueError, match=reason) as error:
            read_text(tmp_path / name, "prompts_file")
        assert str(tmp_path / name) in str(error.value) and "prompts_file=" in str(error.value)


@pytest.mark.parametrize("line", ["[1]", "{", "5", "[" * 100_000])
def test_lines_that_are_not_objects_are_named(tmp_path, line):
    (tmp_path / "m").write_text("{}\n\n" + line + "\n")
    with pytest.raises(ValueError, match="line 3 of"):
        list(read_json_lines(tmp_path / "m"))


def test_half_a_surrogate_pair_cannot_be_written():
    assert is_writable_text("häß\u2028") and not is_writable_text("\ud83d") and not is_writable_text("caf\udce9")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": ' + "[" * 200_000, "it is nested too deep"),
        ("{", "it is not JSON"),
        ("[1]", "it is not a JSON object"),
        (" " * 2000, "it has 2000 bytes, more than it can need"),
        ("\ufeff{", "it is not JSON"),
    ],
)
def test_json_of_others_is_read_or_refused_by_name(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"key=.*config.json can't be read: {message}"):
        read_json_object(path, "key", limit=1000 if content.isspace() else 2**24)
    path.write_text('\ufeff{"a": [1]}')
    assert read_json_object(path) == {"a": [1]}
    with pytest.raises(ValueError, match="nowhere can't be read: No such file"):
        read_json_object(tmp_path / "nowhere")
