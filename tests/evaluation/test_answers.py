# SPDX-License-Identifier: Apache-2.0
"""Answers on disk: what was written comes back, and nothing else does."""

import json
from dataclasses import replace

import pytest

from nemo_mtbi.evaluation.answers import Unit, load_answers, save_answers, unit_path
from nemo_mtbi.evaluation.items import Reply

UNIT = Unit("mtbi", 1, "test", "seen", "say it/../..", "abc", 3)
REPLIES = [Reply("two\nlines\u2028", 4, False), Reply("", 0, False, "silent"), Reply("ä\x00", 8, True)]


@pytest.fixture
def saved(tmp_path):
    save_answers(tmp_path, UNIT, REPLIES)
    return tmp_path


def test_answers_come_back(saved):
    assert load_answers(saved, UNIT) == REPLIES
    assert load_answers(saved, replace(UNIT, seed=0)) is None
    assert saved in unit_path(saved, UNIT).parents and len(list(saved.rglob("*"))) == 3  # no way out of the folder


def test_names_that_differ_stay_apart():
    paths = {unit_path("x", replace(UNIT, task=task)) for task in ("a b", "a_b", "a/b", "A b", "ä", "ö", "x" * 99)}
    assert len(paths) == 7


def test_answers_to_other_questions_are_not_taken(saved):
    other = replace(UNIT, fingerprint="else")
    with pytest.raises(ValueError, match="another model, or to other questions: .* overwrite=true"):
        load_answers(saved, other)
    assert load_answers(saved, other, overwrite=True) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[: len(text) // 2], "malformed|2 answers to 3|1 answers to 3|0 answers to 3"),
        (lambda text: "", "has no header"),
        (lambda text: text.replace('"silent"', "7"), "line 3 of .*: unheard is 7"),
        (lambda text: text.replace('"tokens"', '"token"'), "must hold answer, tokens, truncated, unheard"),
        (lambda text: text + text.split("\n")[1] + "\n", "4 answers to 3 questions"),
        (lambda text: text.replace('"answer": ""', '"answer": null'), "answer is None"),
    ],
)
def test_malformed_predictions_are_refused(saved, change, message):
    path = unit_path(saved, UNIT)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        load_answers(saved, UNIT)
    assert "delete it" in str(caught.value)


def test_an_answer_that_has_changed_is_refused(saved):
    path = unit_path(saved, UNIT)
    content = path.read_bytes()
    for position in range(0, len(content), 2):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            found = load_answers(saved, UNIT)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert found == REPLIES


def test_answers_of_before_have_no_digest_and_are_read(saved):
    path = unit_path(saved, UNIT)
    header, _, rest = path.read_text(encoding="utf-8").partition("\n")
    header = {key: value for key, value in json.loads(header).items() if key != "sha256"}
    path.write_text(json.dumps(header) + "\n" + rest, encoding="utf-8")
    assert load_answers(saved, UNIT) == REPLIES


def test_half_a_character_is_written_as_a_mark(tmp_path):
    save_answers(tmp_path, replace(UNIT, size=1), [Reply("a\ud800", 1, False)])
    assert load_answers(tmp_path, replace(UNIT, size=1)) == [Reply("a?", 1, False)]
