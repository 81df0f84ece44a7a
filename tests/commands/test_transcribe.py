# SPDX-License-Identifier: Apache-2.0
import json
import os
import time
from dataclasses import fields
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf
from rich.console import Console

from nemo_mtbi.commands.transcribe import (
    TranscribeConfig,
    Utterance,
    output_path,
    parse_transcribe_config,
    read_utterances,
    transcribe,
)
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.parallel.device import pick_device

CONF = Path(__file__).resolve().parents[2] / "conf" / "mtbi_transcribe.yaml"
RATE = 16000


def config(**keys):
    return parse_transcribe_config({"model_path": "models/m.nemo", **keys})


def utterances(**keys):
    return read_utterances(config(**keys))


def write_lines(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


# ------------------------------------------------------------------------------------------------ what is asked


def test_the_yaml_holds_every_key_with_its_default():
    given, schema = OmegaConf.load(CONF), OmegaConf.structured(TranscribeConfig)
    assert set(given) == {entry.name for entry in fields(TranscribeConfig)}
    for key in given:
        assert OmegaConf.is_missing(given, key) == OmegaConf.is_missing(schema, key)
        if not OmegaConf.is_missing(given, key):
            assert given[key] == schema[key], key


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(audio=["a.wav"], zzz="x"), "key zzz: known keys: model_path, audio, audio_dir, dataset_manifest"),
        (dict(), "exactly one of audio, audio_dir, dataset_manifest; set are: none"),
        (dict(audio=["a.wav"], audio_dir="b"), "exactly one of .*; set are: audio, audio_dir"),
        (dict(audio=["a.wav"], prompt="p", prompts_file="f"), "prompt and prompts_file are both set"),
        (dict(audio=["a.wav"], on_bad_audio="ignore"), "on_bad_audio is 'ignore'; it must be raise or skip"),
        (dict(audio=["a.wav"], batch_size=0), "batch_size is 0"),
        (dict(audio=["a.wav"], batch_size="many"), "batch_size"),
        (dict(audio=["a.wav"], model_path="???"), "model_path is missing"),
    ],
)
def test_illegal_configurations(keys, message):
    with pytest.raises(ValueError, match=message):
        config(**keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(audio=["a.wav"]), "nothing is asked: set prompt"),
        (dict(audio=[], prompt=""), "empty list"),
        (dict(audio_dir="no-such-folder", prompt=""), "audio_dir=no-such-folder does not exist"),
        (dict(dataset_manifest="no-such.json", prompt=""), "dataset_manifest=no-such.json does not exist"),
        (dict(audio=["a.wav"], prompts_file="no-such.txt"), "prompts_file=no-such.txt does not exist"),
    ],
)
def test_missing_inputs(keys, message):
    with pytest.raises(ValueError, match=message):
        utterances(**keys)


