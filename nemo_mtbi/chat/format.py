# SPDX-License-Identifier: Apache-2.0
"""Chat formats: the order of prompt, speech and answer in a sequence, and the tokens between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from nemo_mtbi.layouts.layout import IGNORE

PROMPT, AUDIO = "{prompt}", "{audio}"
Content = str | tuple[int | str, ...]  # text, or layout values of speech, with texts between them
# Formats that put these into a prompt as they did before texts were joined keep their fingerprint.
_PROBES = [("What is this?", f"The quick brown fox{mark}") for mark in ("", ".", "!", "?")]


class Tokenizer(Protocol):
    """Methods of a tokenizer that chat formats use: NeMo's ``TokenizerSpec`` and our ``HFTokenizer`` have them."""

    def token_to_id(self, token: str, /) -> int | None:
        """Return the id of a token of the vocabulary, by its exact name."""
        ...

    def text_to_ids(self, text: str, /) -> list[int]:
        """Return the token ids of a text."""
        ...

    def ids_to_text(self, ids: list[int], /) -> str:
        """Return the text of tokens."""
        ...


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation.

    Attributes:
        contents: the user's texts and speech, in order; at least one.
        answer: text of the assistant.
    """

    contents: tuple[Content, ...]
    answer: str


@dataclass(frozen=True)
class ChatFormat:
    """Chat format of an LLM: one user turn and the opening of the answer, as a list of parts.

    Attributes:
        turn: each part is the slot ``{prompt}``, the slot ``{audio}``, a token of the vocabulary (its exact name, such
            as ``<|im_start|>``) or literal text.
        end: the token that ends an answer.
        more: parts of each further turn, from behind ``end`` on; empty where the LLM knows single turns only.
        tokenizer: any NeMo ``TokenizerSpec``, or a :class:`nemo_mtbi.chat.hf_tokenizer.HFTokenizer`.
        ends: ids of further tokens at which the LLM ends an answer; none of them is a training label.
        single: why ``more`` is empty, for messages.

    Raises:
        ValueError: if a slot is missing or stands twice, or ``end`` is not one token of the vocabulary.
    """

    turn: tuple[str, ...]
    end: str
    tokenizer: Tokenizer
    more: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    single: str = field(default="", compare=False)

    def __post_init__(self):
        for parts in (self.turn, *([self.more] if self.more else [])):
            for slot in (PROMPT, AUDIO):
                if list(parts).count(slot) != 1:
                    raise ValueError(f"the chat format {list(parts)} must hold {slot} exactly once")
        if self._token(self.end) is None:
            raise ValueError(f"the chat format ends with {self.end!r}, which is not a token of the LLM's vocabulary")
        object.__setattr__(self, "ends", tuple(sorted({*self.ends} - {self.end_id})))

    def _token(self, text: str) -> int | None:
        """Return the id of ``text`` if it is one token of the vocabulary."""
        index = self.tokenizer.token_to_id(text)
        unknown = getattr(self.tokenizer, "unk_id", None)
        return None if index is None or index == unknown else int(index)

    @property
    def end_id(self) -> int:
        """Id of the token that is the label at the end of an answer."""
        index = self._token(self.end)
        if index is None:  # checked when the format was made
            raise ValueError(f"{self.end!r} is not a token of the LLM's vocabulary any more")
        return index

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of all tokens at which an answer of the LLM ends."""
        return (self.end_id, *self.ends)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text. Empty text has no tokens."""
        return [int(i) for i in self.tokenizer.text_to_ids(text)] if text else []

    def encode_after(self, text: str) -> list[int]:
        """Return the token ids of text that continues other text or speech.

        SentencePiece marks the beginning of a text as that of a word, and some mark a space there twice. So the text
        is encoded behind a character with which it shares no token, whose tokens are taken off again.
        """
        if not text:
            return []
        for before in "a.\n":
            lead, whole = self.encode(before), self.encode(before + text)
            if whole[: len(lead)] == lead:
                return whole[len(lead) :]
        return self.encode(text)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return token ids word by word; their concatenation is the text with single spaces."""
        return [self.encode(word) if i == 0 else self.encode_after(" " + word) for i, word in enumerate(words)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer; the end token is left out."""
        end = self.end_id
        return self.tokenizer.ids_to_text([int(i) for i in ids if i != end]).strip()

    def pieces(self, words: Sequence[str]) -> list[list[str]]:
        """Return the text word by word, with the spaces between; an empty list for a word without tokens."""
        texts = [word if number == 0 else " " + word for number, word in enumerate(words)]
        return [[text] if ids else [] for text, ids in zip(texts, self.encode_words(words), strict=True)]

    def prompt(self, prompt: str, audio: str | Sequence[int | str]) -> list[int]:
        """Return the layout of a turn.

        Args:
            prompt: text of the instruction.
            audio: text in the place of speech, speech values, or both in order. Text is encoded together with the
                text beside it, as the LLM's own template does; so are token ids that are the encoding of a text.
        """
        return self._turn(prompt, audio if isinstance(audio, str) else tuple(audio))

    def _turn(self, prompt: str, audio: Content, apart: bool = False) -> list[int]:
        contents = {PROMPT: prompt, AUDIO: audio}
        return self._layout(self.turn, [contents[part] for part in self.turn if part in contents], apart)

    def conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Return layout and labels of a whole conversation: every answer is predicted, from all that was before it.

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
        """Return the layout of a conversation up to where the next answer begins.

        Args:
            turns: the exchanges before.
            contents: the texts and speech of the user's new turn.

        Raises:
            ValueError: as :meth:`conversation`.
        """
        *earlier, last = self._prompts([*(turn.contents for turn in turns), contents])
        answered = (prompt + self.response(turn.answer) for prompt, turn in zip(earlier, turns, strict=True))
        return [value for part in (*answered, last) for value in part]

    def _prompts(self, turns: Sequence[Sequence[Content]]) -> list[list[int]]:
        """Return the layout of the user's part of each turn."""
        if not turns or not all(turns):
            raise ValueError("a conversation needs turns, and each turn something that the user says")
        if len(turns) > 1 and not self.more:
            raise ValueError(
                f"a conversation has {len(turns)} turns, but the chat format of this LLM has one: keep to single "
                "turns, or set model.chat={format: …} to a format that has more"
                + (f" ({self.single})" if self.single else "")
            )
        return [self._layout(self.more if number else self.turn, turn) for number, turn in enumerate(turns)]

    def _layout(self, parts: Sequence[str], contents: Sequence[Content], apart: bool = False) -> list[int]:
        """Return the layout of a turn: its parts, with contents in the place of the slots.

        Args:
            parts: of the turn.
            contents: in order.
            apart: whether text that stands for speech, and text behind a token, is encoded alone, as it once was.
        """
        # 1. List the items in order, each with its kind: text, token or speech. What stands between the two slots of
        # the format stands between any two contents.
        first, second = (index for index, part in enumerate(parts) if part in (PROMPT, AUDIO))
        between = [self._item(part) for part in parts[first + 1 : second]]
        items = [self._item(part) for part in parts[:first]]
        for number, content in enumerate(contents):
            items += between if number else []
            items += self._items(content, items[-1][0] if items else "", apart)
        items += [self._item(part) for part in parts[second + 1 :]]
        # 2. Encode texts beside each other together, as the LLM's tokenizer does.
        layout: list[int] = []
        behind = ""
        for kind, group in groupby(items, lambda item: item[0]):
            values = [value for _, value in group]
            if kind == "begin":
                behind = values[0]
                continue
            if kind == "text":
                values = self._encode_behind("".join(values), "" if apart and behind == "token" else behind)
            layout += values
            behind = kind
        return layout

    def _encode_behind(self, text: str, behind: str) -> list[int]:
        """Return the token ids of text behind ``speech`` or ``text``, behind a ``token`` or at the beginning."""
        goes_on = behind in ("speech", "text") or (
            behind == "token" and not getattr(self.tokenizer, "restarts_after_token", True)
        )
        return self.encode_after(text) if goes_on else self.encode(text)

    def _items(self, content: Content, before: str, apart: bool) -> Iterator[tuple[str, Any]]:
        """Yield the content of a slot as (kind, value): texts, and values of the layout.

        A text that begins the transcript has the tokens of the transcript's beginning behind frames of silence, too:
        an item ``begin`` in front of it says what stands before the slot.

        Args:
            content: of the slot.
            before: kind of what stands in front of the slot.
            apart: see :meth:`_layout`.
        """
        if isinstance(content, str):
            yield "text", content
            return
        ids = [value for value in content if isinstance(value, int) and value >= 0]
        if content and not apart and len(ids) == len(content):  # token ids alone
            text = self.tokenizer.ids_to_text(ids)
            if self.encode(text) == ids:
                yield "text", text
                return
        for index, value in enumerate(content):
            if index and isinstance(value, str) and isinstance(content[index - 1], int) and value[:1] != " ":
                yield "begin", before
            yield "text" if isinstance(value, str) else "speech", value

    def _item(self, part: str) -> tuple[str, Any]:
        """Return a part of the format as (kind, value): a token of the vocabulary, or text."""
        token = self._token(part)
        return ("text", part) if token is None else ("token", token)

    def response(self, text: str, truncated: bool = False, ids: Sequence[int] | None = None) -> list[int]:
        """Return the token ids of an answer with the end token, which a truncated answer does not have.

        Args:
            text: the answer.
            truncated: it was cut by the length limit.
            ids: the tokens that the LLM gave; ``text`` is encoded where they do not decode to it.
        """
        given = list(ids or ())
        if given and given[-1] in self.end_ids:  # as some servers give them
            given.pop()
        if not self.decodes_to(given, text):
            given = self._encode_behind(text, self._item(self.turn[-1])[0])
        return given if truncated else [*given, self.end_id]

    def decodes_to(self, ids: Sequence[int], text: str) -> bool:
        """Return whether ids are tokens of the vocabulary, without an end token, that decode to an answer."""
        size = getattr(self.tokenizer, "vocab_size", None)
        ends = {*self.end_ids}
        if not ids or any(i < 0 or i in ends or (size is not None and i >= size) for i in ids):
            return False
        try:
            return self.decode(ids) == text
        except (ValueError, IndexError, OverflowError):  # what libraries raise for an id that they do not know
            return False

    def description(self) -> dict[str, Any]:
        """Return the content that :meth:`fingerprint` hashes, for messages."""
        return {"turn": list(self.turn), "end": self.end, **({"ends": list(self.ends)} if self.ends else {})}

    def fingerprint(self) -> str:
        """Return the hash of what makes a prompt and an answer: targets of another format are another behavior.

        A format whose prompts and answers are what they always were keeps the hash of its parts and its end token.
        """
        content: list[Any] = [*self.turn, self.end]
        content += [{"ends": list(self.ends)}] if self.ends else []
        if any(self.prompt(*probe) != self._turn(probe[0], tuple(self.encode(probe[1])), True) for probe in _PROBES):
            content.append({"text": "joined"})
        return _hash(content)


def chat_difference(then: Any, now: Mapping[str, Any] | None, fingerprint: Any = None) -> str:
    """Return a sentence on the difference of two chat formats.

    Args:
        then: what :meth:`ChatFormat.description` gave; anything else counts as unknown.
        now: what it gives; ``None``: unknown.
        fingerprint: of the format that ``then`` describes, which says something where ``then`` is unknown.

    Returns:
        A sentence, or nothing if nothing is known.
    """
    if not now:
        return ""
    known = isinstance(then, Mapping) and isinstance(then.get("turn"), list) and isinstance(then.get("ends", []), list)
    then = then if known else None
    shown = {name: "".join(map(str, form.get("turn", ()))) for name, form in (("then", then or {}), ("now", now))}
    if not then and fingerprint == _hash([*now["turn"], now["end"]]):
        return (
            f"Both are put as {shown['now']!r}, but theirs by an older version, which ended answers at {now['end']!r} "
            f"alone and encoded the transcript apart from the prompt; this one ends them at {_ends(now)}, and joins "
            "the transcript as the LLM's template joins it."
        )
    if not then:
        return (
            f"This model puts a prompt as {shown['now']!r} and ends an answer at {_ends(now)}; how theirs was put was "
            "not written down: another text, another place of the speech, or another end token."
        )
    if shown["then"] != shown["now"]:
        pair = zip(shown["then"], shown["now"], strict=False)
        at = next((n for n, (a, b) in enumerate(pair) if a != b), min(map(len, shown.values())))
        pieces = {name: text[max(at - 20, 0) : at + 60] for name, text in shown.items()}
        return (
            f"They were made with {shown['then']!r}, and this model uses {shown['now']!r}; the first difference "
            f"is {pieces['then']!r} in place of {pieces['now']!r}."
        )
    if _ends(then) != _ends(now):
        return f"Their answers end at {_ends(then)}, and those of this model at {_ends(now)}."
    return f"Both are put as {shown['now']!r}, but by tokenizers that join texts differently."


def _hash(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _ends(form: Mapping[str, Any]) -> str:
    """Return the end tokens of a format, for messages."""
    ids = form.get("ends", ())
    return repr(form.get("end")) + (f" and the tokens {', '.join(map(str, ids))}" if ids else "")
