# SPDX-License-Identifier: Apache-2.0
"""The registry of corpus metrics: values by hand, parity, and what holds for every metric."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from nemo_mtbi.metrics.corpus import METRICS, evaluate, metric, register_scorer, task_metric
from nemo_mtbi.metrics.scorers import SCORERS

WORDS = ["the", "cat", "sat", "a", "Dog,", "two", "yes", "I cannot help"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)
CHOICES = ["positive", "very positive", "negative"]
RULES = [{"rule": "lower"}, {"rule": "words", "count": 2}, {"rule": "excludes", "words": ["cat"]}]
# What a reference of each metric is made from and what breaks it.
REFERENCES = {
    "json": st.integers(0, 3).map(str),
    "quotes": TEXTS.map(lambda text: f'"{text}"'),
    "bullets": st.sampled_from(WORDS).map(lambda text: f"- {text}"),
    "choice_accuracy": st.sampled_from(CHOICES).map(lambda label: {"label": label, "choices": CHOICES}),
    **{
        name: st.lists(st.sampled_from(RULES), min_size=1, max_size=3) for name in METRICS if name.startswith("follow")
    },
}
REFERENCES["one_choice_rate"] = REFERENCES["choice_accuracy"]
ANSWERS = TEXTS | st.sampled_from(
    ["", "1", '"cat"', "- cat", "positive", "it is negative, not positive", "I can't help"]
)


def items(name, min_size=1):
    return st.lists(st.tuples(REFERENCES.get(name, TEXTS), ANSWERS), min_size=min_size, max_size=6)


def figure(name, pairs):
    return evaluate(name, [r for r, _ in pairs], [a for _, a in pairs])


def test_every_scoring_kind_has_a_metric_of_its_own():
    for kind in SCORERS:
        found = task_metric(kind)
        assert found.higher_is_better and found.per_item and found.scale == 1.0
    assert task_metric("wer").name == "word_accuracy"
    with pytest.raises(ValueError, match="unknown scoring kind 'bleu': use one of bullets, cer, exact"):
        task_metric("bleu")
    with pytest.raises(ValueError, match="unknown metric 'rouge': use one of wer, "):
        metric("rouge")


@pytest.mark.parametrize("name", METRICS)
def test_the_registry_knows_each_by_its_name(name):
    assert metric(name).name == name


@pytest.mark.parametrize(
    ("name", "references", "answers", "expected"),
    [
        ("wer", ["a b", "c d e f"], ["a", "c d e f g"], 2 / 6),
        ("wer_whisper_english", ["twenty one colours", "I can't"], ["21 colors", "i can not"], 0.0),
        ("wer_whisper_basic", ["Ä [noise] b"], ["ä b"], 0.0),
        ("cer", ["ab cd", "ef"], ["abcd", "eg"], 2 / 7),
        ("word_accuracy", ["a b", "a"], ["a x", "x y z"], 1 / 4),
        ("exact", ["a b", "a"], ["a  b", "A"], 1 / 2),
        ("f1", ["the cat sat", "a"], ["the cat", "b"], 0.4),
        ("squad_f1", [["the cat sat", "cat"], "a dog"], ["cat", "dog dog"], (1 + 2 / 3) / 2),
        ("squad_exact", [["the cat sat", "cat"], "a dog"], ["a cat!", "dog dog"], 1 / 2),
        ("label", ["yes", "no"], ["Yes.", "yes no"], 1 / 2),
    ],
)
def test_values_by_hand(name, references, answers, expected):
    assert evaluate(name, references, answers).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("label", "answer", "right_", "one"),
    [
        ("positive", "Positive.", 1, 1),
        ("positive", "I think it is positive, really positive", 1, 1),
        ("negative", "positive", 0, 1),
        ("very positive", "It is VERY  positive", 1, 1),  # the longer of two that overlap
        ("positive", "very positive", 0, 1),
        ("positive", "positive or negative", 0, 0),
        ("positive", "positively", 0, 0),
        ("positive", "", 0, 0),
        ("positive", "I cannot determine whether it is positive", 0, 0),
    ],
)
def test_choices_by_hand(label, answer, right_, one):
    reference = {"label": label, "choices": CHOICES}
    assert evaluate("choice_accuracy", [reference], [answer]).value == right_
    assert evaluate("one_choice_rate", [reference], [answer]).value == one


def test_of_two_choices_that_begin_alike_the_longer_counts():
    reference = {"label": "no idea", "choices": ["no", "no idea"]}
    assert evaluate("choice_accuracy", [reference] * 2, ["no idea!", "no"]).items == [1.0, 0.0]


def test_choices_of_one_letter_are_no_articles():
    reference = {"label": "B", "choices": ["A", "B", "C", "D"]}
    assert evaluate("choice_accuracy", [reference] * 3, ["it is a (B)", "b", "A or B"]).items == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("positive", "must be {'label'"),
        ({"label": "a"}, "must be {'label'"),
        ({"label": "c", "choices": ["a", "b"]}, "the label 'c' is none of the choices a, b"),
        ({"label": "yes", "choices": ["yes", "Yes"]}, "two or more different texts"),
        ({"label": "yes", "choices": ["yes"]}, "two or more different texts"),
        ({"label": "yes", "choices": ["yes", ""]}, "two or more different texts"),
        ({"label": "y", "choices": "yn"}, "two or more different texts"),
    ],
)
def test_bad_choices_are_errors(reference, message):
    with pytest.raises(ValueError, match=f"choice_accuracy: item 0: .*{message}"):
        evaluate("choice_accuracy", [reference], ["a"])


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=5))
def test_squad_parity_with_torchmetrics(pairs):
    # An answer that abstains scores 0 here, whatever it shares with the reference.
    pairs = [(r, a.replace("I cannot help", "help")) for r, a in pairs]
    targets = [{"answers": {"answer_start": [0], "text": [r]}, "id": str(i)} for i, (r, _) in enumerate(pairs)]
    found = squad([{"prediction_text": a, "id": str(i)} for i, (_, a) in enumerate(pairs)], targets)
    assert 100 * figure("squad_f1", pairs).value == pytest.approx(found["f1"].item(), rel=1e-5)
    assert 100 * figure("squad_exact", pairs).value == pytest.approx(found["exact_match"].item(), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_order_of_items_changes_nothing(name, data):
    pairs = data.draw(items(name))
    shuffled = data.draw(st.permutations(pairs))
    assert figure(name, pairs).value == figure(name, shuffled).value


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_an_abstention_never_helps(name, data):
    pairs = data.draw(items(name))
    reference = data.draw(REFERENCES.get(name, TEXTS.filter(lambda text: not text.startswith("I cannot help"))))
    blanks = ["", " ", "\n", "\u200b"]
    if not name.startswith(("wer", "cer")):  # there a refusal is words, some of which may happen to be said
        blanks.append("I'm sorry, but I can't help")
    blank = data.draw(st.sampled_from(blanks))
    before, after = figure(name, pairs), figure(name, [*pairs, (reference, blank)])
    assert after.abstentions == before.abstentions + 1
    if metric(name).higher_is_better:
        assert 0.0 <= after.value <= before.value + 1e-12 <= metric(name).scale * (1 + 1e-9)
    elif before.value <= 1.0:  # above 1, see the module's docstring
        assert after.value >= before.value - 1e-12


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("bleu", "chrf") and "er" not in name[:3]])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_refusal_is_worth_nothing_where_items_are_right_or_wrong(name, data):
    reference = data.draw(REFERENCES.get(name, TEXTS.filter(lambda text: "cannot" not in text)))
    found = evaluate(name, [reference], ["I'm sorry, but I cannot help with the cat"])
    assert (found.value, found.abstentions) == (0.0, 1)


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_items_are_corpora_of_one(name, data):
    pairs = data.draw(items(name))
    tally = figure(name, pairs)
    if metric(name).per_item:
        assert tally.items == [pytest.approx(figure(name, [pair]).value) for pair in pairs]
    else:
        with pytest.raises(ValueError, match=f"{name} exists for a corpus only"):
            _ = tally.items


@pytest.mark.parametrize("name", METRICS)
def test_malformed_items_are_one_clear_error(name):
    with pytest.raises(ValueError, match=f"{name}: item 0 has no reference; add one"):
        evaluate(name, [None], ["a"])
    with pytest.raises(ValueError, match=f"{name}: answer 0 is None, not a text"):
        evaluate(name, ["a"], [None])
    with pytest.raises(ValueError, match=f"{name}: 1 references but 2 answers"):
        evaluate(name, ["a"], ["a", "b"])
    with pytest.raises(ValueError, match=f"{name} of no items is undefined"):
        evaluate(name, [], [])
    with pytest.raises(ValueError, match=f"{name}: item 0: "):
        evaluate(name, [7], ["a"])


def test_a_refusal_lends_bleu_no_length():
    references, short = ["the cat sat on the mat today"], ["the cat sat on"]
    before = evaluate("bleu", references, short).value
    assert evaluate("bleu", [*references, "two"], [*short, "I'm sorry, but I can't help you"]).value < before
    assert evaluate("bleu", [*references, "I cannot help you"], [*short, "I cannot help you"]).value > before


def test_every_kind_of_scoring_has_a_metric():
    with pytest.raises(ValueError, match="unknown scoring kind 'bleu'"):
        task_metric("bleu")
    assert all(task_metric(kind).higher_is_better for kind in SCORERS)


def test_a_scorer_from_outside(monkeypatch):
    monkeypatch.setattr("nemo_mtbi.metrics.corpus.METRICS", dict(METRICS))
    register_scorer("longer", lambda reference, answer: float(len(answer) > len(reference)))
    try:
        assert task_metric("longer").tally(["a", "b"], ["aa", "c"]).value == 0.5
        with pytest.raises(ValueError, match="'longer' is registered already"):
            register_scorer("longer", SCORERS["exact"])
        with pytest.raises(ValueError, match="'bleu' is registered already"):
            register_scorer("bleu", SCORERS["exact"])
    finally:
        del SCORERS["longer"]