def test_a_folder_with_sub_folders_and_another_type(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.flac", "b/a.flac", "c.wav"):
        (tmp_path / name).touch()
    found = utterances(audio_dir=str(tmp_path), audio_type="flac", prompt="p")
    assert [item.name for item in found] == [str(tmp_path / "b/a.flac"), str(tmp_path / "z.flac")]
    with pytest.raises(ValueError, match=r"holds no \*.mp3"):
        utterances(audio_dir=str(tmp_path), audio_type="mp3", prompt="p")


def test_prompts_file_and_the_empty_prompt(tmp_path):
    prompts = write_lines(tmp_path / "p.txt", "first?\n", "\n", "  second, with a comma \n")
    assert utterances(audio=["a.wav"], prompts_file=prompts)[0].prompts == ("first?", "second, with a comma")
    assert utterances(audio=["a.wav"], prompt="")[0].prompts == ("",)
    with pytest.raises(ValueError, match="holds no prompt"):
        utterances(audio=["a.wav"], prompts_file=write_lines(tmp_path / "empty.txt", "\n"))


def test_manifest_lines(tmp_path):
    (tmp_path / "a.wav").touch()
    own = {"audio_filepath": "a.wav", "prompt": "", "duration": 1.0, "speaker": "x"}
    part = {"audio_filepath": "/elsewhere/b.wav", "offset": 0.5, "duration": 0.25}
    manifest = write_lines(tmp_path / "m.json", own, "\n", part)
    first, second = utterances(dataset_manifest=manifest, prompt="p")
    assert (first.path, first.prompts, first.offset) == (tmp_path / "a.wav", ("",), None)
    assert first.extra == own and first.name == "a.wav"
    assert (second.path, second.prompts) == (Path("/elsewhere/b.wav"), ("p",))
    assert (second.offset, second.duration) == (0.5, 0.25)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{no json\n", "line 2 of .* is not JSON"),
        ("[]\n", "line 2 of .* is not a JSON object"),
        ({"text": "x"}, "line 2 of .* has no audio_filepath"),
        ({"audio_filepath": "a.wav"}, "line 2 of .* has no prompt, and neither prompt nor prompts_file is set"),
        ({"audio_filepath": "a.wav", "prompt": 3}, "line 2 of .*: prompt must be a string"),
        ({"audio_filepath": "a.wav", "prompt": "", "offset": -1}, "line 2 of .*: offset must be seconds"),
        ({"audio_filepath": "a.wav", "prompt": "", "duration": "1"}, "line 2 of .*: duration must be seconds"),
    ],
)
def test_illegal_manifest_lines(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        utterances(dataset_manifest=write_lines(tmp_path / "m.json", {"audio_filepath": "a.wav", "prompt": ""}, line))


def test_an_empty_manifest(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        utterances(dataset_manifest=write_lines(tmp_path / "m.json", "\n"), prompt="p")


def test_the_name_of_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_path(config(audio=["a.wav"])) == tmp_path / "answers_m.jsonl"
    assert output_path(config(audio_dir="x/my.recordings/")) == tmp_path / "x/my.recordings_m.jsonl"
    assert output_path(config(dataset_manifest="x/test.json")) == tmp_path / "x/test_m.jsonl"
    assert output_path(config(audio=["a.wav"], output_filename="o.json")) == Path("o.json")
    for bad, message in (("x/test.json", "is an input"), (str(tmp_path), "is a folder")):
        with pytest.raises(ValueError, match=f"output_filename.*{message}"):
            output_path(config(dataset_manifest="x/test.json", output_filename=bad))


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(pick_device(cuda)) for cuda in (None, 0, -1)] == ["cuda:1", "cuda:0", "cpu"]
    with pytest.raises(ValueError, match="cuda=2, but there are 2"):
        pick_device(2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert str(pick_device(None)) == "cpu"


# ------------------------------------------------------------------------------------------------ the answers


@pytest.fixture(scope="module")
def responder(speech_llm, llm_dir):
    from nemo_mtbi.testing import tiny_chat

    return Responder(speech_llm, tiny_chat(llm_dir / "tokenizer.model"), GenerationConfig(6, 2000))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Five files of tones and noise: several lengths, rates and numbers of channels."""
    folder = tmp_path_factory.mktemp("recordings")
    for index, (rate, channels) in enumerate([(16000, 1), (8000, 1), (44100, 2), (16000, 1), (22050, 1)]):
        rng = np.random.default_rng(index)
        time = np.arange(int((0.5 + 0.3 * index) * rate)) / rate
        tone = 0.3 * np.sin(2 * np.pi * 200 * 1.7**index * time)[:, None]
        soundfile.write(folder / f"{index}.wav", tone + 0.02 * rng.standard_normal((len(time), channels)), rate)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(responder, items, path, **keys):
    return transcribe(responder, items, path, **{"progress": False, **keys})


def test_every_prompt_about_every_audio(responder, recordings, tmp_path):
    prompts = ("say it", "", "count the words")
    names = sorted(map(str, recordings.iterdir()))
    items = [Utterance(name, Path(name), prompts) for name in names]
    result = run(responder, items, tmp_path / "new" / "out.jsonl", batch_size=2, show=4)
    lines = read(result.output)
    assert [(line["audio_filepath"], line["prompt"]) for line in lines] == [(n, p) for n in names for p in prompts]
    assert all(set(line) == {"audio_filepath", "prompt", "pred_text"} for line in lines)
    assert (result.answers, result.audios, result.first) == (15, 5, lines[:4])
    assert os.listdir(tmp_path / "new") == ["out.jsonl"]

    # the same as one question at a time
    from nemo_mtbi.inference.audio import load_audio

    for line in lines:
        samples = load_audio(line["audio_filepath"], responder.model.frame_counter)
        assert [line["pred_text"]] == responder.speech([samples], [(line["prompt"], 0)])
    assert len({line["pred_text"] for line in lines}) > 5, "the tiny LLM must not say the same to everything"


def test_a_log_gets_lines_while_the_answers_are_made(responder, recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nemo_mtbi.io.heartbeat.EVERY", 0.05)

    def speech(self, audio, requests, progress):
        time.sleep(0.5)
        return ["x"] * len(requests)

    monkeypatch.setattr(Responder, "speech", speech)
    items = [Utterance(str(path), path, ("say it",)) for path in sorted(recordings.iterdir())]
    run(responder, items, tmp_path / "out.jsonl", batch_size=3, progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("answers: 0/5 in 0:00:0")]
    assert len(lines) > 2
    run(responder, items, tmp_path / "silent.jsonl")
    assert capsys.readouterr().out == ""


def test_manifest_keys_are_kept_and_offsets_are_heard(responder, recordings, tmp_path):
    samples, _ = soundfile.read(recordings / "3.wav")
    soundfile.write(tmp_path / "part.wav", samples[RATE // 4 : RATE // 4 + RATE], RATE)
    lines = [
        {
            "audio_filepath": str(recordings / "3.wav"),
            "offset": 0.25,
            "duration": 1.0,
            "text": "ä",
            "prompt": "word",
        },
        {"audio_filepath": "part.wav", "duration": 99, "id": [1], "pred_text": "old", "prompt": "word"},
        {"audio_filepath": str(recordings / "3.wav"), "prompt": "word"},
    ]
    items = utterances(dataset_manifest=write_lines(tmp_path / "m.json", *lines))
    answers = read(run(responder, items, tmp_path / "out.jsonl").output)
    assert [{**line, "pred_text": ""} for line in answers] == [{**line, "pred_text": ""} for line in lines]
    part, same, whole = (line["pred_text"] for line in answers)
    assert part == same != whole


@pytest.fixture
def bad_files(tmp_path):
    """Path → reason."""
    long = np.random.default_rng(0).uniform(-0.1, 0.1, 2 * 3600 * 1000)
    soundfile.write(tmp_path / "two_hours.wav", long, 1000)
    soundfile.write(tmp_path / "no_samples.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", np.random.default_rng(0).uniform(-1, 1, 100), RATE)
    (tmp_path / "zero_bytes.wav").touch()
    (tmp_path / "text.wav").write_text("this is no audio\n" * 100)
    (tmp_path / "torn.wav").write_bytes((tmp_path / "silent.wav").read_bytes()[:20])
    unreadable = ("missing", "zero_bytes", "text", "torn")
    reasons = {"two_hours": "too_long", "no_samples": "empty", "silent": "silent", "nan": "not_finite"}
    reasons |= {"short": "too_short"} | {name: "unreadable" for name in unreadable}
    return {tmp_path / f"{name}.wav": reason for name, reason in reasons.items()}


def test_bad_audio_is_counted_by_reason(responder, recordings, bad_files, tmp_path):
    good = [recordings / "0.wav", recordings / "1.wav"]
    items = [Utterance(str(path), path, ("say it", "")) for path in [good[0], *bad_files, good[1]]]
    items.append(Utterance("past the end", good[0], ("",), offset=5.0))
    result = run(responder, items, tmp_path / "out.jsonl", batch_size=3, on_bad_audio="skip")
    assert result.skipped == {
        "unreadable": 5,
        "too_long": 1,
        "empty": 1,
        "silent": 1,
        "not_finite": 1,
        "too_short": 1,
    }
    assert [line["audio_filepath"] for line in read(result.output)] == [str(p) for p in good for _ in range(2)]
    text = StringIO()
    result.render(Console(file=text, width=200))
    assert "4 answers about 2 audios" in text.getvalue()
    assert "left out: 10 audios (1 empty, 1 not_finite, 1 silent, 1 too_long, 1 too_short" in text.getvalue()


def test_bad_audio_stops_with_its_path_and_reason(responder, recordings, bad_files, tmp_path):
    for path, reason in bad_files.items():
        items = [Utterance(str(p), p, ("say it",)) for p in (recordings / "0.wav", path)]
        with pytest.raises(BadAudioError, match=f"{path}.*on_bad_audio=skip") as caught:
            run(responder, items, tmp_path / "out.jsonl")
        assert caught.value.reason == reason
        assert not (tmp_path / "out.jsonl").exists(), "what is not complete must not look as if it were"


def test_a_prompt_that_leaves_no_room(responder, recordings, tmp_path):
    items = [Utterance("a", recordings / "0.wav", ("say it " * 200,))]
    with pytest.raises(ValueError, match=r"the prompt 'say it .*' is \d+ tokens too long"):
        run(responder, items, tmp_path / "out.jsonl", on_bad_audio="skip")


def test_markup_in_names_and_answers_is_shown_as_it_is(tmp_path):
    from nemo_mtbi.commands.transcribe import Transcription

    line = {"audio_filepath": "a[red].wav", "prompt": "[/b]?", "pred_text": "[bold]x"}
    text = StringIO()
    Transcription(tmp_path / "o", 1, 1, first=[line]).render(Console(file=text, width=120))
    assert all(value in text.getvalue() for value in line.values())
