# SPDX-License-Identifier: Apache-2.0
"""What is made equal before words are compared."""

import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def fold(text: str) -> str:
    """Return the text with every run of whitespace as one space and none at the ends."""
    return " ".join(text.split())


def normalize(text: str) -> str:
    """Return the words that word error rate and token F1 compare, with one space between them.

    Unicode NFKC, lower case, and every punctuation mark or symbol (categories P and S) becomes a space, except an
    apostrophe between two letters or digits ("don't" stays one word). Numbers and abbreviations are not rewritten.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = unicodedata.normalize("NFKC", text)  # lower() may decompose a letter
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return fold("".join(" " if c != "'" and unicodedata.category(c)[0] in "PS" else c for c in text))


def squad_normalize(text: str) -> str:
    """Return the text as SQuAD compares it: lower case, no ASCII punctuation, no English article, spaces folded."""
    return fold(_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)))


@cache
def _whisper_english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


@cache
def _whisper_basic() -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer()


# plain: ours, any language. whisper_english: Whisper's, which also rewrites numbers, contractions, titles and British
# spelling and drops fillers and brackets; for English alone. whisper_basic: Whisper's for any other language.
NORMALIZERS: dict[str, Callable[[str], str]] = {
    "plain": normalize,
    "whisper_english": lambda text: fold(_whisper_english()(text)),
    "whisper_basic": lambda text: fold(_whisper_basic()(text)),
    "none": fold,
}


def normalizer(name: str) -> Callable[[str], str]:
    """Return the normalizer of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"unknown normalizer {name!r}: use one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]
