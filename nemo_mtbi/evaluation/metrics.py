# SPDX-License-Identifier: Apache-2.0
"""Scores of one answer or of a corpus: pure functions of strings.

Every scorer takes ``(reference, hypothesis)`` and returns a float from 0 to 1, where 1 means right. A malformed
hypothesis scores 0. A reference that breaks the format of its own scoring kind is a fault of the data and raises
``ValueError``, since every hypothesis would score 0 against it in silence.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jiwer

_BULLET = re.compile(r"\s*[-*•]\s+(\S.*)")
_QUOTES = {'"': '"', "“": "”"}
# What may stand around a label without making it another label. No dash or plus: "-1" is not "1".
_LABEL_EDGES = " .,;:!?\"'“”‘’()[]*`"


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


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return the word error rate of a corpus: all edits divided by all reference words, both sides normalized.

    An utterance whose reference is empty adds its hypothesis words as insertions and nothing to the divisor. Without
    any reference word in the whole corpus the number of insertions is divided by 1. Insertions can lift it above 1.

    Raises:
        ValueError: the two lists differ in length or are empty.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references but {len(hypotheses)} hypotheses: pass one of each per utterance"
        )
    if not references:
        raise ValueError("word error rate of no utterances is undefined: pass at least one")
    pairs = [(normalize(r), normalize(h)) for r, h in zip(references, hypotheses, strict=True)]
    # jiwer before 4.0 refuses empty references, so they are counted here.
    errors = sum(len(h.split()) for r, h in pairs if not r)
    words = sum(len(r.split()) for r, _ in pairs)
    spoken = [(r, h) for r, h in pairs if r]
    if spoken:
        edits = jiwer.process_words([r for r, _ in spoken], [h for _, h in spoken])
        errors += edits.substitutions + edits.deletions + edits.insertions
    return errors / max(1, words)


def exact(reference: str, hypothesis: str) -> float:
    """Return 1 if the two texts are equal after folding whitespace (case and punctuation count), else 0."""
    return float(fold(reference) == fold(hypothesis))


def token_f1(reference: str, hypothesis: str) -> float:
    """Return the F1 of the two bags of normalized words (as in SQuAD, but articles count); order does not matter.

    Texts without any word are compared by :func:`exact`.
    """
    ref, hyp = normalize(reference).split(), normalize(hypothesis).split()
    if not ref and not hyp:
        return exact(reference, hypothesis)
    overlap = sum((Counter(ref) & Counter(hyp)).values())
    return 2 * overlap / (len(ref) + len(hyp))


def word_accuracy(reference: str, hypothesis: str) -> float:
    """Return ``1 - min(1, WER)`` of one utterance."""
    return 1.0 - min(1.0, wer([reference], [hypothesis]))


def label(reference: str, hypothesis: str) -> float:
    """Return 1 if the answer is the label and nothing else; case and punctuation around it do not matter."""
    return float(_bare_label(reference) == _bare_label(hypothesis))


def json_equal(reference: str, hypothesis: str) -> float:
    """Return 1 if the answer parses as JSON and equals the reference value; key order and spacing do not matter.

    ``NaN``, ``Infinity`` and a repeated key are no JSON here. ``true`` is not ``1``, but ``1.0`` is ``1``.

    Raises:
        ValueError: the reference is not JSON.
    """
    try:
        expected = _parse_json(reference)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the reference of a task scored by 'json' must be JSON, got {reference!r}") from error
    try:
        got = _parse_json(hypothesis)
    except (ValueError, RecursionError):
        return 0.0
    return float(_same_json(expected, got))


def quotes(reference: str, hypothesis: str) -> float:
    """Return 1 if the whole answer stands in one pair of double quotes (straight or curly) and the content is equal.

    Raises:
        ValueError: the reference is not in double quotes.
    """
    expected = _unquote(reference)
    if expected is None:
        raise ValueError(f"the reference of a task scored by 'quotes' must stand in double quotes, got {reference!r}")
    return float(_unquote(hypothesis) == expected)


def upper(reference: str, hypothesis: str) -> float:
    """Return 1 if the answer is the reference in capital letters; the reference may be in any case."""
    return exact(reference.upper(), hypothesis)


def bullets(reference: str, hypothesis: str) -> float:
    """Return 1 if each line of the answer is a bullet (``-``, ``*`` or ``•`` and a space) and the items are equal.

    Empty lines are ignored, the order of the items counts.

    Raises:
        ValueError: the reference is not a bullet list.
    """
    expected = _bullet_items(reference)
    if expected is None:
        raise ValueError(f"the reference of a task scored by 'bullets' must be a bullet list, got {reference!r}")
    return float(_bullet_items(hypothesis) == expected)


SCORERS: dict[str, Callable[[str, str], float]] = {
    "wer": word_accuracy,
    "exact": exact,
    "label": label,
    "f1": token_f1,
    "json": json_equal,
    "quotes": quotes,
    "upper": upper,
    "bullets": bullets,
}


def score(kind: str, reference: str, hypothesis: str) -> float:
    """Return the score from 0 to 1 of an answer by a task's kind of scoring.

    Raises:
        ValueError: the kind is unknown, or the reference breaks the format of its kind.
    """
    if kind not in SCORERS:
        raise ValueError(f"unknown scoring kind {kind!r}: use one of {', '.join(sorted(SCORERS))}")
    return SCORERS[kind](reference, hypothesis)


def _bare_label(text: str) -> str:
    folded = fold(text).casefold()
    return folded.strip(_LABEL_EDGES) or folded  # a label of nothing but punctuation stays itself


def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("repeated key")
        return made

    return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)


def _same_json(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same_json(x, y) for x, y in zip(a, b, strict=True))
    # Python holds True == 1, JSON does not.
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _unquote(text: str) -> str | None:
    """Return the folded content of a text in one pair of double quotes, or None."""
    text = text.strip()
    if len(text) < 2 or _QUOTES.get(text[0]) != text[-1]:
        return None
    return fold(text[1:-1])


def _bullet_items(text: str) -> list[str] | None:
    """Return the folded items of a bullet list, or None if there is none or a line is no bullet."""
    matches = [_BULLET.fullmatch(line) for line in text.splitlines() if line.strip()]
    if not matches or not all(matches):
        return None
    return [fold(match.group(1)) for match in matches if match]
