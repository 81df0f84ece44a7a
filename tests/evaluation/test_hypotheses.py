# SPDX-License-Identifier: Apache-2.0
"""Transcripts made elsewhere: each utterance has its own, or the evaluation does not begin."""

import json

import pytest

from nemo_mtbi.evaluation.hypotheses import read_hypotheses
from nemo_mtbi.evaluation.items import from_cuts
from nemo_mtbi.targets.tasks import TaskPool
from nemo_mtbi.testing import tiny_cuts

POOL = TaskPool.from_dict(
    {"tasks": [{"name": "say", "scoring": "wer", "split": "train", "prompts": {"train": ["say it"]}}]}
)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return from_cuts("test", tiny_cuts(tmp_path_factory.mktemp("cuts"), 8, behaviors=False), POOL)


def path_of(clip):
    return clip.audio.recording.sources[0].source


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_texts_are_found_by_id_and_by_audio(chosen, tmp_path):
    lines = [{"id": clip.id, "text": f"by id {n}"} for n, clip in enumerate(chosen.clips[:3])]
    lines += [
        {"audio_filepath": path_of(clip), "pred_text": f"by file {n}", "text": "the reference"}
        for n, clip in enumerate(chosen.clips[3:], 3)
    ]
    found = read_hypotheses(write(tmp_path / "h.jsonl", [*lines, {"id": "of another set", "text": ""}]), "key")
    found.check([chosen])
    wanted = [f"by id {n}" for n in range(3)] + [f"by file {n}" for n in range(3, 8)]
    assert [found.text(clip) for clip in chosen.clips] == wanted


def test_paths_may_be_relative_to_the_file(chosen, tmp_path):
    (tmp_path / "a").symlink_to(path_of(chosen.clips[0]))
    found = read_hypotheses(write(tmp_path / "h.jsonl", [{"audio_filepath": "a", "text": "yes"}]), "key")
    assert found.text(chosen.clips[0]) == "yes" and found.text(chosen.clips[1]) is None


def test_missing_utterances_are_named(chosen, tmp_path):
    found = read_hypotheses(write(tmp_path / "h.jsonl", [{"id": chosen.clips[0].id, "text": "x"}]), "key")
    with pytest.raises(ValueError, match="lacks 7 of the 8 utterances of set 'test': .* and 2 more") as error:
        found.check([chosen])
    assert chosen.clips[1].id in str(error.value) and chosen.clips[0].id not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a"}], "line 1 .* must have id or audio_filepath"),
        ([{"text": "a"}], "line 1 .* must have id or audio_filepath"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": 5}], "line 2 .* must have"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "line 2 .* gives a another text than line 1"),
    ],
)
def test_lines_that_say_nothing_or_two_things_are_refused(lines, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_hypotheses(write(tmp_path / "h.jsonl", lines), "key")


def test_one_recording_of_several_utterances_needs_ids(chosen, tmp_path):
    from dataclasses import replace

    parts = [replace(chosen.clips[0], id="a"), replace(chosen.clips[0], id="b")]
    several = replace(chosen, clips=[*parts, *chosen.clips[2:]])
    lines = [{"audio_filepath": path_of(clip), "text": "x"} for clip in chosen.clips]
    with pytest.raises(
        ValueError, match="several utterances of set 'test' are parts of it, such as a: give their ids"
    ):
        read_hypotheses(write(tmp_path / "h.jsonl", lines), "key").check([several])
    named = [{"id": clip.id, "text": clip.id} for clip in several.clips]
    read_hypotheses(write(tmp_path / "n.jsonl", named), "key").check([several])


def test_an_id_of_two_utterances_is_refused(chosen, tmp_path):
    from dataclasses import replace

    other = replace(chosen, name="other", clips=[replace(clip, transcript="another") for clip in chosen.clips])
    found = read_hypotheses(write(tmp_path / "h", [{"id": c.id, "text": "x"} for c in chosen.clips]), "key")
    found.check([chosen, replace(chosen, name="same")])
    with pytest.raises(ValueError, match="another utterance in set 'other' than in 'test'"):
        found.check([chosen, other])
