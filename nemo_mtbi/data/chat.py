# SPDX-License-Identifier: Apache-2.0
"""Chat formats: where the prompt, the speech and the answer stand in a sequence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

PROMPT, AUDIO = "{prompt}", "{audio}"


@dataclass(frozen=True)
class ChatFormat:
    """One user turn and the opening of the answer, as a list of parts.

    Attributes:
        turn: each part is the slot ``{prompt}``, the slot ``{audio}``, a token of the vocabulary (its exact name, such
            as ``<|im_start|>``) or literal text.
        end: the token that ends an answer.
        tokenizer: any NeMo ``TokenizerSpec`` (``text_to_ids``, ``ids_to_text``, ``token_to_id``), or a
            :class:`nemo_mtbi.data.hf_tokenizer.HFTokenizer`.

    Raises:
        ValueError: if a slot is missing or stands twice, or ``end`` is not one token of the vocabulary.
    """

    turn: tuple[str, ...]
    end: str
    tokenizer: object

    def __post_init__(self):
        for slot in (PROMPT, AUDIO):
            if list(self.turn).count(slot) != 1:
                raise ValueError(f"the chat format {list(self.turn)} must hold {slot} exactly once")
        if self._token(self.end) is None:
            raise ValueError(f"the chat format ends with {self.end!r}, which is no token of the LLM's vocabulary")

    def _token(self, text: str) -> int | None:
        """The id of ``text`` where it is one token of the vocabulary."""
        index = self.tokenizer.token_to_id(text)
        unknown = getattr(self.tokenizer, "unk_id", None)
        return None if index is None or index == unknown else int(index)

    def _kind(self, part: str) -> str:
        """What a part is: ``{audio}``, ``token`` or ``text``."""
        if part == AUDIO:
            return AUDIO
        return "token" if part != PROMPT and self._token(part) is not None else "text"

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
        layout: list[int] = []
        heard = False
        for kind, parts in groupby(self.turn, self._kind):
            if kind == AUDIO:
                layout += audio
            elif kind == "token":
                layout += [self._token(part) for part in parts]
            else:  # texts beside each other are encoded together, as the tokenizer of the LLM has always seen them
                text = "".join(prompt if part == PROMPT else part for part in parts)
                layout += self.encode_after(text) if heard else self.encode(text)
            heard = kind == AUDIO
        return layout

    def response(self, text: str, truncated: bool = False) -> list[int]:
        """Token ids of an answer with the end token; a truncated answer teaches no end."""
        ids = self.encode(text)
        return ids if truncated else [*ids, self.end_id]

    def fingerprint(self) -> str:
        """Hash of the parts and the end token: targets made with another format are another behavior."""
        return hashlib.sha256(json.dumps([*self.turn, self.end]).encode()).hexdigest()
