# SPDX-License-Identifier: Apache-2.0
"""Conversations that are answered: what they are, and that they are put as in training."""

import numpy as np
import pytest
import torch

from nemo_mtbi.chat.format import ChatFormat, Turn
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.inference.converse import Audio, answer, read_messages
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.testing import tiny_chat, tiny_tokenizer

A, B = {"type": "audio", "audio": "a.wav"}, {"type": "audio", "audio": "b.wav"}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def responder(speech_llm, tmp_path_factory):
    """The tiny model with a chat format that knows further turns."""
    one = tiny_chat(tiny_tokenizer(tmp_path_factory.mktemp("chat")))
    several = ChatFormat(one.turn, one.end, one.tokenizer, more=("{prompt}", "<sep>", "{audio}", "<ans>"))
    return Responder(speech_llm, several, GenerationConfig(max_new_tokens=6))


def sounds(sources):
    """Samples by the name of the file."""
    return [
        torch.from_numpy(np.random.default_rng(ord(name[0])).uniform(-0.1, 0.1, 12000 + 4000 * (name == "b.wav")))
        for name in sources
    ]


def test_messages_are_turns_and_answers():
    found = read_messages([user("say it", A), assistant("red"), {"role": "user", "content": "and now"}])
    assert found.turns == (("say it", Audio("a.wav")), ("and now",)) and found.answers == ("red",)
    assert read_messages([user({"type": "text", "text": "x"}, B)]).turns == (("x", Audio("b.wav")),)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "roles of a conversation are none"),
        ([assistant("x")], "roles of a conversation are assistant"),
        ([user("x"), assistant("y")], "are user, assistant: user and assistant must take turns, from user to user"),
        ([{"role": "system", "content": "x"}, user("x")], "the system prompt of all is model.chat.system"),
        ([user("x"), {"role": "assistant", "content": [A]}, user("y")], "the assistant speaks"),
        ([user({"type": "image", "image": "x"})], "is not the content of a message: give text"),
        ([user(3)], "3 is not the content of a message"),
        (user("x"), "must be a list of messages"),
    ],
)
def test_what_is_no_conversation(messages, message):
    with pytest.raises(ValueError, match=message):
        read_messages(messages)


def test_a_turn_without_anything_said(responder):
    with pytest.raises(ValueError, match="each turn something that the user says"):
        answer(responder, [[user()]], sounds)


def test_a_question_is_the_beginning_of_what_is_trained_on(responder):
    """With the answer behind it, it is the row of the whole conversation."""
    chat, turns = responder.chat, [Turn(((-1, -2), "say it"), "red"), Turn(("and", (-3,), "now"), "cat")]
    layout, labels = chat.conversation(turns)
    asked = chat.question(turns[:1], turns[1].contents)
    assert layout[: len(asked)] == asked
    assert labels[len(asked) - 1 :] == chat.response("cat")
    assert chat.question([], ("say it", (-1, -2))) == chat.prompt("say it", [-1, -2])


def test_single_turns_are_answered_as_prompts(responder):
    found = answer(responder, [[user("say it", A)], [user("count it", B)]], sounds)
    assert found == responder.speech(sounds(["a.wav", "b.wav"]), [("say it", 0), ("count it", 1)])
    (text,) = answer(responder, [[user("say it", "red cat")]], lambda sources: sounds(sources))
    assert isinstance(text, str)


def test_all_turns_and_all_audios_are_heard(responder):
    """Answers are those to the layout made by hand, whatever stands beside it; each audio changes them."""
    conversation = [user("say it", A), assistant("red"), user("first word", B, A)]
    audio = sounds(["a.wav", "b.wav", "a.wav"])
    counts = [responder.model.frame_counter(len(x)) for x in audio]
    frames, bounds = responder.encode(audio), np.cumsum([0, *counts]).tolist()
    runs = [tuple(-(frame + 1) for frame in range(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]
    layout = responder.chat.question([Turn(("say it", runs[0]), "red")], ("first word", runs[1], runs[2]))
    expected = responder.chat.decode(responder.layouts([layout], frames)[0].ids)
    assert answer(responder, [[user("count it", B)], conversation], sounds)[1] == expected
    logits = [states(responder, layout, frames)]
    for changed in range(3):
        other = frames.clone()
        other[bounds[changed] : bounds[changed + 1]] *= -1
        logits.append(states(responder, layout, other))
    assert min((one - logits[0]).abs().max().item() for one in logits[1:]) > 1e-3


def states(responder, layout, frames):
    """The hidden state from which the answer's first token is predicted."""
    from nemo_mtbi.layouts.layout import MicroBatch, make_row

    batch = MicroBatch.from_rows([make_row(layout, [5])], [])
    return torch.cat(responder.model.response_states([batch], frames))


def test_an_llm_of_single_turns_says_so(responder):
    single = Responder(responder.model, tiny_single(responder.chat), responder.config)
    with pytest.raises(ValueError, match="the chat format of this LLM has one: keep to single turns"):
        answer(single, [[user("say it", A), assistant("red"), user("count it")]], sounds)


def tiny_single(chat):
    return ChatFormat(chat.turn, chat.end, chat.tokenizer)


def test_a_model_is_asked(model_section, tmp_path):
    """Files of any rate, and arrays."""
    import soundfile

    from nemo_mtbi.models.mtbi_model import MTBIModel

    model = MTBIModel(model_section(train_ds=None, validation_ds=None)).eval()
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    given = [str(tmp_path / "a.wav"), torch.from_numpy(samples)]
    found = model.converse([[user("say it", {"type": "audio", "audio": audio})] for audio in given])
    assert found == model.generate(given, "say it")
    with pytest.raises(ValueError, match="nothing.wav"):
        model.converse([[user("say it", {"type": "audio", "audio": "nothing.wav"})]])
