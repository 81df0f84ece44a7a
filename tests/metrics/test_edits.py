# SPDX-License-Identifier: Apache-2.0
"""Word and character error rate by hand, by the definition of the distance, and against jiwer."""

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.metrics.edits import cer, edit_rows, wer

WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)
SPOKEN = WORDS.filter(bool)


def edit_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance by its definition, independent of jiwer."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        new = [i]
        for j, y in enumerate(b, start=1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


@pytest.mark.parametrize(
    ("references_", "hypotheses", "expected"),
    [
        (["a b c d"], ["a x c"], 2 / 4),  # one substitution, one deletion
        (["a b", "c d e f"], ["a", "c d e f g"], 2 / 6),  # over the corpus, not the mean of 1/2 and 1/4
        (["A, b."], ["a b"], 0.0),
        (["a"], ["x y z"], 3.0),  # above 1
        (["a b"], [""], 1.0),
        (["", "a b"], ["x", "a b"], 1 / 2),  # insertion into an empty reference
        ([""], [""], 0.0),
        ([""], ["x y"], 2.0),
        (["?!"], ["..."], 0.0),
    ],
)
def test_wer_by_hand(references_, hypotheses, expected):
    assert wer(references_, hypotheses) == pytest.approx(expected)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_wer_equals_edit_distance(pairs):
    edits = sum(edit_distance(r.split(), h.split()) for r, h in pairs)
    words = sum(len(r.split()) for r, _ in pairs)
    assert wer([r for r, _ in pairs], [h for _, h in pairs]) == pytest.approx(edits / max(1, words))


def test_wer_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        wer(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        wer([], [])


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("abcd", "abxd", 1 / 4),
        ("ab cd", "abcd", 1 / 5),  # the space between two words is a character
        ("Ab, cd!", "ab  cd", 0.0),
        ("ab", "", 1.0),
        ("", "ab", 2.0),
    ],
)
def test_cer_by_hand(reference, hypothesis, expected):
    assert cer([reference], [hypothesis]) == pytest.approx(expected)


def test_edits_of_each_utterance_and_kind():
    rows = edit_rows(["a b c d", "a b", "", "a"], ["a x c", "a b c d", "x y", "a"])
    #       substituted, deleted, inserted, reference words
    assert rows.tolist() == [[1, 1, 0, 4], [0, 0, 2, 2], [0, 0, 2, 0], [0, 0, 0, 1]]


@given(st.lists(st.tuples(SPOKEN, WORDS), min_size=1, max_size=5))
def test_parity_with_jiwer(pairs):
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    assert wer(references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses))
    assert cer(references, hypotheses) == pytest.approx(jiwer.cer(references, hypotheses))
    rows = edit_rows(references, hypotheses)
    whole = jiwer.process_words(references, hypotheses)
    assert rows.sum(axis=0)[:3].tolist() == [whole.substitutions, whole.deletions, whole.insertions]
    each = [jiwer.wer(r, h) for r, h in pairs]
    np.testing.assert_allclose(rows[:, :3].sum(axis=1) / rows[:, 3], each)


def test_normalization_decides_what_is_an_error():
    assert wer(["I can't"], ["i cannot"]) == 1 / 2
    assert wer(["twenty one"], ["21"], "whisper_english") == 0.0
    assert wer(["A b"], ["a b"], "none") == 1 / 2


def test_unknown_units_are_refused():
    with pytest.raises(ValueError, match="unknown unit 'token'"):
        edit_rows(["a"], ["a"], unit="token")
