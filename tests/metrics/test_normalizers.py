# SPDX-License-Identifier: Apache-2.0
"""What counts as the same words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.metrics.normalizers import (
    NORMALIZERS,
    normalize,
    normalizer,
    squad_normalize,
    without_idle_spaces,
    words,
)

TEXTS = st.text(max_size=40)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello,   World! ", "hello world"),
        ("Don’t stop — 'now'", "don't stop now"),
        ("twenty-one", "twenty one"),
        ("0'_", "0"),
        ("$5 + 3 %", "5 3"),
        ("ÉCOLE", "école"),
        ("e\u0301cole", "école"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@given(TEXTS)
def test_normalize_twice_changes_nothing(text):
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "whisper_english",
            "Mr. Brien won't pay $20, uh, for twenty-one [laughs]",
            "mister brien will not pay $20 for 21",
        ),
        ("whisper_english", "I can't", "i can not"),
        ("whisper_english", "twenty one colours", "21 colors"),
        ("whisper_english", "um, the dog (barking)", "the dog"),
        ("whisper_basic", "Der Hund, <noise> äh!", "der hund äh"),
        ("none", "  A,\n b ", "A, b"),
    ],
)
def test_whisper(name, text, expected):
    assert normalizer(name)(text) == expected


@given(TEXTS)
def test_squad_normalize_leaves_no_article_and_no_punctuation(text):
    written = squad_normalize(text)
    assert not {"a", "an", "the"} & set(written.split()) and not set("!?.,'\"") & set(written)


def test_unknown_normalizer_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown normalizer 'upper': use one of " + ", ".join(NORMALIZERS)):
        normalizer("upper")


@given(TEXTS)
def test_words_and_idle_spaces_change_no_character(text):
    assert "".join(words(text)) == "".join(text.split())
    assert without_idle_spaces(text).replace(" ", "") == "".join(text.split())


@given(st.text("abc é'ё한", max_size=20))
def test_languages_with_spaces_keep_their_words_and_spaces(text):
    assert words(text) == text.split() and without_idle_spaces(text) == " ".join(text.split())


@given(st.text("今天カな, ー", max_size=20))
def test_languages_without_spaces_are_counted_by_character(text):
    cleaned = normalize(text)
    assert words(cleaned) == list(cleaned.replace(" ", "")) and " " not in without_idle_spaces(cleaned)
