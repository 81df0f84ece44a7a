# SPDX-License-Identifier: Apache-2.0
"""What a transcription reads, and that its output spares it."""

import json
import os
from pathlib import Path

import pytest

from nemo_mtbi.commands.transcribe_questions import output_path, parse_transcribe_config, read_utterances, spare_model


def config(**keys):
    return parse_transcribe_config({"model_path": "models/m.nemo", "prompt": "p", **keys})


def utterances(**keys):
    return read_utterances(config(**keys))


def names(found, folder):
    return [os.path.relpath(item.name, folder) for item in found]


def make(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# ------------------------------------------------------------------------------------------------ folders


def test_upper_case_endings_linked_folders_and_no_hidden_files(tmp_path):
    folder = tmp_path / "in"
    make(
        *(folder / name for name in ("b.wav", "A.WAV", "c.Wav", "sub/d.wav", "._b.wav", ".cache/e.wav", "n.txt", "f"))
    )
    make(tmp_path / "else" / "g.wav", tmp_path / "else" / "deep" / "h.wav")
    (folder / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")
    (folder / "d.wav").mkdir()
    expected = ["A.WAV", "b.wav", "c.Wav", "linked/deep/h.wav", "linked/g.wav", "sub/d.wav"]
    for ending in ("wav", ".wav", "WAV"):
        found = utterances(audio_dir=str(folder), audio_type=ending)
        assert names(found, folder) == expected
    assert found.left_out == {"hidden": 1, ".txt": 1, "without an ending": 1, "folders named *.wav": 1}


def test_a_folder_without_audio_says_what_it_holds(tmp_path):
    make(tmp_path / "a.mp3", tmp_path / "b.mp3")
    with pytest.raises(ValueError, match=r"holds no \*\.wav \(2 \.mp3\): set audio_type"):
        utterances(audio_dir=str(tmp_path))
    with pytest.raises(ValueError, match="audio_dir=.*a.mp3 is a file: name a folder"):
        utterances(audio_dir=str(tmp_path / "a.mp3"))


def test_a_single_file_is_a_list_of_one():
    assert config(audio="a.wav").audio == ["a.wav"]
    assert [item.name for item in utterances(audio="a.wav")] == ["a.wav"]


# ------------------------------------------------------------------------------------------------ text files


def test_only_line_feeds_end_a_line(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    line = json.dumps({"audio_filepath": "a.wav", "text": text}, ensure_ascii=False)
    (tmp_path / "m.json").write_bytes(f"\ufeff{line}\r\n{line}\r\n".encode())
    found = utterances(dataset_manifest=str(tmp_path / "m.json"))
    assert [item.extra["text"] for item in found] == [text, text]
    (tmp_path / "p.txt").write_bytes("\ufeffsay it\u2028slowly\r\n\r\nsay it\x85fast".encode())
    (found,) = utterances(audio=["a.wav"], prompt=None, prompts_file=str(tmp_path / "p.txt"))
    assert found.prompts == ("say it\u2028slowly", "say it\x85fast")


@pytest.mark.parametrize("key", ["dataset_manifest", "prompts_file"])
@pytest.mark.parametrize(
    "content, message",
    [("où?".encode("latin1"), "is not UTF-8 .byte 1"), (b"\x1f\x8b\x08\0", "is compressed"), (None, "is a folder")],
)
def test_files_that_are_not_text_are_named(tmp_path, key, content, message):
    path = tmp_path / "given"
    path.mkdir() if content is None else path.write_bytes(content)
    keys = {"dataset_manifest": str(path)} if key == "dataset_manifest" else {"audio": ["a.wav"], "prompt": None}
    with pytest.raises(ValueError, match=f"{key}={path} {message}"):
        utterances(**{**keys, key: str(path)})


@pytest.mark.parametrize(
    "line",
    [
        {"audio_filepath": "a.wav", "offset": 0, "duration": float("inf")},
        {"audio_filepath": "a.wav", "offset": float("nan")},
        {"audio_filepath": "a.wav", "offset": True},
        {"audio_filepath": "a.wav", "duration": -1},
        {"audio_filepath": "a.wav", "duration": "1"},
        {"audio_filepath": "a.wav", "offset": 10**400},
    ],
)
def test_times_that_are_none_name_the_line_or_are_skipped(tmp_path, line):
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"audio_filepath": "a.wav"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=f"line 2 of {manifest}: (offset|duration) must be seconds"):
        utterances(dataset_manifest=str(manifest))
    good, bad = utterances(dataset_manifest=str(manifest), on_bad_audio="skip")
    assert good.problem is None and "line 2" in bad.problem


def test_names_that_no_file_system_takes_are_left_to_the_reading_of_audio(tmp_path):
    lines = ["a" * 5000 + ".wav", "~nosuchuser/a.wav", "a\0b.wav", "\ud83d.wav"]
    (tmp_path / "m.json").write_text("".join(json.dumps({"audio_filepath": name}) + "\n" for name in lines))
    assert [item.name for item in utterances(dataset_manifest=str(tmp_path / "m.json"))] == lines
    with pytest.raises(ValueError, match="does not exist"):
        utterances(dataset_manifest="~nosuchuser/m.json")


def test_prompts_that_are_not_unicode_are_refused_where_they_stand(tmp_path):
    with pytest.raises(ValueError, match="prompt='caf.udce9' is not valid Unicode"):
        utterances(audio=["a.wav"], prompt="caf\udce9")
    (tmp_path / "m.json").write_text('{"audio_filepath": "a.wav", "prompt": "\\ud83d"}\n')
    with pytest.raises(ValueError, match="line 1 of .*valid Unicode"):
        utterances(dataset_manifest=str(tmp_path / "m.json"))


# ------------------------------------------------------------------------------------------------ the output


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(*(tmp_path / name for name in ("in/a.wav", "in/b.wav", "p.txt", "models/m.nemo", "m.nemo", "b.partial")))
    (tmp_path / "in" / "m.json").write_text(json.dumps({"audio_filepath": "a.wav"}) + "\n")
    (tmp_path / "p.txt").write_text("say it\n")
    os.link("in/a.wav", "hard.wav")
    os.symlink("in/a.wav", "soft.wav")
    os.symlink("in", "folder")
    return tmp_path


SOURCES = {"audio": ["in/a.wav"], "audio_dir": "in", "dataset_manifest": "in/m.json"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "output", ["in/a.wav", "hard.wav", "soft.wav", "folder/a.wav", "in/../in/a.wav", "{}/in/a.wav"]
)
def test_no_recording_is_replaced_by_whatever_name(inputs, source, output):
    given = config(**{source: SOURCES[source]}, output_filename=output.format(inputs))
    with pytest.raises(
        ValueError, match=f"output_filename would replace .*input .*{source}.*give another output_file"
    ):
        output_path(given, read_utterances(given))


@pytest.mark.parametrize("output", ["in/m.json", "p.txt", "models/m.nemo"])
def test_neither_manifest_prompts_nor_model_is_replaced(inputs, output):
    given = config(dataset_manifest="in/m.json", prompt=None, prompts_file="p.txt", output_filename=output)
    with pytest.raises(ValueError, match=f"output_filename would replace {output}"):
        output_path(given, read_utterances(given))


@pytest.mark.parametrize(
    "output", ["asr.nemo", "models/asr.nemo", "llm/model.safetensors", "models/llm/new", "b.nemo"]
)
def test_the_parts_that_a_nemo_refers_to_are_not_replaced(inputs, output):
    make(*(inputs / name for name in ("asr.nemo", "llm/model.safetensors", "models/llm/model.safetensors", "b.nemo")))
    stored = {"pretrained_asr": "asr.nemo", "pretrained_llm": "llm", "encoder": {"beside": {"path": "b.nemo"}}}
    with pytest.raises(ValueError, match=f"output_filename would replace {output}, .* of models/m.nemo"):
        spare_model(Path(output), "models/m.nemo", stored)
    spare_model(Path("models/new.jsonl"), "models/m.nemo", stored)
    spare_model(
        Path("nemo_mtbi/new.jsonl"), "models/m.nemo", {"pretrained_asr": "nemo:encoder", "pretrained_llm": "demo"}
    )


def test_the_file_in_the_making_replaces_no_input_either(inputs):
    given = config(audio=["b.partial"], output_filename="b")
    with pytest.raises(ValueError, match="would replace b.partial"):
        output_path(given, read_utterances(given))


def test_what_is_not_a_file_is_not_replaced(inputs):
    with pytest.raises(ValueError, match="output_filename=/dev/null is not a file"):
        output_path(config(audio=["in/a.wav"], output_filename="/dev/null"))


def test_answers_may_stand_among_the_recordings(inputs):
    given = config(audio_dir="in", output_filename="in/answers.jsonl")
    assert output_path(given, read_utterances(given)) == Path("in/answers.jsonl")
    (inputs / "in" / "answers.jsonl").write_text("former answers\n")
    assert output_path(given, read_utterances(given)) == Path("in/answers.jsonl")
