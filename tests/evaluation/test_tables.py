# SPDX-License-Identifier: Apache-2.0
"""Markdown of figures: names and notes of others stay text."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.evaluation.tables import in_markdown, markdown, table

HOSTILE = "<script>x</script>|[a](javascript:1)![b](http://c)`\\\n# d\x1b[2J\x9b\u202e"


def test_names_of_others_stay_text():
    found = {"utterances": 1, "questions": 0, "systems": {}, "left_out": {HOSTILE: 1}, "notes": [HOSTILE]}
    text = markdown({"title": HOSTILE, "sets": {HOSTILE: found}, "not_measured": ["`=` is ours"], "systems": {}})
    text += "\n".join(table([[HOSTILE, "b"], [HOSTILE, HOSTILE]]))
    assert not set("<>[\x1b\x9b\u202e\\") & set(text) and text.count("`") == 2
    assert [line for line in text.splitlines() if line.startswith("#")][1:] == [
        line for line in text.splitlines() if line.startswith("## ")
    ]
    *_, head, rule, row = [line for line in text.splitlines() if line.startswith("|")]
    assert head.count("|") == row.count("|") == rule.count("|") == 3


@pytest.mark.parametrize("name", ["mtbi_demo", "word_accuracy", "seed 0: 95.0 (94.1 to 96)", "今天"])
def test_ordinary_names_stay_as_they_are(name):
    assert in_markdown(name) == name


@given(st.text(st.characters(blacklist_categories=["Cc", "Cs", "Cf"])))
def test_what_is_shown_is_the_text(text):
    assert html.unescape(in_markdown(text.replace("&", "+"))) == " ".join(text.replace("&", "+").split())
