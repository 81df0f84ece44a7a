# SPDX-License-Identifier: Apache-2.0
"""Abstentions: empty answers and refusals."""

import re
import unicodedata

from nemo_mtbi.metrics.normalizers import fold

# How language models refuse, at the start of an answer. English: refusals in other languages count as answers.
_CANNOT = r"(?:can't|cannot|can not|couldn't|could not|(?:am|'m) (?:unable|not able) to|won't be able to)"
_DOING = (
    r"(?:help|assist|hear|listen|transcribe|process|play|access|answer|provide|fulfill|fulfil|comply|complete|understand"
    r"|determine|translate|do (?:that|this)|directly|actually)"
)
_LACKING = r"(?:don't|do not) have (?:the (?:ability|capability|capacity)|access|any audio)"
_SORRY = r"(?:(?:i'm|i am) (?:very |so |really |truly )?sorry[,.]? ?(?:but )?|sorry[,.] ?(?:but )?|unfortunately,? )?"
_REFUSAL = re.compile(
    rf"{_SORRY}(?:i ?{_CANNOT} {_DOING}\b|i {_LACKING}\b|there is no audio\b|no audio\b)"
    r"|as an? (?:ai|artificial intelligence|large language model|language model|text-based)\b"
    r"|i(?:'m| am) (?:just |only )?an? (?:ai|large language model|language model|text-based)\b"
)
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # control and format characters, spaces


def is_empty(answer: str) -> bool:
    """Return whether the answer shows no character at all."""
    return all(c.isspace() or unicodedata.category(c) in _UNSEEN for c in answer)


def is_refusal(answer: str) -> bool:
    """Return whether the answer begins as a language model refuses ("I'm sorry, but I can't hear ...")."""
    return _REFUSAL.match(fold(answer).casefold().replace("’", "'")) is not None


def abstains(answer: str, reference: object = None) -> bool:
    """Return whether the answer is empty or refuses; words of refusal that the reference has too are an answer."""
    if is_empty(answer):
        return True
    texts = [reference] if isinstance(reference, str) else reference if isinstance(reference, (list, tuple)) else []
    return is_refusal(answer) and not any(isinstance(text, str) and is_refusal(text) for text in texts)
