# SPDX-License-Identifier: Apache-2.0
"""Chat formats of LLMs that bring a template, and those that NeMo knows by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemo_mtbi.chat.format import AUDIO, PROMPT, ChatFormat, Turn
from nemo_mtbi.chat.hf_tokenizer import HFTokenizer
from nemo_mtbi.chat.template_process import DATE
from nemo_mtbi.config.chat import ChatConfig

ANSWER = "{answer}"
_PLACES = {"after": (PROMPT, AUDIO), "before": (AUDIO, PROMPT)}  # of ChatConfig.audio
# Conversations on which a format is compared with its template: prompt and words of each turn, and the answer before.
_PROBES = (("What is this?", "the quick fox"), ("Say it again!", "she sells 12"), ("Count.", "lazy dogs"))
_ANSWERS = ("12 birds", "No, a fox.")
_FIXED: dict[str, Any] = {"date_string": DATE.strftime("%d %b %Y")}
Render = Callable[[Sequence[dict[str, str]], bool], str]


def chat_format(tokenizer: Any, config: ChatConfig, ends: Iterable[int] = ()) -> ChatFormat:
    """Return the chat format of an LLM.

    Args:
        tokenizer: a :class:`HFTokenizer`, or with ``config.format`` any of NeMo's.
        config: the section ``model.chat``.
        ends: ids at which the LLM ends an answer, beside those of format and tokenizer.

    Raises:
        ValueError: if there is no such format, it has no place for the system prompt, its tokens are not the
            tokenizer's, or its parts do not give the template's own ids.
    """
    messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    user = {"role": "user", "content": config.separator.join(_PLACES[config.audio])}
    messages.append(user)
    render = _by_formatter(config.format, tokenizer) if config.format else _by_template(tokenizer, config.options)
    # 1. Let the template render a turn and an answer with slots in place of their contents.
    question = render(messages, True)
    answer = {"role": "assistant", "content": ANSWER}
    answered = render([*messages, answer], False)
    checks: tuple[tuple[str, tuple[str, ...]], ...] = ((question, (PROMPT, AUDIO)), (answered, (ANSWER,)))
    for text, slots in checks:
        missing = [slot for slot in slots if text.count(slot) != 1]
        if missing:
            raise ValueError(f"the chat format must say {' and '.join(missing)} exactly once, but gives {text!r}")
    if (config.system or "").strip() not in question:
        raise ValueError(f"the chat format has no place for model.chat.system: it gives {question!r}; leave it out")
    # 2. Split what it renders at slots and control tokens.
    control = control_tokens(tokenizer)
    end = _end(answered, control, tokenizer)
    more, single = _further(render, [*messages, answer, user], control, end)
    parts, more = _as_tokenized(_split(question, control), tokenizer, control), more and (end, *more)
    more = _as_tokenized(more, tokenizer, control)[1:]
    chat = ChatFormat(parts, end, tokenizer, more, (*ends, *end_of_text(tokenizer)), single)
    # 3. Compare with the template on conversations of one, two and three turns.
    difference = _difference(chat, render, messages[:-1], config, 1)
    if difference:
        raise ValueError(f"the chat format can't be put together from parts: {difference}")
    if more:
        single = _difference(chat, render, messages[:-1], config, 2) or _difference(
            chat, render, messages[:-1], config, 3
        )
    return replace(chat, more=(), single=f"its template can't be split into turns: {single}") if single else chat


def end_of_text(tokenizer: Any) -> tuple[int, ...]:
    """Return the id of the token that the tokenizer names as the end of a text, if there is one."""
    index = tokenizer.end_id if isinstance(tokenizer, HFTokenizer) else tokenizer.tokenizer.eos_id()
    return () if index is None or index < 0 else (int(index),)


def _further(
    render: Render, messages: Sequence[dict[str, str]], control: Sequence[str], end: str
) -> tuple[Sequence[str], str]:
    """Return the parts of a further turn, from behind the end of an answer on, or why there are none."""
    try:
        rendered = render(messages, True)
    except ValueError as error:
        return (), str(error)
    _, *rest = rendered.split(ANSWER)
    first, *parts = _split(rest[0], control) if len(rest) == 1 else [""]
    if first == end and all(parts.count(slot) == 1 for slot in (PROMPT, AUDIO)):
        return parts, ""
    return (), f"a conversation of two turns is {rendered!r}"


def _as_tokenized(parts: Sequence[str], tokenizer: Any, control: Sequence[str]) -> tuple[str, ...]:
    """Return the parts without the white space that control tokens beside it take out of a text."""
    kept = list(parts)
    for index, part in enumerate(kept):
        if part not in control or not isinstance(tokenizer, HFTokenizer):
            continue
        before, behind = tokenizer.strips(part)
        if before and index and kept[index - 1] not in control:
            kept[index - 1] = kept[index - 1].rstrip()
        if behind and index + 1 < len(kept) and kept[index + 1] not in control:
            kept[index + 1] = kept[index + 1].lstrip()
    return tuple(part for part in kept if part)


def _difference(
    chat: ChatFormat, render: Render, system: Sequence[dict[str, str]], config: ChatConfig, turns: int
) -> str:
    """Return how a conversation of some turns differs from what the LLM's template gives; empty if it does not."""
    messages, order = list(system), _PLACES[config.audio]
    contents = []
    for number, (prompt, words) in enumerate(_PROBES[:turns]):
        said = tuple({PROMPT: prompt, AUDIO: words}[slot] for slot in order)
        contents.append(said)
        messages += [{"role": "assistant", "content": _ANSWERS[number - 1]}] if number else []
        messages.append({"role": "user", "content": config.separator.join(said)})
    try:
        wanted = render(messages, True)
    except ValueError as error:
        return str(error)
    answered = [Turn(*pair) for pair in zip(contents[:-1], _ANSWERS, strict=False)]
    if isinstance(chat.tokenizer, HFTokenizer):
        same = chat.question(answered, contents[-1]) == chat.tokenizer.rendered_to_ids(wanted)
    else:  # there is no tokenizer of whole conversations: the texts are compared
        slots = [dict(zip(order, said, strict=True)) for said in contents]
        forms = [chat.turn, *[chat.more] * (turns - 1)]
        shown = ["".join(said.get(part, part) for part in form) for form, said in zip(forms, slots, strict=True)]
        joints = [f"{answer}{chat.end}" for answer in _ANSWERS[: turns - 1]]
        same = wanted == "".join(piece for pair in zip(shown, [*joints, ""], strict=True) for piece in pair)
    return "" if same else f"{wanted!r} is not what the parts {list(chat.turn)} and {list(chat.more)} give"


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the names of the tokens that are not text."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.control_tokens
    pieces = tokenizer.tokenizer  # NeMo's SentencePieceTokenizer
    return tuple(pieces.id_to_piece(i) for i in range(len(pieces)) if pieces.is_control(i))


