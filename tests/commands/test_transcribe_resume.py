# SPDX-License-Identifier: Apache-2.0
"""Transcriptions that were interrupted."""

import json
import os
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from nemo_mtbi.commands import transcribe as library
from nemo_mtbi.commands.transcribe import Questions, Transcription, Utterance, transcribe
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.locks import exclusive

RATE = 16000
PROMPTS = ("say it", "count the words")


@pytest.fixture(scope="module")
def responder(speech_llm, llm_dir):
    from nemo_mtbi.testing import tiny_chat

    return Responder(speech_llm, tiny_chat(llm_dir / "tokenizer.model"), GenerationConfig(6, 2000))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Six recordings, one of them silent, and a manifest's key that is not a number."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    found = []
    for index in range(6):
        samples = np.zeros(RATE) if index == 2 else rng.uniform(-0.3, 0.3, RATE // 2 + 3000 * index)
        soundfile.write(folder / f"{index}.wav", samples, RATE)
        extra = {"audio_filepath": f"{index}.wav", "score": float("nan")}
        found.append(Utterance(f"{index}.wav", folder / f"{index}.wav", PROMPTS, extra=extra))
    return found


def run(responder, items, output, **keys):
    return transcribe(responder, items, output, **{"batch_size": 1, "on_bad_audio": "skip", "progress": False, **keys})


@pytest.fixture(scope="module")
def whole(responder, items, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    run(responder, items, output)
    return output.read_bytes()


def interrupt(responder, items, output, monkeypatch, batches, error=KeyboardInterrupt):
    """A run that ends before its batch number ``batches``."""
    answer, left = library._answer, [batches]

    def count(*arguments, **keys):
        if not left[0]:
            raise error
        left[0] -= 1
        return answer(*arguments, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(library, "_answer", count)
        with pytest.raises(error):
            run(responder, items, output)


@pytest.mark.parametrize("batches", [1, 4])
def test_the_next_run_goes_on_behind_the_last_answer(responder, items, whole, tmp_path, monkeypatch, capsys, batches):
    output = tmp_path / "out.jsonl"
    interrupt(responder, items, output, monkeypatch, batches)
    partial, said = tmp_path / "out.jsonl.partial", capsys.readouterr().err
    kept = partial.read_bytes()
    assert not output.exists() and whole.startswith(kept)
    assert kept.count(b"\n") == {1: 2, 4: 6}[batches]  # two prompts, and the third recording is silent
    count = kept.count(b"\n")
    assert f"{count} answers are kept in {partial}: start the same command again" in said
    asked = []
    speech = Responder.speech
    monkeypatch.setattr(Responder, "speech", lambda *a, **k: asked.append(a[2]) or speech(*a, **k))
    result = run(responder, items, output)
    assert output.read_bytes() == whole and os.listdir(tmp_path) == ["out.jsonl"]
    assert sum(map(len, asked)) == 10 - count == result.answers - result.resumed
    assert (result.answers, result.audios, result.skipped) == (10, 5, {"silent": 1})
    assert [line["pred_text"] for line in result.first] == [
        json.loads(line)["pred_text"] for line in whole.splitlines()[:5]
    ]


def test_sigterm_ends_it_in_the_same_way(responder, items, whole, tmp_path, monkeypatch, capsys):
    answer, calls = library._answer, []

    def end(*arguments, **keys):
        calls.append(answer(*arguments, **keys))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(library, "_answer", end)
        run(responder, items, tmp_path / "out.jsonl")
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert "4 answers are kept in" in capsys.readouterr().err
    assert run(responder, items, tmp_path / "out.jsonl").resumed == 4
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("lines, rest", [(6, -1), (6, -20), (5, None), (4, None)])
def test_a_torn_line_and_an_utterance_without_all_its_answers_are_asked_again(
    responder, items, whole, tmp_path, monkeypatch, lines, rest
):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    interrupt(responder, items, output, monkeypatch, 4)
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:lines])[:rest])
    result = run(responder, items, output)
    assert output.read_bytes() == whole and result.resumed == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r, i: (r, [replace(x, prompts=("say it",)) for x in i]), "answer to another question in line 2"),
        (lambda r, i: (r, i[1:]), "answer to another question in line 1"),
        (lambda r, i: (r, [replace(x, extra={**x.extra, "score": 1}) for x in i]), "another question in line 1"),
        (lambda r, i: (r, i[:1]), "more answers than there are questions, from line 3"),
        (lambda r, i: (replace(r, config=GenerationConfig(5, 2000)), i), "another model or other settings"),
        (lambda r, i: (replace(r, adapted=False), i), "another model or other settings"),
    ],
)
def test_answers_of_another_run_are_not_gone_on_from(responder, items, tmp_path, monkeypatch, change, message):
    output = tmp_path / "out.jsonl"
    interrupt(responder, items, output, monkeypatch, 2)
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    other, asked = change(responder, items)
    with pytest.raises(ValueError, match=f"out.jsonl.partial, from which this run would go on, .*{message}.*remove"):
        run(other, asked, output)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept and not output.exists()


