# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.demo.corpora import grammar

DRAWS = 4000


@pytest.fixture(scope="module")
def sample() -> list[grammar.Sentence]:
    rng = random.Random(7)
    return [grammar.sample_sentence(rng) for _ in range(DRAWS)]


@given(st.integers(0, 2**32), st.sampled_from([None, *grammar.FORMS]))
def test_parse_recovers_what_was_sampled(seed, form):
    sentence = grammar.sample_sentence(random.Random(seed), form)
    assert grammar.parse_sentence(sentence.text) == sentence
    assert set(sentence.words) <= set(grammar.grammar_words())
    lowest, highest = (2, 6) if "verb" not in sentence.slots else (4, 10)
    assert lowest <= len(sentence.words) <= highest


@given(st.integers(0, 2**32), st.sampled_from([*grammar.FORMS]))
def test_a_sentence_matches_one_form_only(seed, form):
    text = grammar.sample_sentence(random.Random(seed), form).text
    assert [name for name, f in grammar.FORMS.items() if f.pattern.fullmatch(text)] == [form]


@given(st.integers(0, 2**32), st.sampled_from([*grammar.FORMS]))
def test_answers_are_short_and_in_lower_case_unless_about_case(seed, form):
    for task, answer in grammar.references(grammar.sample_sentence(random.Random(seed), form).text).items():
        assert answer and answer == " ".join(answer.split()), task
        assert len(answer.split()) <= 14, task
        assert task in ("upper", "title") or answer == answer.lower(), task


def test_sentence_is_picklable_and_hashable():
    sentence = grammar.sample_sentence(random.Random(0))
    assert pickle.loads(pickle.dumps(sentence)) == sentence
    assert len({sentence, grammar.parse_sentence(sentence.text)}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fox",
        "seven",
        "The fox sleeps today",
        "the fox sleeps today.",
        "the  fox sleeps today",
        "the red fox sleeps",
    ]
    + ["one two three four five six seven", "the fox waits today", "seven two\n", "the cat sleeps today"],
)
def test_text_outside_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match="not a sentence of the demo grammar"):
        grammar.parse_sentence(text)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="unknown form 'poem'; use one of digits, mark"):
        grammar.sample_sentence(random.Random(0), "poem")


def test_vocabulary_has_one_category_for_each_word_and_no_homophone_of_a_digit():
    vocabulary = grammar.grammar_words()
    assert 120 <= len(vocabulary) <= 180
    for one, other in combinations(grammar.CATEGORIES.values(), 2):
        assert not set(one) & set(other)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in vocabulary)
    assert not set(vocabulary) & {"to", "too", "for", "fore", "ate", "won", "sicks", "tree", "a", "at", "oh", "nein"}
    assert set(grammar.WATER_PLACES + grammar.LAND_PLACES) == set(grammar.CATEGORIES["place"])
    assert set(grammar.HAPPY_MOODS + grammar.SAD_MOODS) == set(grammar.CATEGORIES["mood"])
    assert grammar.CATEGORIES["number"] == grammar.DIGITS


def test_glossary_is_injective_and_never_the_english_word():
    spanish = list(grammar.SPANISH.values())
    assert set(grammar.SPANISH) == set(grammar.grammar_words())
    assert len(set(spanish)) == len(spanish)
    assert not set(spanish) & set(grammar.grammar_words())
    assert all(word.isascii() and word.isalpha() and word.islower() for word in spanish)


def test_draws_reach_every_word_and_keep_the_weights(sample):
    assert {word for s in sample for word in s.words} == set(grammar.grammar_words())
    assert sum(f.weight for f in grammar.FORMS.values()) == 100
    strings = sum("verb" not in s.slots for s in sample) / DRAWS
    assert 0.10 < strings < 0.14