def _split(text: str, control: Iterable[str]) -> list[str]:
    """Return the parts of a rendered turn: slots, control tokens and texts."""
    names = sorted({PROMPT, AUDIO, *control}, key=len, reverse=True)  # the longest that fits
    return [part for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if part]


def _end(answered: str, control: Sequence[str], tokenizer: Any) -> str:
    """Return the token that ends an answer: the first one behind it."""
    rest = answered.split(ANSWER)[1]
    token = next((part for part in _split(rest, control) if part in control), None)
    token = token or rest.strip() or _sentence_marks(tokenizer)[1]
    if not token:
        raise ValueError("neither the chat format nor the tokenizer has a token that ends an answer")
    return token  # ChatFormat refuses what is not a token


def _by_template(tokenizer: Any, options: Mapping[str, Any]) -> Render:
    """Return the rendering by the tokenizer's own template."""
    if not isinstance(tokenizer, HFTokenizer):
        raise ValueError(
            "a SentencePiece tokenizer has no chat template: name a prompt format, as in model.chat={format: llama2}"
        )
    return lambda messages, generation: tokenizer.render(messages, generation, {**_FIXED, **options})


def _by_formatter(name: str, tokenizer: Any) -> Render:
    """Return the rendering by one of NeMo's prompt formatters."""
    from nemo.collections.common.prompts import PromptFormatter
    from nemo.collections.common.prompts.formatter import BOS_SLOT, EOS_SLOT

    try:
        formatter = PromptFormatter.resolve(name)
    except RuntimeError as error:
        raise ValueError(f"model.chat.format: {error}") from error
    roles = formatter.get_roles()
    first, last = _sentence_marks(tokenizer)

    def say(role: str, *contents: str) -> str:
        if role not in roles or len(formatter.get_slots(role)) != len(contents):
            raise ValueError(f"NeMo's prompt format {name} has no plain {role} turn: choose another model.chat.format")
        text = formatter.get_template(role)
        for slot, content in zip(formatter.get_slots(role), contents, strict=True):
            text = text.replace(f"|{slot.strip('|')}|", content)
        return text

    def render(messages: Sequence[dict[str, str]], generation: bool) -> str:
        turns: list[tuple[str, ...]] = [(message["role"], message["content"]) for message in messages]
        if turns[0][0] == "system" and "system_and_user" in roles:  # Llama 2 says both in one turn
            turns[:2] = [("system_and_user", turns[0][1], turns[1][1])]
        text = first if formatter.INSERT_BOS else ""
        text += say("preamble") if "preamble" in roles else ""
        text += "".join(say(*turn) for turn in turns)
        text += formatter.INFERENCE_PREFIX or "" if generation else ""
        return text.replace(BOS_SLOT, first).replace(EOS_SLOT, last)

    return render


def _sentence_marks(tokenizer: Any) -> tuple[str, str]:
    """Return the names of the tokens that begin and end a text; empty where there is none."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.begin or "", tokenizer.end or ""
    pieces = tokenizer.tokenizer
    begin, end = (pieces.id_to_piece(i) if i >= 0 else "" for i in (pieces.bos_id(), pieces.eos_id()))
    return begin, end
