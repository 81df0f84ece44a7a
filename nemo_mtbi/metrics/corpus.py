# SPDX-License-Identifier: Apache-2.0
"""Scores of a corpus: one interface for every metric, by name.

``evaluate("bleu", references, answers)`` gives a :class:`~nemo_mtbi.metrics.tally.Tally`: its ``value``, the values
of its ``items`` where they exist, how many answers abstained, and the counts that intervals and tests resample.

What makes a reference depends on the metric: a text; for BLEU, chrF and SQuAD a text or several right ones; for the
``choice`` metrics ``{"label": ..., "choices": [...]}``; for the ``follow`` metrics a list of rules
(``instructions.py``).

An empty answer or a refusal is counted as an abstention, and improves no figure but one. Where an item is right or
wrong it scores 0, also against an empty reference; in BLEU and chrF it is a text without words, so that its length
compensates for no other answer; in WER and CER it loses every word, a refusal as it is written. A WER above 1 is the
one figure that such an answer, at 1, lowers: read it beside the abstentions, or take ``word_accuracy`` or
``character_accuracy``, which stop at 0.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nemo_mtbi.metrics import overlap
from nemo_mtbi.metrics.abstention import abstains, is_empty
from nemo_mtbi.metrics.edits import cer, edit_rows, error_rate, wer
from nemo_mtbi.metrics.instructions import check_rules, follow_rows
from nemo_mtbi.metrics.normalizers import fold, normalize
from nemo_mtbi.metrics.scorers import ERROR_KINDS, SCORERS, exact, score, squad_exact, squad_f1, token_f1
from nemo_mtbi.metrics.tally import Combine, Tally, mean

__all__ = [
    "ERROR_KINDS",
    "METRICS",
    "Metric",
    "SCORERS",
    "cer",
    "evaluate",
    "exact",
    "fold",
    "metric",
    "normalize",
    "register_scorer",
    "score",
    "task_metric",
    "token_f1",
    "wer",
]

Reference = str | Sequence[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
# (references, answers, abstained) to the counts of each item
Count = Callable[[Sequence[Any], Sequence[str], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One way to score the answers of a corpus.

    Attributes:
        name: Its name in ``METRICS``.
        count: ``(references, answers, abstained)`` to counts ``[items, k]``.
        combine: Sums of counts to the figure.
        check: Raises ValueError if a reference is not what the metric needs.
        higher_is_better: False for error rates.
        per_item: Whether a single item has a value.
        scale: The highest value: 1, or 100 for BLEU and chrF; error rates may pass it.
    """

    name: str
    count: Count
    combine: Combine
    check: Callable[[Any], None]
    higher_is_better: bool = True
    per_item: bool = True
    scale: float = 1.0

    def tally(self, references: Sequence[Reference], answers: Sequence[str]) -> Tally:
        """Score a corpus.

        Raises:
            ValueError: there is no item, the lists differ in length, an answer is no text, or a reference is missing
                or is not what the metric needs; the message names the item.
        """
        if len(references) != len(answers):
            raise ValueError(
                f"{self.name}: {len(references)} references but {len(answers)} answers: pass one of each for an item"
            )
        for index, (reference, answer) in enumerate(zip(references, answers, strict=True)):
            if not isinstance(answer, str):
                raise ValueError(
                    f"{self.name}: answer {index} is {answer!r}, not a text; pass an empty one where there is none"
                )
            if reference is None:
                raise ValueError(
                    f"{self.name}: item {index} has no reference; add one, or leave the item out of what is scored"
                )
            try:
                self.check(reference)
            except ValueError as error:
                raise ValueError(f"{self.name}: item {index}: {error}") from error
        abstained = np.array([abstains(a, r) for r, a in zip(references, answers, strict=True)], dtype=bool)
        # An answer of invisible characters is empty, and they are no words.
        shown = ["" if is_empty(answer) else answer for answer in answers]
        rows = self.count(references, shown, abstained) if shown else np.zeros((0, 1))
        return Tally(self.name, rows, self.combine, self.higher_is_better, self.per_item, abstained)