@pytest.mark.parametrize("task", ["sentiment", "water", "digits", "color", "size", "when", "count", "first", "second"])
def test_guessing_the_most_frequent_answer_is_right_less_than_3_times_in_4(sample, task):
    shares = Counter(grammar.ANSWERS[task](s) for s in sample)
    assert max(shares.values()) / DRAWS < 0.75, shares


LONG = "the happy small fox runs near the red river tomorrow"
BUS = "bus four nine waits near the school"
MARK = "my sad dog sings behind room seven two"
DIGITS = "three seven one"
OBJECT = "every proud goat carries the huge key inside the tower"
EXAMPLES = {
    LONG: {
        "transcribe": LONG,
        "continue": "then the fox walks near the lake",
        "translate": "el feliz pequeno zorro corre cerca el rojo rio manana",
        "keywords": "fox, runs, river",
        "who": "fox",
        "where": "river",
        "doing": "runs",
        "sentiment": "positive",
        "count": "ten",
        "upper": "THE HAPPY SMALL FOX RUNS NEAR THE RED RIVER TOMORROW",
        "quoted": '"the happy small fox runs near the red river tomorrow"',
        "json": '{"who": "fox", "where": "river"}',
        "first": "the",
        "color": "red",
        "water": "yes",
        "when": "tomorrow",
        "chat": "tell me more about the fox",
        "last": "tomorrow",
        "reverse": "tomorrow river red the near runs fox small happy the",
        "spell": "t h e",
        "bullets": "* fox * runs * river",
        "digits": "no",
        "size": "small",
        "title": "The Happy Small Fox Runs Near The Red River Tomorrow",
        "second": "happy",
        "ending": "the happy small fox runs near the red river tomorrow the end",
    },
    DIGITS: {
        "transcribe": DIGITS,
        "continue": "and then two",
        "translate": "tres siete uno",
        "keywords": "three, one",
        "who": "nobody",
        "where": "nowhere",
        "doing": "nothing",
        "sentiment": "neutral",
        "count": "three",
        "upper": "THREE SEVEN ONE",
        "quoted": '"three seven one"',
        "json": '{"who": "nobody", "where": "nowhere"}',
        "first": "three",
        "color": "none",
        "water": "no",
        "when": "none",
        "chat": "tell me more about the number three seven one",
        "last": "one",
        "reverse": "one seven three",
        "spell": "t h r e e",
        "bullets": "* three * one",
        "digits": "yes",
        "size": "none",
        "title": "Three Seven One",
        "second": "seven",
        "ending": "three seven one the end",
    },
    BUS: {
        "continue": "then the bus stops near the market",
        "keywords": "bus four nine, waits, school",
        "who": "bus four nine",
        "where": "school",
        "water": "no",
        "digits": "yes",
        "chat": "tell me more about the bus",
        "json": '{"who": "bus four nine", "where": "school"}',
    },
    MARK: {
        "continue": "then the dog hides again",
        "keywords": "dog, sings, room seven two",
        "where": "room seven two",
        "sentiment": "negative",
        "water": "no",
        "digits": "yes",
    },
    OBJECT: {
        "continue": "then the goat drops the key",
        "doing": "carries",
        "where": "tower",
        "color": "none",
        "size": "huge",
        "water": "no",
    },
    "this duck swims today": {"where": "nowhere", "keywords": "duck, swims", "continue": "then the duck climbs again"},
    "two nine": {"continue": "and then zero"},
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_answers_worked_out_by_hand(text):
    answers = grammar.references(text)
    assert {task: answers[task] for task in EXAMPLES[text]} == EXAMPLES[text]


def test_the_first_two_examples_cover_every_task():
    assert set(EXAMPLES[LONG]) == set(EXAMPLES[DIGITS]) == set(grammar.ANSWERS)


def test_json_answers_parse(sample):
    for s in sample[:200]:
        answer = json.loads(grammar.ANSWERS["json"](s))
        assert answer == {"who": grammar.ANSWERS["who"](s), "where": grammar.ANSWERS["where"](s)}
