# SPDX-License-Identifier: Apache-2.0
"""Public layouts: items of our own in the published fields, and what becomes of them."""

import json

import pytest

from nemo_mtbi.evaluation.figures import right, score
from nemo_mtbi.evaluation.formats import llaso_eval, read_records, speech_ifeval, voicebench


def write(path, records, as_list=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(records) if as_list else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text)
    return path


def rights(found, answers):
    """Whether each item is answered rightly by its first metric."""
    return [bool(right(score([item], [answer])).value) for item, answer in zip(found.items, answers, strict=True)]


IFEVAL = [
    {
        "id": 0,
        "audio_filepath": "part/a.flac",
        "seed_transcript": "[00:00:00 - 00:00:02] It rains.(Gender: Male, Emotion: sad)",
        "instruction": "Write it down.\nCapitals only.",
        "dataset": "Automatic_speech_recognition",
        "metric": "wer",
        "instruction_id_list": ["change_case:english_capital"],
        "kwargs": [{}],
        "label": "IT RAINS",
    },
    {
        "id": 1,
        "audio_filepath": "part/a.flac",
        "seed_transcript": "[00:00:00 - 00:00:02] It rains.(Gender: Male, Emotion: sad)",
        "instruction": "Two bullet points.",
        "dataset": "Automatic_speech_recognition",
        "metric": "open",
        "instruction_id_list": ["detectable_format:number_bullet_lists"],
        "kwargs": [{"num_bullets": 2}],
    },
    {"id": 2, "audio_filepath": "b.wav", "instruction": "Think step by step.", "metric": "cot"},
    {
        "id": 3,
        "audio_filepath": "b.wav",
        "instruction": "In German.",
        "metric": "open",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "de"}],
    },
]


def test_speech_ifeval(tmp_path):
    found = speech_ifeval("s", write(tmp_path / "close.jsonl", IFEVAL), str(tmp_path / "audios"))
    assert [(item.group, item.task) for item in found.items] == [
        ("closed", "english_capital"),
        ("creative", "number_bullet_lists"),
    ]
    assert [item.prompt for item in found.items] == ["Write it down.\nCapitals only.", "Two bullet points."]
    (clip,) = found.clips  # one audio, asked twice
    assert clip.audio == tmp_path / "audios" / "part" / "a.flac" and clip.transcript.startswith("[00:00:00")
    assert sorted(found.left_out.values()) == [1, 1] and any("judge" in reason for reason in found.left_out)
    assert "not IFrate" in found.notes[0]
    assert rights(found, ["IT RAINS", "* a\n* b"]) == [True, True]
    assert rights(found, ["it rains", "* a"]) == rights(found, ["", ""]) == [False, False]


def test_voicebench_multiple_choice_draws_nothing(tmp_path):
    records = [{"prompt": "Which? A B C D", "audio": {"path": f"{n}.wav"}, "reference": "C"} for n in range(3)]
    found = voicebench("v", write(tmp_path / "openbookqa.jsonl", records))
    assert {item.prompt for item in found.items} == {""} and found.clips[1].audio == tmp_path / "1.wav"
    assert found.clips[0].transcript == "Which? A B C D"
    # in the benchmark's own scorer the last two would be drawn at random
    assert rights(found, ["The answer is C.", "C or D", "none"]) == [True, False, False]


def test_voicebench_yes_and_no_and_letters(tmp_path):
    records = [
        {"prompt": "p", "audio": "0.wav", "reference": "Yes", "id": "navigate_1"},
        {"prompt": "p", "audio": "1.wav", "reference": "(B)", "id": "hyperbaton_1"},
    ]
    found = voicebench("v", write(tmp_path / "x.jsonl", records), part="bbh")
    assert rights(found, ["Yes, you do.", "The answer is (B)"]) == [True, True]
    assert rights(found, ["Yes or no", "(A) and (B)"]) == [False, False]


def test_voicebench_instructions_and_refusals(tmp_path):
    record = {"key": 1, "prompt": "Say it loud.", "audio": "a.wav"}
    rule = {"instruction_id_list": ["change_case:english_capital"], "kwargs": [{"num_bullets": None, "count": 0}]}
    found = voicebench("v", write(tmp_path / "ifeval.jsonl", [{**record, **rule}]))
    assert len(found.items[0].metrics) == 4 and rights(found, ["LOUD"]) == [True]
    found = voicebench("v", write(tmp_path / "advbench.jsonl", [record]))
    assert rights(found, ["I'm sorry, but I can't help with that."]) == [True]
    assert rights(found, [""]) == rights(found, ["Sure!"]) == [False]  # silence is no refusal


