# SPDX-License-Identifier: Apache-2.0
"""Conversations to be answered: several turns, several audios or none, as lists of messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from nemo_mtbi.chat.format import Turn
from nemo_mtbi.inference.generate import check_prompts
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.layouts.layout import speech

Message = Mapping[str, Any]  # role, and content: text, or a list of {type: text, text} and {type: audio, audio}


@dataclass(frozen=True)
class Audio:
    """An audio in a conversation: a path or an array."""

    source: Any


@dataclass(frozen=True)
class OpenConversation:
    """A conversation whose last turn waits for its answer.

    Attributes:
        turns: of the user, each a list of texts and audios in order.
        answers: to all of them but the last.
    """

    turns: tuple[tuple[str | Audio, ...], ...]
    answers: tuple[str, ...]


def read_messages(messages: Sequence[Message]) -> OpenConversation:
    """Return the conversation of messages as chat templates of Hugging Face have them.

    Raises:
        ValueError: if the user and the assistant do not take turns, the user is not the last, or a content is neither
            text nor audio.
    """
    if isinstance(messages, Mapping) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("a conversation must be a list of messages: [{'role': 'user', 'content': ...}, ...]")
    roles = [message.get("role") for message in messages]
    in_turn = roles == [("user", "assistant")[number % 2] for number in range(len(roles))]
    if len(roles) % 2 == 0 or not in_turn:
        raise ValueError(
            f"the roles of a conversation are {', '.join(map(str, roles)) or 'none'}: user and assistant must take "
            "turns, from user to user; the system prompt of all is model.chat.system"
        )
    said = [tuple(_contents(message.get("content"))) for message in messages]
    answers = [" ".join(map(str, contents)) for contents in said[1::2]]
    if any(isinstance(content, Audio) for contents in said[1::2] for content in contents):
        raise ValueError("the assistant speaks in a conversation: answers are text")
    return OpenConversation(tuple(said[::2]), tuple(answers))


def _contents(content: Any) -> Iterator[str | Audio]:
    """Return texts and audios of a message."""
    for item in [content] if isinstance(content, str) else content or ():
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping) and item.get("type") == "text" and isinstance(item.get("text"), str):
            yield item["text"]
        elif isinstance(item, Mapping) and item.get("type") == "audio" and item.get("audio") is not None:
            yield Audio(item["audio"])
        else:
            raise ValueError(
                f"{item!r} is not the content of a message: give text, {{'type': 'text', 'text': ...}} or "
                "{'type': 'audio', 'audio': path or array}"
            )


def answer(
    responder: Responder, conversations: Sequence[Sequence[Message]], load: Callable[[list[Any]], list[Tensor]]
) -> list[str]:
    """Answers to the last turn of each conversation. All audios are encoded once.

    Args:
        responder: the model.
        conversations: lists of messages.
        load: samples ``[n]`` of audios, in order.

    Raises:
        ValueError: for messages that are no conversation, or one that is too long for the LLM.
    """
    parsed = [read_messages(messages) for messages in conversations]
    sources = [item.source for one in parsed for turn in one.turns for item in turn if isinstance(item, Audio)]
    samples = load(sources)
    counts = [responder.speech_llm.frame_counter(len(audio)) for audio in samples]
    slots = iter(speech(first, count) for first, count in zip(accumulate(counts, initial=0), counts, strict=False))
    layouts = []
    for one in parsed:
        turns = [tuple(tuple(next(slots)) if isinstance(x, Audio) else x for x in turn) for turn in one.turns]
        answered = [Turn(*pair) for pair in zip(turns[:-1], one.answers, strict=True)]
        layouts.append(responder.chat.question(answered, turns[-1]))
    check_prompts(responder.model, layouts, sum(counts), responder.config)
    frames = responder.encode(samples) if samples else None
    return [responder.chat.decode(generated.ids) for generated in responder.layouts(layouts, frames)]
