# SPDX-License-Identifier: Apache-2.0
"""Scorers against values computed by hand, and properties that hold for any text."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.demo.corpora.grammar import references, sample_sentence
from nemo_mtbi.metrics.scorers import SCORERS, exact, json_equal, score, squad_exact, squad_f1, token_f1

TEXTS = st.text(max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown scoring kind 'bleu': use one of bullets, cer, exact"):
        score("bleu", "a", "a")


@pytest.mark.parametrize(
    ("kind", "reference", "hypothesis", "expected"),
    [
        ("wer", "a b c d", "a b c", 0.75),
        ("wer", "a", "x y z", 0.0),
        ("wer", "A b", "a b.", 1.0),
        ("wer", "今天天气很好", "今天天气真好", 5 / 6),  # no spaces: each character is a word
        ("wer", "今天天气很好", "好", 1 / 6),
        ("wer", "我用Python写", "我用 Python 写。", 1.0),
        ("wer", "สวัสดี", "สวัสดู", 3 / 4),  # a mark belongs to its consonant
        ("wer", "안녕 하세요", "안녕 하세오", 0.5),  # Korean has spaces
        ("cer", "今天天气很好", "今天天气真好", 5 / 6),
        ("cer", "今天，天气很好。", "今天 天气 很好", 1.0),  # spaces say nothing there
        ("cer", "ab cd", "abcd", 0.8),
        ("cer", "a", "x y z", 0.0),
        ("cer", "A b", "a b.", 1.0),
        ("f1", "今天天气很好", "今天天气真好", 5 / 6),
        ("exact", "a  b", " a b\n", 1.0),
        ("exact", "a b", "A b", 0.0),
        ("exact", "a b", "a b.", 0.0),
        ("f1", "cat, mat", "mat cat", 1.0),
        ("f1", "the cat sat", "the cat", 0.8),  # precision 1, recall 2/3
        ("f1", "a a b", "a b b", 2 / 3),  # overlap of bags: a, b
        ("f1", "a", "b", 0.0),
        ("f1", "a", "", 0.0),
        ("f1", "", "", 1.0),
        ("f1", "+", "-", 0.0),
        ("label", "yes", "Yes.", 1.0),
        ("label", "yes", ' "YES" ', 1.0),
        ("label", "yes", "yes no", 0.0),
        ("label", "yes", "yes, it is", 0.0),
        ("label", "yes", "", 0.0),
        ("label", "1", "-1", 0.0),
        ("label", "?", "!", 0.0),
        ("json", '{"who": "cat", "n": 1}', '{ "n": 1.0, "who":"cat" }', 1.0),
        ("json", '{"n": 1}', '{"n": true}', 0.0),
        ("json", '{"n": [0, {"a": 1}]}', '{"n": [0, {"a": true}]}', 0.0),
        ("json", '{"n": 1}', '{"n": 1, "m": 2}', 0.0),
        ("json", '{"n": 1}', '{"n": 2, "n": 1}', 0.0),
        ("json", '{"n": 1}', '{"n": NaN}', 0.0),
        ("json", '{"n": 1}', 'Sure: {"n": 1}', 0.0),
        ("json", '{"n": 1}', "", 0.0),
        ("json", '{"n": 1}', "[" * 100_000, 0.0),
        ("json", '{"n": 1}', '{"n": ' + "9" * 10_000 + "}", 0.0),
        ("quotes", '"a b"', ' "a  b" ', 1.0),
        ("quotes", '"a b"', "“a b”", 1.0),
        ("quotes", '"a b"', "a b", 0.0),
        ("quotes", '"a b"', '"a b', 0.0),
        ("quotes", '"a b"', '"a b".', 0.0),
        ("quotes", '"a b"', '"a c"', 0.0),
        ("quotes", '"a"', '"', 0.0),
        ("upper", "A B", "A B", 1.0),
        ("upper", "a b", "A  B", 1.0),
        ("upper", "A B", "A b", 0.0),
        ("upper", "A B", "A C", 0.0),
        ("bullets", "- a\n- b c", "* a\n\n • b  c ", 1.0),
        ("bullets", "- a\n- b", "- b\n- a", 0.0),
        ("bullets", "- a\n- b", "Here:\n- a\n- b", 0.0),
        ("bullets", "- a\n- b", "-a\n-b", 0.0),
        ("bullets", "- a\n- b", "- a", 0.0),
        ("bullets", "- a\n- b", "", 0.0),
        ("bullets", "* a * b", "* a * b", 1.0),  # the demo's tokenizer has no line break
        ("bullets", "* a * b", "* a * c", 0.0),
    ],
)
def test_scores_by_hand(kind, reference, hypothesis, expected):
    assert score(kind, reference, hypothesis) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("json", "cat"), ("json", ""), ("json", '{"a": NaN}'), ("quotes", "a b"), ("bullets", "a b"), ("bullets", "")],
)
def test_reference_that_breaks_its_own_format_is_an_error(kind, reference):
    with pytest.raises(ValueError, match=f"the reference of a task scored by '{kind}' must"):
        score(kind, reference, reference)


GOOD_REFERENCES = {
    "json": JSON.map(json.dumps),
    "quotes": TEXTS.map(lambda text: f'"{text}"'),
    "bullets": st.lists(st.sampled_from(["a", "b c", "d - e"]), min_size=1, max_size=4).map(
        lambda items: "\n".join("- " + item for item in items)
    ),
}


@pytest.mark.parametrize("kind", sorted(SCORERS))
@given(data=st.data())
def test_the_reference_itself_is_right(kind, data):
    reference = data.draw(GOOD_REFERENCES.get(kind, TEXTS))
    # In capitals, since that is what the kind asks for; the reference may be in any case.
    assert score(kind, reference, reference.upper() if kind == "upper" else reference) == 1.0


@pytest.mark.parametrize("kind", sorted(SCORERS))
@given(data=st.data())
def test_any_answer_scores_between_0_and_1(kind, data):
    value = score(kind, data.draw(GOOD_REFERENCES.get(kind, TEXTS)), data.draw(TEXTS | JSON.map(json.dumps)))
    assert isinstance(value, float) and 0.0 <= value <= 1.0


@given(TEXTS, TEXTS)
def test_agreement_measures_are_symmetric(a, b):
    assert token_f1(a, b) == token_f1(b, a)
    assert exact(a, b) == exact(b, a)
    assert exact(a, b) <= token_f1(a, b)


@given(JSON, JSON)
def test_json_equality_is_that_of_the_canonical_form(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert json_equal(json.dumps(a), json.dumps(b)) == float(same)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "match", "f1"),
    [
        ("The cat!", "cat", 1.0, 1.0),  # no article, no punctuation
        ("the cat sat", "a cat", 0.0, 2 / 3),  # cat sat against cat
        ("don't", "dont", 1.0, 1.0),
        ("the", "a", 1.0, 1.0),  # nothing is left of both
        ("the", "cat", 0.0, 0.0),
    ],
)
def test_squad_by_hand(reference, hypothesis, match, f1):
    assert squad_exact(reference, hypothesis) == match
    assert squad_f1(reference, hypothesis) == pytest.approx(f1)


def test_demo_references_fit_their_scoring_kind():
    """A right answer of each demo task scores 1 by the kind its pool names, and another sentence's does not always."""
    kinds = {"transcribe": "wer", "keywords": "f1", "json": "json", "quoted": "quotes", "bullets": "bullets"}
    kinds.update({"upper": "upper", "water": "label", "spell": "exact"})
    rng = random.Random(0)
    sentences = [references(sample_sentence(rng).text) for _ in range(30)]
    for task, kind in kinds.items():
        answers = [answers[task] for answers in sentences]
        assert [score(kind, a, a) for a in answers] == [1.0] * len(answers)
        assert any(score(kind, answers[0], other) < 1.0 for other in answers[1:])
