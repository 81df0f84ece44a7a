# SPDX-License-Identifier: Apache-2.0
"""BLEU and chrF by hand and against sacrebleu, on sums that no corpus made too."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from nemo_mtbi.metrics.overlap import bleu, bleu_rows, chrf, chrf_rows

TEXTS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat.", "a", "Dog,", "it's"]), max_size=9).map(" ".join)
ITEMS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=6)


def test_bleu_by_hand():
    rows = bleu_rows([["the cat sat on the mat"]], ["the cat sat on a mat"])
    assert rows.tolist() == [[6, 6, 5, 3, 2, 1, 6, 5, 4, 3]]
    assert bleu(rows[0]) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # Shorter by two words: brevity penalty; no match of order 4: exponential smoothing makes it 1/2 of one.
    short = bleu_rows([["a b c x d e"]], ["a b c d"])
    assert short.tolist() == [[4, 6, 4, 2, 1, 0, 4, 3, 2, 1]]
    assert bleu(short[0]) == pytest.approx(100 * math.exp(1 - 6 / 4) * (1 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_chrf_by_hand():
    rows = chrf_rows([["ab c"]], ["abd"])  # spaces are left out: abc against abd
    assert rows[0].reshape(6, 3).tolist()[:4] == [[3, 3, 2], [2, 2, 1], [1, 1, 0], [0, 0, 0]]
    mean = (2 / 3 + 1 / 2 + 0) / 3  # precision and recall are equal, so F is too
    assert chrf(rows[0]) == pytest.approx(100 * mean)


@settings(deadline=None)
@given(ITEMS)
def test_parity_with_sacrebleu(items):
    answers, first, second = (list(texts) for texts in zip(*items, strict=True))
    for references in ([first], [first, second]):
        each = [list(texts) for texts in zip(*references, strict=True)]
        assert bleu(bleu_rows(each, answers).sum(0)) == pytest.approx(BLEU().corpus_score(answers, references).score)
        assert chrf(chrf_rows(each, answers).sum(0)) == pytest.approx(CHRF().corpus_score(answers, references).score)
        for text, answer, row in zip(each, answers, chrf_rows(each, answers), strict=True):
            assert chrf(row) == pytest.approx(CHRF().sentence_score(answer, text).score)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=4), st.integers(0, 30))
def test_bleu_of_any_counts(orders, reference):
    matched, found = [min(pair) for pair in orders], [max(pair) for pair in orders]
    expected = BLEU.compute_bleu(matched[:], found[:], found[0], reference, smooth_method="exp").score
    if all(found):  # sacrebleu stops at the first order without n-grams: no corpus has some of a higher order
        assert bleu(np.array([found[0], reference, *matched, *found], float)) == pytest.approx(expected)


def test_many_sums_at_once():
    rows = bleu_rows([["the cat sat on the mat"], ["a dog ran home today"]], ["the cat sat on a mat", ""])
    sums = np.stack([rows[0], rows[1], rows.sum(0)])
    assert bleu(sums).tolist() == [float(bleu(s)) for s in sums] and bleu(sums)[1] == 0.0
    assert chrf(np.zeros((2, 3, 18))).tolist() == [[0.0] * 3] * 2