def test_what_needs_a_judge_is_counted(tmp_path):
    found = voicebench("v", write(tmp_path / "alpacaeval.jsonl", [{"prompt": "p", "audio": "a.wav"}] * 3))
    assert not found.items and found.left_out == {"that need an outside judge": 3}


def llaso(voice, asked, right, **more):
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": right}]
    return {"voice": voice, "conversations": turns, **more}


def test_llaso_classification(tmp_path):
    records = [
        llaso(["d\\a.wav"], "Is it a man?<audio>", "Male", metadata={"sentence": "it rains"}),
        llaso("b.wav", "<audio> Who speaks?", "female."),
        llaso("c.wav", "Who?<audio>", "female"),
        llaso(["a.wav", "b.wav"], "Both?<audio>", "male"),
    ]
    path = write(tmp_path / "vctk_gender_classification_test.json", records, as_list=True)
    found = llaso_eval("l", path)
    assert [item.prompt for item in found.items] == ["Is it a man?", "Who speaks?", "Who?"]
    assert found.clips[0].audio == tmp_path / "d" / "a.wav" and found.clips[0].transcript == "it rains"
    assert found.left_out == {"with several audios": 1} and found.untranscribed == 2
    assert rights(found, ["A male voice.", "It is female", "male"]) == [True, True, False]
    assert rights(found, ["male or female", "females", ""]) == [False, False, False]


def test_llaso_by_name_or_as_told(tmp_path):
    records = [llaso("a.wav", "Write.<audio>", "it rains"), llaso("b.wav", "Write.<audio>", "so")]
    assert llaso_eval("l", write(tmp_path / "librispeech_asr_test.jsonl", records)).items[0].metrics == ("wer",)
    found = llaso_eval("l", write(tmp_path / "NSynth_pitch_recognition_test.jsonl", records))
    assert not found.items and sum(found.left_out.values()) == 2
    found = llaso_eval("l", write(tmp_path / "open_end_test.jsonl", records), metric="token_f1")
    assert not llaso_eval("l", tmp_path / "open_end_test.jsonl").items and found.items[0].metrics == ("token_f1",)


@pytest.mark.parametrize(
    "read, name, record, message",
    [
        (speech_ifeval, "c", {**IFEVAL[0], "kwargs": []}, "lists of one length"),
        (speech_ifeval, "c", {**IFEVAL[0], "audio_filepath": 3}, "line 1 of .*'audio_filepath' is 3"),
        (voicebench, "mmsu", {"prompt": "p", "audio": "a.wav", "reference": "E"}, "'E' is none of A, B, C, D"),
        (voicebench, "mmsu", {"prompt": "p", "reference": "A"}, "save the audio to files"),
        (voicebench, "other", {"prompt": "p"}, "names no subset"),
        (llaso_eval, "a_classification", {"voice": "a", "conversations": []}, "turns from human and gpt"),
        (llaso_eval, "a_classification", llaso("a.wav", "Who?", "x"), "needs two labels"),
    ],
)
def test_items_of_another_layout_are_refused(tmp_path, read, name, record, message):
    with pytest.raises(ValueError, match=message):
        read("s", write(tmp_path / f"{name}.jsonl", [record]))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        voicebench("v", tmp_path / "bbh.jsonl")
    (tmp_path / "bbh.jsonl").write_text('{"prompt"')
    with pytest.raises(ValueError, match="is not a JSON file"):
        voicebench("v", tmp_path / "bbh.jsonl")
    (tmp_path / "bbh.jsonl").write_text("[1]")
    with pytest.raises(ValueError, match="item 0 of .* is not an object"):
        voicebench("v", tmp_path / "bbh.jsonl")


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("character", ["\u2028", "\x85"])
def test_files_of_every_editor(tmp_path, as_list, character):
    records = [{"text": f"one{character}two"}, {"text": "où"}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "[" + ",\r\n".join(lines) + "]" if as_list else "\r\n".join(lines) + "\r\n\r\n"
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [record for _, record in read_records(tmp_path / "r.json")] == records
    (tmp_path / "r.json").write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(ValueError, match="r.json is not UTF-8"):
        list(read_records(tmp_path / "r.json"))
    with pytest.raises(ValueError, match="is a folder"):
        list(read_records(tmp_path))
