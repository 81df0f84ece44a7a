# SPDX-License-Identifier: Apache-2.0
"""BLEU and chrF of sacrebleu as counts of n-grams, which can be resampled."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from nemo_mtbi.metrics.tally import divide

_BLEU_ORDER, _CHRF_ORDER, _CHRF_BETA = 4, 6, 2.0


def bleu_rows(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """Return ``[items, 10]``: lengths of hypothesis and reference, matched n-grams and all n-grams of order 1 to 4.

    Args:
        references: One or more texts for each item.
        hypotheses: One text for each item.
    """
    # without effective_order sacrebleu warns at every item about the score of the sentence, which is not used
    counter = BLEU(effective_order=True)
    rows = []
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        score = counter.sentence_score(hypothesis, list(texts))
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2 + 2 * _BLEU_ORDER)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Combine sums of :func:`bleu_rows` to BLEU (0 to 100; 13a tokens, exponential smoothing), sacrebleu's default."""
    length, reference = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    # the k-th order in a row without a match counts as 1 / 2^k matches
    smoothed = np.where(matched > 0, matched, 0.5 ** np.cumsum(matched == 0, axis=-1))
    precision = np.nan_to_num(divide(smoothed, total))
    possible: np.ndarray = np.asarray(matched.any(axis=-1) & (total > 0).all(axis=-1))
    logs = np.log(np.where(possible[..., None], precision, 1.0)).mean(axis=-1)
    brevity = np.exp(np.minimum(0.0, 1.0 - np.nan_to_num(divide(reference, length))))
    return np.where(possible, 100.0 * brevity * np.exp(logs), 0.0)


def chrf_rows(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """Return ``[items, 18]``: n-grams of the hypothesis, of the reference and matched, for 1 to 6 characters.

    Spaces are left out. Of several references the one with the best score of the item counts.
    """
    rows = []
    for texts, hypothesis in zip(references, hypotheses, strict=True):
        candidates = np.array([_chrf_counts(text, hypothesis) for text in texts], dtype=np.float64)
        rows.append(candidates[int(np.argmax(chrf(candidates)))])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 3 * _CHRF_ORDER)


def chrf(sums: np.ndarray) -> np.ndarray:
    """Combine sums of :func:`chrf_rows` to chrF2 (0 to 100), sacrebleu's default."""
    counts = sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3)
    hypothesis, reference, matched = counts[..., 0], counts[..., 1], counts[..., 2]
    used = (hypothesis > 0) & (reference > 0)  # orders that both sides are long enough for
    orders = used.sum(axis=-1)
    precision = np.nan_to_num(divide((divide(matched, hypothesis) * used).sum(-1, where=used), orders))
    recall = np.nan_to_num(divide((divide(matched, reference) * used).sum(-1, where=used), orders))
    weight = _CHRF_BETA**2
    return 100.0 * np.nan_to_num(divide((1 + weight) * precision * recall, weight * precision + recall))


def _chrf_counts(reference: str, hypothesis: str) -> list[int]:
    sides = ["".join(text.split()) for text in (hypothesis, reference)]
    counts = []
    for n in range(1, _CHRF_ORDER + 1):
        ours, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in sides)
        # as in sacrebleu: an order that the reference is too short for does not count
        counts += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return counts
