# SPDX-License-Identifier: Apache-2.0
"""Behavior measures by hand, and what holds for any answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.metrics.behavior import (
    agreement,
    anchor_bias,
    behavior_gap,
    forgetting_rate,
    mean_kl,
    prompt_spread,
    prompt_worst,
    text_f1,
    uncrossed_tasks,
)
from nemo_mtbi.metrics.corpus import evaluate
from nemo_mtbi.metrics.tally import mean_tally

TEXTS = st.lists(st.sampled_from(["cat", "dog", "sat", "ran"]), max_size=4).map(" ".join)
SHARES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8)


def share(values, name="exact", **options):
    return mean_tally(name, values, **options)


def test_agreement_and_f1_by_hand():
    text, speech = ["a b", "a b c", "x", ""], [" a  b", "a b", "", ""]
    assert agreement(text, speech).value == 2 / 4  # two silences agree: that is what the LLM does with the text too
    assert text_f1(text, speech).items == pytest.approx([1.0, 0.8, 0.0, 1.0])
    assert agreement(text, speech).abstentions == 2
    with pytest.raises(ValueError, match="agreement: 2 and 1 items"):
        agreement(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="token_f1 of no items"):
        text_f1([], [])


def test_kl_is_a_mean_over_tokens():
    tally = mean_kl([0.5, 0.1], [1, 9])
    assert tally.value == pytest.approx((0.5 + 0.9) / 10)
    assert tally.items == pytest.approx([0.5, 0.1]) and not tally.higher_is_better
    with pytest.raises(ValueError, match="KL divergence of -0.1 is below 0"):
        mean_kl([-0.1], [3])
    with pytest.raises(ValueError, match="without teacher tokens"):
        mean_kl([0.1], [0])
    with pytest.raises(ValueError, match="NaN or infinite"):
        mean_kl([math.inf], [3])
    with pytest.raises(ValueError, match="1 values but 2 weights"):
        mean_kl([0.1], [3, 3])


def test_gap_and_forgetting_by_hand():
    text, speech = share([1, 1, 0, 1]), share([1, 0, 0, 1])
    assert behavior_gap(text, speech).value == pytest.approx(2 / 3)
    assert forgetting_rate(text, speech).value == pytest.approx(-1 / 3)


@pytest.mark.parametrize("speech", [[0.0, 0.0], [1.0, 0.0]])
def test_no_gap_to_a_text_score_of_0(speech):
    assert behavior_gap(share([0, 0]), share(speech)).value is None
    assert forgetting_rate(share([0, 0]), share(speech)).value is None


@given(SHARES)
def test_speech_that_does_as_text_has_no_gap(values):
    gap = behavior_gap(share(values), share(values)).value
    assert gap == (1.0 if sum(values) else None)


def test_gap_works_for_corpus_metrics():
    references = ["the cat sat on the mat", "a dog ran home today"]
    text, speech = evaluate("bleu", references, references), evaluate("bleu", references, ["the cat sat", "a dog ran"])
    assert behavior_gap(text, speech).value == pytest.approx(speech.value / 100)


def test_gaps_that_mean_nothing_are_errors():
    with pytest.raises(ValueError, match="compares one metric on text and on speech, got exact and f1"):
        behavior_gap(share([1]), share([1], "f1"))
    with pytest.raises(ValueError, match="1 items on text but 2 on speech"):
        behavior_gap(share([1]), share([1, 1]))
    with pytest.raises(ValueError, match="less is better"):
        behavior_gap(*[evaluate("wer", ["a"], ["a"])] * 2)


def test_prompt_sensitivity_by_hand():
    #        task a: wordings 1.0, 0.5, 0.0; task b: wordings 1.0, 0.5; task c: one wording, 0.25
    scores = [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0.25]
    tasks = list("aaaaaabbbbc")
    wordings = [1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 1]
    assert prompt_worst(share(scores), tasks, wordings).value == pytest.approx((0 + 0.5 + 0.25) / 3)
    expected = (np.std([1, 0.5, 0], ddof=1) + np.std([1, 0.5], ddof=1)) / 2
    assert prompt_spread(share(scores), tasks, wordings).value == pytest.approx(expected)
    assert not prompt_spread(share(scores), tasks, wordings).higher_is_better
    assert prompt_spread(share([1, 0]), ["a", "b"], ["x", "x"]).value is None


def test_the_worst_of_error_rates_is_the_highest():
    wrong = evaluate("wer", ["a b", "a b"], ["a b", "x y"])
    assert prompt_worst(wrong, ["t", "t"], ["good", "bad"]).value == 1.0


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1)
)
def test_prompt_sensitivity_bounds_and_order(rows):
    tasks, wordings, scores = zip(*rows, strict=True)
    worst, spread = (f(share(scores), tasks, wordings).value for f in (prompt_worst, prompt_spread))
    by_task = [[s for t, _, s in rows if t == task] for task in set(tasks)]
    assert worst <= np.mean([np.mean(values) for values in by_task]) + 1e-12
    assert spread is None or 0.0 <= spread <= 0.5**0.5 + 1e-12
    back = [values[::-1] for values in (scores, tasks, wordings)]
    assert prompt_worst(share(back[0]), *back[1:]).value == worst
    assert prompt_spread(share(back[0]), *back[1:]).value == spread


def test_a_wording_that_a_resample_left_out_is_not_its_worst():
    tally = prompt_worst(share([1, 1]), ["t", "t"], ["x", "y"])
    assert tally.combine(2 * tally.rows[0]) == 1.0
    # BLEU of nothing is 0, not undefined.
    right = evaluate("bleu", ["the cat sat down"] * 2, ["the cat sat down"] * 2)
    tally = prompt_worst(right, ["t", "t"], ["x", "y"])
    assert tally.combine(2 * tally.rows[0]) == pytest.approx(100.0)


def test_wordings_asked_about_other_utterances_are_found():
    assert uncrossed_tasks("aabb", "xyxy", ["u1", "u1", "u1", "u2"]) == ["b"]


PROMPTED, BARE = "five words", "the cat sat on the mat"


@pytest.mark.parametrize(
    ("speech", "obeys"),
    [
        (BARE, 1),
        ("the cat sat on it", 1),  # near enough
        ("the cat", 1),  # F1 is 2 * 2 / (2 + 6), just enough
        ("the", 0),  # 2 * 1 / (1 + 6)
        (PROMPTED, 0),
        ("nonsense", 0),
    ],
)
def test_anchor_bias_by_hand(speech, obeys):
    assert anchor_bias([PROMPTED], [BARE], [speech]).value == obeys


def test_an_answer_to_both_obeys_neither():
    assert anchor_bias(["a b"], ["c d"], ["a b c d"]).value == 0.0


def test_anchor_bias_leaves_out_what_cannot_tell():
    tally = anchor_bias([PROMPTED] * 3 + ["a cat"], [BARE] * 3 + ["a dog cat"], [BARE, PROMPTED, " ", "a dog cat"])
    assert (tally.value, tally.left_out, tally.abstentions) == (1 / 2, 2, 1)
    assert anchor_bias(["a"], ["a"], ["a"]).value is None
    with pytest.raises(ValueError, match="threshold must be above 0"):
        anchor_bias(["a"], ["b"], ["a"], threshold=0.0)
    with pytest.raises(ValueError, match="1 and 2 items"):
        anchor_bias(["a"], ["b"], ["a", "b"])


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=6))
def test_anchor_bias_of_any_answers(rows):
    prompted, bare, speech = (list(texts) for texts in zip(*rows, strict=True))
    assert anchor_bias(prompted, bare, prompted).value in (None, 0.0)
    before = anchor_bias(prompted, bare, speech).value
    after = anchor_bias([*prompted, "cat"], [*bare, "dog"], [*speech, ""])
    assert after.value == before  # silence is left out, so it dilutes nothing
