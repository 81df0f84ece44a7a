# SPDX-License-Identifier: Apache-2.0
"""What counts as no answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.demo.corpora.grammar import references, sample_sentence
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.metrics.abstention import abstains, is_empty, is_refusal


@pytest.mark.parametrize("answer", ["", "  \n\t", "\u200b", "\u00a0"])
def test_empty(answer):
    assert is_empty(answer) and abstains(answer) and abstains(answer, "")


@pytest.mark.parametrize("answer", [".", "-", "0", "。", "a"])
def test_not_empty(answer):
    assert not is_empty(answer) and not abstains(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't hear any audio.",
        "I’m sorry, I cannot help with that.",
        "Sorry, I am unable to transcribe audio.",
        "I don't have the ability to transcribe speech",
        "I do not have access to the recording.",
        "Unfortunately, I can't process audio.",
        "As an AI language model, I ...",
        "I'm just a text-based assistant",
        "There is no audio attached.",
        "  I can't   assist with this",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer) and abstains(answer) and abstains(answer, "yes")
    assert not abstains(answer, answer.upper()) and not abstains(answer, ["yes", answer])


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry",
        "I can't wait",
        "Sorry for the delay",
        "he said: I can't hear you",
        '"I can\'t hear you"',
        "yes",
        "As an aid",
        "i cannot heartily agree",
    ],
)
def test_answers_that_only_look_like_refusals(answer):
    assert not is_refusal(answer)


@given(st.integers(0, 10_000))
def test_no_right_answer_of_the_demo_abstains(seed):
    for answer in references(sample_sentence(stable_rng(seed)).text).values():
        assert not abstains(answer)
