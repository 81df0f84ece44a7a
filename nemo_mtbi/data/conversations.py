# SPDX-License-Identifier: Apache-2.0
"""Conversations as training data: several turns, several audios, or none, in NeMo's multimodal and ShareGPT layouts.

NeMo's readers give conversations, Lhotse's samplers want cuts. So a conversation travels in a cut without audio, whose
custom field holds it, and which costs what its row costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lhotse import MonoCut, SupervisionSegment
from lhotse.cut import Cut

from nemo_mtbi.chat.format import ChatFormat, Content, Turn
from nemo_mtbi.data.behaviors import transcript
from nemo_mtbi.layouts.layout import Row, speech

CONVERSATION = "conversation"  # key of the custom field, and name of the task in validation
_SHORTEST = 0.01  # seconds of a cut; one without any would be refused
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Exchange:
    """A turn of the user and its answer.

    Attributes:
        contents: texts and cuts, in order.
        answer: text.
    """

    contents: tuple[str | Cut, ...]
    answer: str


@dataclass(frozen=True)
class Conversation:
    """A conversation between user and assistant.

    Attributes:
        id: for messages.
        exchanges: at least one.
    """

    id: str
    exchanges: tuple[Exchange, ...]

    def cuts(self) -> list[Cut]:
        """Return the audios, in order."""
        return [item for exchange in self.exchanges for item in exchange.contents if not isinstance(item, str)]

    def turns(self, content_of: Callable[[int, Cut], Content]) -> list[Turn]:
        """Return the turns as a chat format takes them.

        Args:
            content_of: gives the content of an audio, by its number and cut.
        """
        turns, number = [], 0
        for exchange in self.exchanges:
            contents: list[Content] = []
            for item in exchange.contents:
                if isinstance(item, str):
                    contents.append(item)
                else:
                    contents.append(content_of(number, item))
                    number += 1
            turns.append(Turn(tuple(contents), exchange.answer))
        return turns


class ConversationCut(MonoCut):
    """A cut in which a conversation travels. It has no audio of its own, so that NeMo finds nothing to resample."""

    def resample(self, *args: Any, **kwargs: Any) -> ConversationCut:
        """Return the cut itself."""
        return self


def conversation_of(cut: Cut) -> Conversation | None:
    """Return the conversation that travels in a cut; ``None`` for an utterance."""
    conversation = (getattr(cut, "custom", None) or {}).get(CONVERSATION)
    return conversation if isinstance(conversation, Conversation) else None


def as_cut(example: Any, sample_rate: int) -> ConversationCut:
    """Return the cut in which one of NeMo's conversations travels.

    Args:
        example: ``NeMoMultimodalConversation``.
        sample_rate: of the encoder, in hertz.

    Raises:
        ValueError: if its turns are not the user's and the assistant's in turn, or one of the assistant is audio.
    """
    conversation = Conversation(str(example.id), tuple(_exchanges(example, sample_rate)))
    duration = max(sum(cut.duration for cut in conversation.cuts()), _SHORTEST)
    words = SupervisionSegment(id=conversation.id, recording_id=conversation.id, start=0.0, duration=duration, text="")
    return ConversationCut(
        id=conversation.id,
        start=0.0,
        duration=duration,
        channel=0,
        supervisions=[words],
        custom={CONVERSATION: conversation},
    )


def _exchanges(example: Any, sample_rate: int) -> Iterator[Exchange]:
    turns = [(turn.role.lower(), getattr(turn, "cut", None) or turn.value) for turn in example.turns]
    unknown = sorted({role for role, _ in turns if role not in _ROLES})
    if unknown:
        raise ValueError(
            f"conversation {example.id} has turns of {', '.join(unknown)}: only user and assistant are trained on; "
            "the system prompt of all is model.chat.system"
        )
    groups = [(role, [item for _, item in group]) for role, group in groupby(turns, lambda turn: _ROLES[turn[0]])]
    if [role for role, _ in groups] != ["user", "assistant"] * (len(groups) // 2) or not groups:
        raise ValueError(f"conversation {example.id} must begin with the user and end with the assistant, in turn")
    for (_, questions), (_, answers) in zip(groups[::2], groups[1::2], strict=True):
        if not all(isinstance(item, str) for item in answers):
            raise ValueError(f"a turn of the assistant in conversation {example.id} is audio: answers are text")
        contents = tuple(item if isinstance(item, str) else item.resample(sample_rate) for item in questions)
        yield Exchange(contents, " ".join(answers))


def conversation_row(
    conversation: Conversation, chat: ChatFormat, frames: Sequence[int], utterance: int | None, twin: bool = False
) -> Row:
    """Return the row of a conversation. Its speech is numbered on through all of its audios.

    Args:
        conversation: the conversation.
        chat: the chat format of the model.
        frames: connector frames of each audio.
        utterance: index of the first audio in the step; ``None`` without audio.
        twin: whether the row gets its text twin, with the transcripts in the place of the audios.

    Raises:
        ValueError: if the format does not have that many turns, or a twin is wanted and a transcript is missing.
    """
    firsts = [sum(frames[:number]) for number in range(len(frames))]
    spoken = conversation.turns(lambda number, cut: tuple(speech(firsts[number], frames[number])))
    layout, labels = chat.conversation(spoken)
    text = None
    if twin and frames:
        silent = [cut.id for cut in conversation.cuts() if not transcript(cut)]
        if silent:
            raise ValueError(
                f"conversation {conversation.id} has no transcript of {silent[0]}, and the loss compares speech with "
                "text: leave such conversations out, or set model.loss.kl_weight and hidden_weight to 0"
            )
        values, predicted = chat.conversation(conversation.turns(lambda number, cut: transcript(cut)))
        text = Row(tuple(values), tuple(predicted))
    return Row(tuple(layout), tuple(labels), utterance, text, len(frames))
