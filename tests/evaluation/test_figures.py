# SPDX-License-Identifier: Apache-2.0
"""Figures of made-up answers, computed by hand."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.evaluation.figures import Resampling, SystemAnswers, comparisons, describe, right, score
from nemo_mtbi.evaluation.items import Clip, EvalSet, Item, Reply, check_references, metrics_of
from nemo_mtbi.metrics.scorers import score as score_of
from nemo_mtbi.targets.tasks import Task

FEW = Resampling(200, 0)
CLIPS = [Clip(f"u{index}", Path(f"{index}.wav"), "a b") for index in range(4)]


def items(reference="yes", prompts=("p", "q")):
    return [Item(clip, "t", "seen", prompt, ("exact",), reference) for clip in range(4) for prompt in prompts]


def asked(questions, *seeds):
    return SystemAnswers(questions, [[Reply(answer, 2, False) for answer in answers] for answers in seeds])


QUESTIONS = items()
CHOSEN = EvalSet("s", CLIPS, QUESTIONS)
TEXT = asked(QUESTIONS, ["yes"] * 8)
# clip by clip under p and q: under p all are right, under q two of four
SPEECH = asked(QUESTIONS, ["yes", "yes", "yes", "yes", "yes", "no", "yes", ""])


def test_figures_of_a_group_by_hand():
    found = describe(CHOSEN, SPEECH, TEXT, None, FEW)
    assert found["right"]["value"] == found["agreement"]["value"] == found["behavior_gap"]["value"] == 0.75
    assert found["forgetting_rate"]["value"] == -0.25
    assert found["right"]["low"] <= 0.75 <= found["right"]["high"] and not found["right"]["flat"]
    assert found["prompt_worst"]["value"] == 0.5
    assert found["prompt_spread"]["value"] == pytest.approx(0.5 / 2**0.5)
    assert found["wordings"] == [
        {"task": "t", "prompt": "p", "right": 1.0},
        {"task": "t", "prompt": "q", "right": 0.5},
    ]
    assert (found["n"], found["n_scored"], found["utterances"], found["abstained"], found["empty"]) == (8, 8, 4, 1, 1)
    assert found["tasks"]["t"]["metrics"]["exact"]["value"] == 0.75 and "anchor_bias" not in found
    assert describe(CHOSEN, TEXT, None, None, FEW)["right"]["flat"]


def test_anchor_bias_needs_the_bare_transcript():
    bare = ["no"] * 8  # what the speech alone asks for
    found = describe(CHOSEN, SPEECH, TEXT, bare, FEW)["anchor_bias"]
    assert found["value"] == pytest.approx(1 / 7) and found["left_out"] == 1  # the empty answer tells nothing


def test_several_seeds_are_pooled_and_spread():
    two = asked(QUESTIONS, ["yes"] * 8, ["no"] * 8)
    found = describe(CHOSEN, two, TEXT, None, FEW)["right"]
    assert found["value"] == 0.5 and found["seeds"]["values"] == [1.0, 0.0] and found["n"] == 16
    assert found["flat"]  # every utterance is half right: an interval over utterances alone would look certain
    assert found["seeds"]["low"] < 0 < 1 < found["seeds"]["high"]


def test_systems_of_different_numbers_of_seeds_are_compared():
    two = asked(QUESTIONS, ["yes"] * 8, ["yes", "no"] * 4)
    (row,) = comparisons(CHOSEN, {"a": two, "text": TEXT}, [("a", "text")], {}, FEW)
    assert (row["measure"], row["system"], row["against"], row["group"]) == ("right", "a", "text", "seen")
    assert row["difference"] == -0.25 and row["exact"] and row["p"] == row["p_holm"] == 2 / 16
    assert comparisons(CHOSEN, {"text": TEXT}, [("text", "a")], {}, FEW) == []


def test_agreement_with_the_text_is_compared_too():
    """The text itself is wrong under q, and so is one system: it agrees, and is less right."""
    text = asked(QUESTIONS, ["yes", "no"] * 4)
    systems = {"same": asked(QUESTIONS, ["yes", "no"] * 4), "right": asked(QUESTIONS, ["yes"] * 8), "text": text}
    texts = {"same": "text", "right": "text", "text": None}
    rows = comparisons(CHOSEN, systems, [("same", "right"), ("text", "right")], texts, FEW)
    found = {(row["measure"], row["system"]): row["difference"] for row in rows}
    assert found == {("agreement", "same"): 0.5, ("right", "same"): -0.5, ("right", "text"): -0.5}
    assert {row["p_holm"] for row in rows if row["measure"] == "right"} == {4 / 16}  # two tests
    assert {row["p_holm"] for row in rows if row["measure"] == "agreement"} == {2 / 16}  # one
    rows = comparisons(CHOSEN, systems, [("same", "right"), ("right", "text")], texts, FEW)
    assert {row["p_holm"] for row in rows} == {2 / 16}  # each against another: families of their own


@pytest.mark.parametrize("answer", ["", " \u200b", "I'm sorry, but I can't hear that.", "yes, yes"])
def test_an_answer_that_is_none_never_scores(answer):
    found = describe(CHOSEN, asked(QUESTIONS, [answer] * 8), TEXT, None, FEW)
    assert found["right"]["value"] == found["score"]["value"] == 0.0
    assert found["abstained"] == (0 if "yes" in answer else 8)


def test_a_set_without_references_has_behavior_and_no_score():
    questions = items(reference=None)
    given = asked(questions, ["x"] * 8)
    found = describe(EvalSet("s", CLIPS, questions), given, given, None, FEW)
    assert found["agreement"]["value"] == 1.0 and found["n_scored"] == 0 and "right" not in found


def test_order_of_the_items_changes_no_figure():
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    turned = [SystemAnswers([a.items[i] for i in order], [[a.seeds[0][i] for i in order]]) for a in (SPEECH, TEXT)]
    assert describe(CHOSEN, *turned, None, FEW) == describe(CHOSEN, SPEECH, TEXT, None, FEW)


def test_instructions_count_one_by_one_and_shares_mix():
    rules = [{"rule": "upper"}, {"rule": "no_comma"}]
    mixed = [Item(0, "t", "g", "", ("follow_strict",), rules), Item(0, "u", "g", "", ("exact",), "x")]
    found = score(mixed, ["A, B", "x"])
    assert found.value == pytest.approx(2 / 3) and right(found).value == 0.5
    with pytest.raises(ValueError, match="wer can't be averaged with exact"):
        score([mixed[1], Item(0, "v", "g", "", ("wer",), "x")], ["x", "x"])


TEXTS = st.sampled_from(["", "cat", "the cat", "Cat.", "I'm sorry, but I can't hear that."])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["wer", "cer", "exact", "label", "f1", "upper"]), TEXTS, TEXTS), min_size=1))
def test_scores_of_mixed_tasks_are_those_of_each_kind(rows):
    mixed = [Item(0, k, "g", "", metrics_of(Task(k, k, False, ("",))), reference) for k, reference, _ in rows]
    tally = score(mixed, [answer for *_, answer in rows])
    expected = [0.0 if empty else score_of(*row) for row, empty in zip(rows, tally.abstained, strict=True)]
    assert tally.items == expected and right(tally).items == [float(points == 1.0) for points in expected]


def test_references_are_checked_before_anything_is_asked():
    wrong = [Item(0, "t", "g", "", ("choice_accuracy",), {"label": "E", "choices": ["A", "B"]})]
    with pytest.raises(ValueError, match="set 's', utterance 'u0', task 't': the label 'E' is none"):
        check_references(EvalSet("s", CLIPS, wrong))
