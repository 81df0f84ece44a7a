# SPDX-License-Identifier: Apache-2.0
"""Every rule on answers that obey it and answers that don't, strict and loose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.metrics.corpus import evaluate
from nemo_mtbi.metrics.instructions import (
    RULES,
    check_rules,
    count_sentences,
    follows,
    from_ifeval,
    loose_readings,
)

CASES = [
    ({"rule": "upper"}, ["THE CAT, 5!"], ["THE cat", "5!"]),
    ({"rule": "lower"}, ["the cat 5"], ["The cat", "5"]),
    ({"rule": "quoted"}, ['"a b"', ' "a" '], ["a", '"', '"a', "“a”"]),
    ({"rule": "json"}, ['{"a": 1}', "[1]", '```json\n{"a": 1}\n```'], ["{'a': 1}", 'Sure: {"a": 1}', "[" * 50_000]),
    ({"rule": "bullets", "count": 2}, ["* a\n* b", "- a\ntext\n - b"], ["* a", "* a\n* b\n- c", "**a**\n* b"]),
    ({"rule": "bullets", "count": 2, "relation": "at least"}, ["- a\n- b\n- c"], ["- a"]),
    ({"rule": "words", "count": 3}, ["a b c", "a, b-c"], ["a b"]),
    ({"rule": "words", "count": 3, "relation": "less than"}, ["a b"], ["a b c"]),
    ({"rule": "words", "count": 3, "relation": "at most"}, ["a b c"], ["a b c d"]),
    ({"rule": "sentences", "count": 2, "relation": "exactly"}, ["A b. C d!", "Is it? yes"], ["A b.", "Ab. B? c!"]),
    ({"rule": "paragraphs", "count": 2}, ["a\n***\nb", "*** a *** b ***"], ["a", "a *** *** b", "a\n\nb"]),
    ({"rule": "paragraphs", "count": 2, "divider": "\n\n"}, ["a\n\nb"], ["a\nb"]),
    (
        {"rule": "nth_paragraph", "count": 2, "nth": 2, "word": "Dog"},
        ["a\n\n'dog, b"],
        ["a\n\nb dog", "dog", "a\n\n\n\ndog"],
    ),
    ({"rule": "starts_with", "phrase": "Say it"}, ["say it now", " SAY IT"], ["now say it"]),
    ({"rule": "ends_with", "phrase": "The end."}, ["so: the end.", '"The END."\n'], ["the end", "The end. Bye"]),
    ({"rule": "contains", "keywords": ["cat", "c++"]}, ["A CAT in C++"], ["cat in c", "c++"]),
    ({"rule": "excludes", "words": ["cat"]}, ["category", "dog"], ["a Cat.", "cat"]),
    ({"rule": "keyword_count", "keyword": "cat", "count": 2}, ["cat Cat"], ["cat"]),
    ({"rule": "letter_count", "letter": "a", "count": 2, "relation": "less than"}, ["a b"], ["A a"]),
    ({"rule": "capital_words", "count": 2}, ["the CAT-A and U.S"], ["the CAT"]),
    ({"rule": "no_comma"}, ["a b"], ["a, b"]),
    ({"rule": "title"}, ["<<a>>\nb"], ["<a>", "<< >>", "<<a\n>>"]),
    ({"rule": "placeholders", "count": 2}, ["[a] b [c]"], ["[a] b"]),
    ({"rule": "highlights", "count": 2}, ["*a* b *c*"], ["*a*", "* * *a*"]),
    (
        {"rule": "sections", "marker": "Section", "count": 2},
        ["Section 1 a Section 2"],
        ["Section 1", "section 1 section 2"],
    ),
    ({"rule": "postscript", "marker": "P.S."}, ["a\np. s. b", "P.S. b"], ["a PS"]),
    ({"rule": "one_of", "options": ["yes.", "no."]}, ["Well, yes."], ["Yes", "maybe"]),
    ({"rule": "two_responses"}, ["a\n******\nb"], ["a", "a ****** a", "a ****** b ****** c"]),
]


def test_every_rule_has_cases():
    assert {rule["rule"] for rule, _, _ in CASES} == set(RULES)


@pytest.mark.parametrize(("rule", "good", "bad"), CASES, ids=lambda value: value["rule"] if "rule" in value else "")
def test_rules_by_hand(rule, good, bad):
    check_rules([rule])
    assert [follows(answer, rule) for answer in good] == [True] * len(good)
    assert [follows(answer, rule) for answer in bad] == [False] * len(bad)
    assert not any(follows(answer, rule, loose) for answer in ("", " \n") for loose in (False, True))


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ({"rule": "upper"}, "Sure, here it is:\nTHE CAT"),
        ({"rule": "lower"}, "the cat\nHope this helps!"),
        ({"rule": "quoted"}, 'Here:\n"a"\nBye'),
        ({"rule": "starts_with", "phrase": "say"}, "**Say** it"),
    ],
)
def test_loose_forgives_frames_and_asterisks(rule, answer):
    assert not follows(answer, rule) and follows(answer, rule, loose=True)


@given(st.text(alphabet="aB*-\n\"'. ", max_size=30), st.sampled_from([rule for rule, _, _ in CASES]))
def test_loose_is_never_harder(answer, rule):
    assert len(loose_readings(answer)) == 8
    assert follows(answer, rule, loose=True) >= follows(answer, rule)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("...", 0),
        ("One", 1),
        ("One. Two", 2),
        ("One... two?! Three.", 3),
        ("Dr. Who met Mr. T. at 3.5 p.m. today.", 2),  # "p.m." ends one, as far as a rule can tell
        ('He said "stop." Then he left.', 2),
        ("See e.g. this one.", 1),
        ("一。二！", 2),
        ("Line one\nline two", 1),
    ],
)
def test_sentences(text, expected):
    assert count_sentences(text) == expected


def test_rates_by_hand():
    rules = [[{"rule": "upper"}, {"rule": "no_comma"}], [{"rule": "lower"}], [{"rule": "no_comma"}]]
    answers = ["THE, CAT", "Sure:\nthe cat", "I'm sorry, I can't help"]
    found = {name: evaluate(name, rules, answers) for name in ("follow_strict", "follow_loose")}
    assert found["follow_strict"].value == 1 / 4 and found["follow_loose"].value == 2 / 4
    assert found["follow_strict"].items == [1 / 2, 0.0, 0.0]
    assert evaluate("follow_prompt_strict", rules, answers).value == 0.0
    assert evaluate("follow_prompt_loose", rules, answers).value == 1 / 3
    # A refusal without a comma obeys a rule and yet gives no answer.
    silent = evaluate("follow_prompt_strict", [[{"rule": "no_comma"}]], ["I cannot help with that"])
    assert (silent.value, silent.abstentions) == (0.0, 1)


def test_ifeval_items():
    rules = from_ifeval(
        ["change_case:english_capital", "length_constraints:number_words", "keywords:forbidden_words"],
        [None, {"num_words": 5, "relation": "less than"}, {"forbidden_words": ["cat"]}],
    )
    assert rules == [
        {"rule": "upper"},
        {"rule": "words", "count": 5, "relation": "less than"},
        {"rule": "excludes", "words": ["cat"]},
    ]
    # Public files list every parameter of every instruction, None where it is not its own.
    assert from_ifeval(["startend:quotation"], [{"num_words": None, "keywords": None}]) == [{"rule": "quoted"}]


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (["language:response_language"], [{"language": "hi"}], "can't be checked by rule here"),
        (["startend:quotation"], [{"num_words": 3}], "has no parameter num_words"),
        (["startend:quotation"], [], "1 instructions but 0 sets of parameters"),
        (["detectable_format:number_bullet_lists"], [{}], "rule 'bullets': missing a required argument: 'count'"),
    ],
)
def test_ifeval_items_that_cannot_be_checked(ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        from_ifeval(ids, kwargs)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "must be a list of rules"),
        ("upper", "must be a list of rules"),
        ([{"rule": "loud"}], "unknown rule"),
        ([{"rule": ["upper"]}], "unknown rule"),
        (["upper"], "unknown rule"),
        ([{"rule": "bullets"}], "missing a required argument: 'count'; its parameters are: count, relation"),
        ([{"rule": "upper", "count": 3}], "got an unexpected keyword argument 'count'; its parameters are: none"),
        ([{"rule": "bullets", "count": "3"}], "count must be a whole number"),
        ([{"rule": "bullets", "count": True}], "count must be a whole number"),
        ([{"rule": "bullets", "count": 3, "relation": "about"}], "relation must be one of exactly"),
        ([{"rule": "bullets", "count": 3, "relation": []}], "relation must be one of exactly"),
        ([{"rule": "contains", "keywords": "cat"}], "keywords must be a list of texts"),
        ([{"rule": "contains", "keywords": []}], "keywords must be a list of texts"),
        ([{"rule": "letter_count", "letter": "ab", "count": 1}], "letter must be one character"),
        ([{"rule": "starts_with", "phrase": " "}], "phrase must be a text"),
    ],
)
def test_bad_rules_are_errors(rules, message):
    with pytest.raises(ValueError, match=message):
        check_rules(rules)
    with pytest.raises(ValueError, match=f"follow_strict: item 0: .*{message}"):
        evaluate("follow_strict", [rules], ["a"])