def test_a_line_without_an_answer_is_none(responder, items, tmp_path, monkeypatch):
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    interrupt(responder, items, output, monkeypatch, 2)
    partial.write_bytes(partial.read_bytes().replace(b"pred_text", b"pred_txet", 1))
    with pytest.raises(ValueError, match="another question in line 1"):
        run(responder, items, output)


def test_a_file_of_another_origin_is_not_gone_on_from(responder, items, whole, tmp_path):
    (tmp_path / "out.jsonl.partial").write_bytes(whole)
    with pytest.raises(ValueError, match="out.jsonl.partial, .*is there without out.jsonl.partial.json"):
        run(responder, items, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.partial").read_bytes() == whole


def test_a_model_is_told_by_its_connector_and_its_frozen_parts(responder, items, tmp_path, monkeypatch):
    from nemo_mtbi.commands.transcribe import _identity

    mine = _identity(responder, "")
    assert mine == _identity(replace(responder, config=replace(responder.config, batch_tokens=7)), "")
    assert mine != _identity(responder, "another LLM")
    weight = next(iter(responder.model.connector.parameters()))
    before = weight.data.clone()
    weight.data.view(-1)[0] += 1e-9
    assert mine != _identity(responder, "")
    weight.data.copy_(before)
    assert mine == _identity(responder, "")


def test_batches_may_change_and_audio_that_was_left_out_stays_so(responder, items, whole, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    interrupt(responder, items, output, monkeypatch, 4)
    with pytest.raises(ValueError, match="2.wav: the interrupted run has left it out .silent"):
        run(responder, items, output, on_bad_audio="raise")
    assert run(responder, items, output, batch_size=4).resumed == 6
    assert output.read_bytes() == whole


def test_a_run_that_fails_before_its_first_answer_leaves_nothing(responder, items, tmp_path):
    with pytest.raises(ValueError, match="silent"):
        run(responder, items[2:], tmp_path / "out.jsonl", on_bad_audio="raise")
    assert os.listdir(tmp_path) == []


def test_a_second_run_on_one_output_is_refused(responder, items, tmp_path):
    output = tmp_path / "out.jsonl"
    with (
        exclusive(output),
        pytest.raises(RuntimeError, match="output_filename=.*out.jsonl is being written by another"),
    ):
        run(responder, items, output)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------ what is written


def test_names_and_notes_that_are_not_unicode_are_kept_in_escapes(responder, items, tmp_path, capsys):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.wav")
    os.link(items[0].path, name)
    asked = [replace(items[0], name=name, path=Path(name)), replace(items[1], extra={"note": "\ud83d"})]
    result = run(responder, asked, tmp_path / "out.jsonl")
    first, _, second, _ = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert first["audio_filepath"] == name and second["note"] == "\ud83d"
    assert first["pred_text"] == run(responder, items[:1], tmp_path / "o.jsonl").first[0]["pred_text"]
    text = StringIO()
    result.render(Console(file=text, width=300))
    assert "caf\\udce9.wav" in text.getvalue()


def test_bad_lines_of_a_manifest_are_counted(responder, items, tmp_path):
    asked = [
        items[0],
        replace(items[1], problem="line 2 of m.json: offset must be seconds, not nan"),
        Utterance("x", Path("a" * 5000), ("",)),
        Utterance("y", Path("a\0b"), ("",)),
    ]
    result = run(responder, asked, tmp_path / "out.jsonl")
    assert result.skipped == {"bad_line": 1, "unreadable": 2} and result.answers == 2


def shown(**keys):
    text = StringIO()
    Transcription(Path("out"), 2, 2, **keys).render(Console(file=text, width=200, force_terminal=True))
    return text.getvalue()


def test_answers_and_names_send_the_terminal_no_command():
    escape = "\x1b]0;title\x07\x1b[2J"
    text = shown(first=[{key: f"{key}{escape}" for key in ("audio_filepath", "prompt", "pred_text")}])
    assert "\x1b]0;" not in text and "\x1b[2J" not in text and "\\x1b]0;title\\x07" in text


def test_word_errors_are_shown_where_the_manifest_has_transcripts():
    result = Transcription(Path("out"))
    lines = [
        ("say it", "a b c d", "a b x d"),
        ("say it", "e", "e"),
        ("", "a b", "a"),
        ("say it", " ", "z"),
        ("", 5, "y"),
    ]
    result.add(({"audio_filepath": "a", "prompt": p, "text": t, "pred_text": a} for p, t, a in lines), show=0)
    text = StringIO()
    result.render(Console(file=text, width=200))
    assert "WER against `text`: 20.00% (2 lines, prompt 'say it')" in text.getvalue()
    assert "WER against `text`: 50.00% (1 lines, the empty prompt)" in text.getvalue()
    assert "WER" not in shown()


def test_what_a_folder_holds_beside_is_reported(responder, items, tmp_path):
    result = run(responder, Questions(items[:1], {".txt": 2, "hidden": 1}), tmp_path / "out.jsonl")
    text = StringIO()
    result.render(Console(file=text, width=200))
    assert "not asked about: 3 other files of the folder (2 .txt, 1 hidden)" in text.getvalue()
