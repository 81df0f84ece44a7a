# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_mtbi.data.chat import ChatFormat


def test_the_turn_follows_the_order_of_its_parts(chat):
    assert chat.prompt("go", [-1, -2]) == [1, -1, -2, ord("|"), ord("g"), ord("o")]


def test_prompt_first(chat):
    turned = ChatFormat(turn=("{prompt}", "<user>", "{audio}"), end="<end>", tokenizer=chat.tokenizer)
    assert turned.prompt("a", [-1]) == [ord("a"), 1, -1]
    assert turned.fingerprint() != chat.fingerprint()


def test_an_empty_prompt_has_no_tokens(chat):
    assert chat.prompt("", [-1]) == [1, -1, ord("|")]


def test_only_a_whole_response_has_an_end(chat):
    assert chat.response("ok") == [ord("o"), ord("k"), 2]
    assert chat.response("ok", truncated=True) == [ord("o"), ord("k")]
    assert chat.response("") == [2]
    assert chat.decode([ord("o"), ord("k"), 2]) == "ok"


@given(words=st.lists(st.text("abc", min_size=1), max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_concatenate_to_the_text(chat, words):
    pieces = [token for tokens in chat.encode_words(words) for token in tokens]
    assert pieces == chat.encode(" ".join(words))


@pytest.mark.parametrize("turn", [("{audio}",), ("{prompt}",), ("{audio}", "{prompt}", "{audio}")])
def test_each_slot_stands_exactly_once(chat, turn):
    with pytest.raises(ValueError, match="exactly once"):
        ChatFormat(turn=turn, end="<end>", tokenizer=chat.tokenizer)


def test_the_end_must_be_one_token(chat):
    with pytest.raises(ValueError, match="no token of the LLM's vocabulary"):
        ChatFormat(turn=("{audio}", "{prompt}"), end="the end", tokenizer=chat.tokenizer)


def test_pickles(chat):
    again = pickle.loads(pickle.dumps(chat))
    assert again.prompt("x", [-3]) == chat.prompt("x", [-3])
    assert again.fingerprint() == chat.fingerprint()
