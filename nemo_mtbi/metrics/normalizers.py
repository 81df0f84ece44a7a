# SPDX-License-Identifier: Apache-2.0
"""Normalization of text before words are compared."""

import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# First words of the Unicode names of letters that are written without spaces between words.
_UNSPACED = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO"}
_UNSPACED |= {"THAI", "LAO", "MYANMAR", "KHMER", "JAVANESE", "BALINESE"}


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
    text = re.sub(r"(?<![^\W_])'|'(?![^\W_])", " ", text)
    return fold("".join(" " if c != "'" and unicodedata.category(c)[0] in "PS" else c for c in text))


def words(text: str) -> list[str]:
    """Return the words of a text.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese …) each character is one,
    with the marks on it: a whole sentence would be a single word otherwise, which one wrong character makes wrong.
    """
    split: list[str] = []
    for part in text.split():
        if part.isascii():
            split.append(part)
            continue
        started = open_word = False  # the last word may go on with a mark; with any letter of a spaced script
        for character in part:
            continues = open_word and not _is_unspaced(character)
            if continues or (started and unicodedata.category(character)[0] == "M"):
                split[-1] += character
                continue
            split.append(character)
            started, open_word = True, not _is_unspaced(character)
    return split


def without_idle_spaces(text: str) -> str:
    """Return the text without spaces beside characters of scripts that have none between words."""
    parts = text.split()
    if text.isascii():
        return " ".join(parts)
    kept = parts[:1]
    for before, part in zip(parts, parts[1:], strict=False):
        if not _is_unspaced(before[-1]) and not _is_unspaced(part[0]):
            kept.append(" ")
        kept.append(part)
    return "".join(kept)


@cache
def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").partition(" ")[0] in _UNSPACED


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
