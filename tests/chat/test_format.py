# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_mtbi.chat.format import ChatFormat, chat_difference


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
    with pytest.raises(ValueError, match="not a token of the LLM's vocabulary"):
        ChatFormat(turn=("{audio}", "{prompt}"), end="the end", tokenizer=chat.tokenizer)


def test_pickles(chat):
    again = pickle.loads(pickle.dumps(chat))
    assert again.prompt("x", [-3]) == chat.prompt("x", [-3])
    assert again.fingerprint() == chat.fingerprint()


class Pairs:
    """Characters, and a token for each pair of equal letters: texts have several spellings."""

    vocab_size = 500

    def token_to_id(self, token):
        return {"<end>": 2, "<stop>": 3}.get(token)

    def text_to_ids(self, text):
        return [ord(character) for character in text]

    def ids_to_text(self, ids):
        return "".join(chr(i) if i < 256 else 2 * chr(i - 256) for i in ids)


@pytest.mark.parametrize(
    "ids, used",
    [
        ([ord("f"), 256 + ord("o")], True),
        ([ord("f"), 256 + ord("o"), 2], True),  # some servers give the end too
        ([ord(" "), ord("f"), 256 + ord("o")], True),  # an answer is stored without the space that it begins with
        ([ord("f"), ord("o")], False),  # another text: it was edited
        ([ord("f"), 3, 256 + ord("o")], False),  # it would have ended there
        ([ord("f"), 2, 256 + ord("o")], False),
        ([-1, ord("f"), 256 + ord("o")], False),
        ([10**9], False),
        ([], False),
        (None, False),
    ],
)
def test_the_tokens_of_an_answer_are_labels_where_they_spell_it(ids, used):
    chat = ChatFormat(("{audio}", "{prompt}"), "<end>", Pairs(), ends=(3,))
    spelled = [i for i in ids or () if i != 2] if used else [ord("f"), ord("o"), ord("o")]
    assert chat.response("foo", ids=ids) == [*spelled, 2]
    assert chat.response("foo", truncated=True, ids=ids) == spelled


class Marked(Pairs):
    """Characters, with SentencePiece's mark in front of each word, be it the first of a text."""

    def text_to_ids(self, text):
        return [ord(character) for character in "▁" + text.replace(" ", "▁")]


@pytest.mark.parametrize("turn", [("<end>", "{prompt}", "<stop>", "{audio}", "<stop>"), ("{prompt}", "|", "{audio}")])
@pytest.mark.parametrize("frames", [0, 1, 3])
def test_a_silence_in_front_of_the_first_word_does_not_change_it(turn, frames):
    chat = ChatFormat(turn, "<end>", Marked())
    silence = list(range(-frames, 0))
    words = [text for (text,) in chat.pieces(["the", "quick", "fox"])]
    whole = chat.prompt("go", "the quick fox")
    assert [value for value in chat.prompt("go", [*silence, *words]) if value >= 0] == whole
    heard = chat.prompt("go", [*silence, words[0], -9, words[2]])  # the second word as speech
    assert [value for value in heard if value >= 0] == chat.prompt("go", "the fox")


def test_what_differs_between_two_formats_is_said(chat):
    mine = chat.description()
    assert mine == {"turn": ["<user>", "{audio}", "|", "{prompt}"], "end": "<end>"}
    assert chat_difference(None, None) == ""
    for unknown in ("x", {"turn": 5}, {"turn": [], "ends": 7}):
        assert chat_difference(unknown, mine) == chat_difference(None, mine)
    assert "puts a prompt as '<user>{audio}|{prompt}' and ends an answer at '<end>'" in chat_difference(None, mine)
    other = {**mine, "turn": ["<user>", "{audio}", "?", "{prompt}"]}
    assert "first difference is '<user>{audio}?{prompt}' in place of '<user>{audio}|" in chat_difference(other, mine)
    assert "end at '<end>', and those of this model at '<end>' and the tokens 5" in chat_difference(
        mine, {**mine, "ends": [5]}
    )
    assert "join texts differently" in chat_difference(mine, mine)