def metric(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: use one of {', '.join(METRICS)}")
    return METRICS[name]


def evaluate(name: str, references: Sequence[Reference], answers: Sequence[str]) -> Tally:
    """Score a corpus by the metric of that name (see :meth:`Metric.tally`)."""
    return metric(name).tally(references, answers)


def task_metric(kind: str) -> Metric:
    """Return the metric, from 0 to 1 and the higher the better, of a task's kind of scoring.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in SCORERS:
        raise ValueError(f"unknown scoring kind {kind!r}: use one of {', '.join(sorted(SCORERS))}")
    return METRICS[ERROR_KINDS.get(kind, kind)]


def _text(reference: Any) -> None:
    if not isinstance(reference, str):
        raise ValueError(f"the reference must be one text, got {reference!r}")


def _texts(reference: Any) -> None:
    several = isinstance(reference, (list, tuple)) and reference and all(isinstance(r, str) for r in reference)
    if not isinstance(reference, str) and not several:
        raise ValueError(f"the reference must be a text or a list of texts, got {reference!r}")


def _as_list(reference: str | Sequence[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)


def _pointwise(
    name: str,
    scorer: Callable[[Any, str], float],
    check: Callable[[Any], None] = _text,
) -> Metric:
    """Return a metric that is a mean of points from 0 to 1; an abstention has 0."""

    def count(references: Sequence[Any], answers: Sequence[str], abstained: np.ndarray) -> np.ndarray:
        # abstentions are scored too: a reference that breaks its format is an error whatever the answer
        points = [scorer(r, a) for r, a in zip(references, answers, strict=True)]
        return np.stack([np.where(abstained, 0.0, points), np.ones(len(points))], axis=-1)

    return Metric(name, count, mean, check)


def _best(scorer: Callable[[str, str], float]) -> Callable[[str | Sequence[str], str], float]:
    return lambda reference, answer: max(scorer(text, answer) for text in _as_list(reference))


def _error_rate(name: str, unit: str, normalization: str) -> Metric:
    return Metric(
        name,
        lambda references, answers, _: edit_rows(references, answers, unit, normalization),
        error_rate,
        _text,
        higher_is_better=False,
    )


def _overlap(
    name: str, rows: Callable[[list[list[str]], Sequence[str]], np.ndarray], combine: Combine, per_item: bool
) -> Metric:
    def count(references: Sequence[Any], answers: Sequence[str], abstained: np.ndarray) -> np.ndarray:
        # the words of a refusal would reduce the brevity penalty of others
        texts = ["" if empty else answer for answer, empty in zip(answers, abstained, strict=True)]
        return rows([_as_list(r) for r in references], texts)

    return Metric(
        name,
        count,
        combine,
        _texts,
        per_item=per_item,
        scale=100.0,
    )


def _check_choice(reference: Any) -> None:
    if not isinstance(reference, Mapping) or set(reference) != {"label", "choices"}:
        raise ValueError(f"the reference must be {{'label': ..., 'choices': [...]}}, got {reference!r}")
    label, choices = reference["label"], reference["choices"]
    named = isinstance(choices, (list, tuple)) and all(isinstance(c, str) and fold(c) for c in choices)
    if not named or len({_label_key(c) for c in choices}) < max(2, len(choices)):
        raise ValueError(f"choices must be two or more different texts, got {choices!r}")
    if label not in choices:
        raise ValueError(f"the label {label!r} is none of the choices {', '.join(choices)}")


def _label_key(label: str) -> str:
    # "a" is an article and "A" an answer: labels of one letter differ by their case
    label = fold(label)
    return label if len(label) == 1 else label.casefold()


def _chosen(choices: Sequence[str], answer: str) -> set[str]:
    """Return the keys of the choices that stand in the answer as whole words; of two that overlap, the longer."""
    keys = sorted({_label_key(c) for c in choices}, key=len, reverse=True)
    pattern = "|".join(rf"(?<!\w){re.escape(k) if len(k) == 1 else '(?i:' + re.escape(k) + ')'}(?!\w)" for k in keys)
    return {_label_key(match) for match in re.findall(pattern, fold(answer))}


def _one_choice(reference: Mapping[str, Any], answer: str) -> float:
    return float(len(_chosen(reference["choices"], answer)) == 1)


def _right_choice(reference: Mapping[str, Any], answer: str) -> float:
    return float(_chosen(reference["choices"], answer) == {_label_key(reference["label"])})


def _follow(name: str, loose: bool, whole: bool) -> Metric:
    count = partial(follow_rows, loose=loose, whole=whole)
    return Metric(name, count, mean, check_rules)


def _registry() -> dict[str, Metric]:
    suffixes = {"": "plain", "_whisper_english": "whisper_english", "_whisper_basic": "whisper_basic"}
    made = [
        _error_rate(name + suffix, unit, normalization)
        for name, unit in (("wer", "word"), ("cer", "character"))
        for suffix, normalization in suffixes.items()
    ]
    made += [_pointwise(ERROR_KINDS.get(kind, kind), scorer) for kind, scorer in SCORERS.items()]
    made += [
        _pointwise("squad_exact", _best(squad_exact), _texts),
        _pointwise("squad_f1", _best(squad_f1), _texts),
        _overlap("bleu", overlap.bleu_rows, overlap.bleu, per_item=False),
        _overlap("chrf", overlap.chrf_rows, overlap.chrf, per_item=True),
        # Exactly one of the labels stands in the answer, and it is the right one; the rate of exactly one label.
        _pointwise("choice_accuracy", _right_choice, _check_choice),
        _pointwise("one_choice_rate", _one_choice, _check_choice),
        # Of all instructions those that are followed; of all prompts those whose instructions are all followed.
        _follow("follow_strict", loose=False, whole=False),
        _follow("follow_loose", loose=True, whole=False),
        _follow("follow_prompt_strict", loose=False, whole=True),
        _follow("follow_prompt_loose", loose=True, whole=True),
    ]
    return {m.name: m for m in made}


METRICS: dict[str, Metric] = _registry()


def register_scorer(kind: str, scorer: Callable[[str, str], float]) -> None:
    """Make a kind of scoring available to task pools, training and evaluation.

    Args:
        kind: The value of ``scoring`` in a task pool.
        scorer: The score, from 0 to 1, of ``(reference, answer)``; it raises ValueError for a reference that is not
            what it needs.

    Raises:
        ValueError: the name is taken by a scorer or another metric.
    """
    if kind in SCORERS or kind in METRICS:
        raise ValueError(f"the kind of scoring {kind!r} is registered already: choose another name")
    SCORERS[kind] = scorer
    METRICS[kind] = _pointwise(kind, scorer)
