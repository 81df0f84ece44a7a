# SPDX-License-Identifier: Apache-2.0
"""Scores of one answer: pure functions of two strings.

Every scorer takes ``(reference, hypothesis)`` and returns a float from 0 to 1, where 1 means right. A malformed
hypothesis scores 0. A reference that breaks the format of its own scoring kind is a fault of the data and raises
``ValueError``, since every hypothesis would score 0 against it in silence. Empty answers and refusals are handled
where a corpus is scored (``corpus.py``).
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from nemo_mtbi.metrics.edits import cer, wer
from nemo_mtbi.metrics.normalizers import fold, normalize, squad_normalize, words

_BULLET = re.compile(r"\s*[-*•]\s+(\S.*)")
_QUOTES = {'"': '"', "“": "”"}
# What may stand around a label without making it another label. No dash or plus: "-1" is not "1".
_LABEL_EDGES = " .,;:!?\"'“”‘’()[]*`"


def exact(reference: str, hypothesis: str) -> float:
    """Return 1 if the two texts are equal after folding whitespace (case and punctuation count), else 0."""
    return float(fold(reference) == fold(hypothesis))


def token_f1(reference: str, hypothesis: str) -> float:
    """Return the F1 of the two bags of normalized words (as in SQuAD, but articles count); order does not matter.

    Texts without any word are compared by :func:`exact`.
    """
    ref, hyp = words(normalize(reference)), words(normalize(hypothesis))
    return _bag_f1(ref, hyp) if ref or hyp else exact(reference, hypothesis)


def squad_exact(reference: str, hypothesis: str) -> float:
    """Return SQuAD's exact match: 1 if the two texts are equal without case, ASCII punctuation and articles."""
    return float(squad_normalize(reference) == squad_normalize(hypothesis))


def squad_f1(reference: str, hypothesis: str) -> float:
    """Return SQuAD's F1 of the two bags of words; where one side has no word, 1 if both have none."""
    ref, hyp = squad_normalize(reference).split(), squad_normalize(hypothesis).split()
    return _bag_f1(ref, hyp) if ref and hyp else float(ref == hyp)


def word_accuracy(reference: str, hypothesis: str) -> float:
    """Return ``1 - min(1, WER)`` of one utterance."""
    return 1.0 - min(1.0, wer([reference], [hypothesis]))


def character_accuracy(reference: str, hypothesis: str) -> float:
    """Return ``1 - min(1, CER)`` of one utterance."""
    return 1.0 - min(1.0, cer([reference], [hypothesis]))


def label(reference: str, hypothesis: str) -> float:
    """Return 1 if the answer is the label and nothing else; case and punctuation around it do not matter."""
    return float(_bare_label(reference) == _bare_label(hypothesis))


def json_equal(reference: str, hypothesis: str) -> float:
    """Return 1 if the answer parses as JSON and equals the reference value; key order and spacing do not matter.

    ``NaN``, ``Infinity`` and a repeated key are not JSON here. ``true`` is not ``1``, but ``1.0`` is ``1``.

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
    "cer": character_accuracy,
    "exact": exact,
    "label": label,
    "f1": token_f1,
    "json": json_equal,
    "quotes": quotes,
    "upper": upper,
    "bullets": bullets,
}


# Kinds of scoring by an error rate of that name, and the metric from 0 to 1 that says the same of one answer.
ERROR_KINDS: dict[str, str] = {"wer": "word_accuracy", "cer": "character_accuracy"}


def score(kind: str, reference: str, hypothesis: str) -> float:
    """Return the score from 0 to 1 of an answer by a task's kind of scoring.

    Raises:
        ValueError: the kind is unknown, or the reference breaks the format of its kind.
    """
    if kind not in SCORERS:
        raise ValueError(f"unknown scoring kind {kind!r}: use one of {', '.join(sorted(SCORERS))}")
    return SCORERS[kind](reference, hypothesis)


def _bag_f1(reference: list[str], hypothesis: list[str]) -> float:
    overlap = (Counter(reference) & Counter(hypothesis)).total()
    return 2 * overlap / (len(reference) + len(hypothesis))


def _bare_label(text: str) -> str:
    folded = fold(text).casefold()
    return folded.strip(_LABEL_EDGES) or folded  # a label of nothing but punctuation stays itself


def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

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
    # True == 1 in Python, but not in JSON
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _unquote(text: str) -> str | None:
    """Return the folded content of a text in one pair of double quotes, or None."""
    text = text.strip()
    if len(text) < 2 or _QUOTES.get(text[0]) != text[-1]:
        return None
    return fold(text[1:-1])


def _bullet_items(text: str) -> list[str] | None:
    """Return the folded items of a bullet list, or None if it is empty or a line is not a bullet."""
    matches = [_BULLET.fullmatch(line) for line in text.splitlines() if line.strip()]
    if not matches or not all(matches):
        return None
    return [fold(match.group(1)) for match in matches if match]
