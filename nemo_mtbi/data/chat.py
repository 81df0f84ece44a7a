# SPDX-License-Identifier: Apache-2.0
"""Chat formats: where prompts, speech and answers stand in a sequence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nemo_mtbi.data.layout import IGNORE

PROMPT, AUDIO = "{prompt}", "{audio}"
Content = str | tuple[int, ...]  # text, or layout values of speech


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation.

    Attributes:
        contents: what the user gives, in order; at least one.
        answer: what is answered.
    """

    contents: tuple[Content, ...]
    answer: str


@dataclass(frozen=True)
class ChatFormat:
    """One user turn and the opening of the answer, as a list of parts.

    Attributes:
        turn: each part is the slot ``{prompt}``, the slot ``{audio}``, a token of the vocabulary (its exact name, such
            as ``<|im_start|>``) or literal text.
        end: the token that ends an answer.
        more: the same for each further turn, from behind ``end`` on; empty where the LLM knows single turns only.
        tokenizer: any NeMo ``TokenizerSpec`` (``text_to_ids``, ``ids_to_text``, ``token_to_id``), or a
            :class:`nemo_mtbi.data.hf_tokenizer.HFTokenizer`.

    Raises:
        ValueError: if a slot is missing or stands twice, or ``end`` is not one token of the vocabulary.
    """

    turn: tuple[str, ...]
    end: str
    tokenizer: object
    more: tuple[str, ...] = ()

    def __post_init__(self):
        for parts in (self.turn, *([self.more] if self.more else [])):
            for slot in (PROMPT, AUDIO):
                if list(parts).count(slot) != 1:
                    raise ValueError(f"the chat format {list(parts)} must hold {slot} exactly once")
        if self._token(self.end) is None:
            raise ValueError(f"the chat format ends with {self.end!r}, which is no token of the LLM's vocabulary")

    def _token(self, text: str) -> int | None:
        """The id of ``text`` where it is one token of the vocabulary."""
        index = self.tokenizer.token_to_id(text)
        unknown = getattr(self.tokenizer, "unk_id", None)
        return None if index is None or index == unknown else int(index)

    @property
    def end_id(self) -> int:
        return self._token(self.end)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Empty text has no tokens."""
        return [int(i) for i in self.tokenizer.text_to_ids(text)] if text else []

    def encode_after(self, text: str) -> list[int]:
        """Token ids of text that continues other text or speech.

        SentencePiece marks the beginning of a text as that of a word, and some mark a space there twice. So the text
        is encoded behind a character that it does not melt into, whose tokens are taken off again.
        """
        if not text:
            return []
        for before in "a.\n":
            lead, whole = self.encode(before), self.encode(before + text)
            if whole[: len(lead)] == lead:
                return whole[len(lead) :]
        return self.encode(text)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids word by word, such that their concatenation is the text with single spaces."""
        return [self.encode(word) if i == 0 else self.encode_after(" " + word) for i, word in enumerate(words)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer; the end token is left out."""
        end = self.end_id
        return self.tokenizer.ids_to_text([int(i) for i in ids if i != end]).strip()

    def prompt(self, prompt: str, audio: Sequence[int]) -> list[int]:
        """Layout of a turn: ``audio`` holds speech values, token ids, or both (interleaved)."""
        contents = {PROMPT: prompt, AUDIO: tuple(audio)}
        return self._layout(self.turn, [contents[part] for part in self.turn if part in contents])

    def conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Layout and labels of a whole conversation: every answer is predicted, from all that was before it.

        Contents of a turn stand in their order, with what this format puts between prompt and speech between them.

        Raises:
            ValueError: if there is no turn, one without contents, or the LLM knows no further turns.
        """
        values: list[int] = []
        labels: list[int] = []
        for prompt, turn in zip(self._prompts([turn.contents for turn in turns]), turns, strict=True):
            answer = self.response(turn.answer)
            values += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
        return values[:-1], labels[1:]

    def question(self, turns: Sequence[Turn], contents: Sequence[Content]) -> list[int]:
        """Layout of a conversation up to where the next answer begins.

        Args:
            turns: that have been answered.
            contents: what the user gives now.

        Raises:
            ValueError: as :meth:`conversation`.
        """
        *earlier, last = self._prompts([*(turn.contents for turn in turns), contents])
        answered = (prompt + self.response(turn.answer) for prompt, turn in zip(earlier, turns, strict=True))
        return [value for part in (*answered, last) for value in part]

    def _prompts(self, turns: Sequence[Sequence[Content]]) -> list[list[int]]:
        """Layout of what the user gives in each turn."""
        if not turns or not all(turns):
            raise ValueError("a conversation needs turns, and each turn something that the user says")
        if len(turns) > 1 and not self.more:
            raise ValueError(
                f"a conversation has {len(turns)} turns, but the chat format of this LLM has one: keep to single "
                "turns, or set model.chat={format: …} to a format that has more"
            )
        return [self._layout(self.more if number else self.turn, turn) for number, turn in enumerate(turns)]

    def _layout(self, parts: Sequence[str], contents: Sequence[Content]) -> list[int]:
        """The parts of a turn with its contents in the place of the slots."""
        first, second = (index for index, part in enumerate(parts) if part in (PROMPT, AUDIO))
        between = [self._item(part) for part in parts[first + 1 : second]]
        items = [self._item(part) for part in parts[:first]]
        for number, content in enumerate(contents):
            items += between if number else []
            items.append(("text" if isinstance(content, str) else "speech", content))
        items += [self._item(part) for part in parts[second + 1 :]]
        layout: list[int] = []
        heard = False
        for kind, group in groupby(items, lambda item: item[0]):
            found = [value for _, value in group]
            if kind == "text":  # texts beside each other are encoded together, as the LLM's tokenizer saw them
                layout += self.encode_after("".join(found)) if heard else self.encode("".join(found))
            elif kind == "token":
                layout += found
            else:
                layout += [value for values in found for value in values]
            heard = kind == "speech"
        return layout

    def _item(self, part: str) -> tuple[str, Any]:
        """A part of the format: a token of the vocabulary, or text."""
        token = self._token(part)
        return ("text", part) if token is None else ("token", token)

    def response(self, text: str, truncated: bool = False) -> list[int]:
        """Token ids of an answer with the end token; a truncated answer teaches no end."""
        ids = self.encode(text)
        return ids if truncated else [*ids, self.end_id]

    def fingerprint(self) -> str:
        """Hash of the parts and the end token: targets made with another format are another behavior."""
        return hashlib.sha256(json.dumps([*self.turn, self.end]).encode()).hexdigest()
