# SPDX-License-Identifier: Apache-2.0
"""A corpus-level figure as sums over items, so that it can be resampled without scoring anything again.

WER is edits over words, BLEU is a function of n-gram counts, an accuracy is points over items: each is a function of
sums of per-item counts. A :class:`Tally` holds these counts and the function. Every metric and every behavior measure
returns one, and intervals and tests (``statistics.py``) need nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Combine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Tally:
    """Counts of each item and the function of their sums that is the figure.

    Attributes:
        name: Name of the figure.
        rows: ``[items, counts]``, float64.
        combine: Sums ``[..., counts]`` to figures ``[...]``; NaN where the figure is undefined.
        higher_is_better: False for error rates and divergences.
        per_item: Whether the figure of a single item means anything (not so for BLEU without smoothing).
        abstained: ``[items]``, True where the answer is empty or a refusal.
        left_out: Number of items that the figure is not defined for.

    Raises:
        ValueError: there is no item, a count is not finite, or ``abstained`` has another length.
    """

    name: str
    rows: np.ndarray
    combine: Combine
    higher_is_better: bool = True
    per_item: bool = True
    abstained: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    left_out: int = 0

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows, dtype=np.float64)
        if rows.ndim != 2 or not len(rows):
            raise ValueError(f"{self.name} of no items is undefined: pass at least one item")
        if not np.isfinite(rows).all():
            bad = int(np.argwhere(~np.isfinite(rows))[0, 0])
            raise ValueError(f"{self.name}: item {bad} has a count that is NaN or infinite; leave it out and say so")
        abstained = np.asarray(self.abstained, dtype=bool)
        if not abstained.size:
            abstained = np.zeros(len(rows), dtype=bool)
        if abstained.shape != (len(rows),):
            raise ValueError(f"{self.name}: {len(rows)} items but {abstained.size} marks of abstention")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "abstained", abstained)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def value(self) -> float | None:
        """The figure over all items, the same bits whatever their order; None where it is undefined."""
        sums = np.array([math.fsum(column) for column in self.rows.T])
        return defined(float(self.combine(sums)))

    @property
    def items(self) -> list[float | None]:
        """The figure of each single item; None where it is undefined.

        Raises:
            ValueError: the figure exists for a corpus only.
        """
        if not self.per_item:
            raise ValueError(f"{self.name} exists for a corpus only: take its value, or a metric with values per item")
        return [defined(float(v)) for v in self.combine(self.rows)]

    @property
    def abstentions(self) -> int:
        """Number of answers that are empty or refusals."""
        return int(self.abstained.sum())


def defined(value: float) -> float | None:
    """Return the value, or None for NaN."""
    return None if math.isnan(value) else value


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def mean(sums: np.ndarray) -> np.ndarray:
    """Combine ``[..., (points, weight)]`` to points over weight."""
    return divide(sums[..., 0], sums[..., 1])


def mean_tally(
    name: str, points: Sequence[float] | np.ndarray, weights: Sequence[float] | None = None, **options: Any
) -> Tally:
    """Return the weighted mean of values as a tally.

    Args:
        name: Name of the figure.
        points: One value for each item.
        weights: One weight ≥ 0 for each item; 1 if None. An item of weight 0 counts for nothing.
        options: Fields of :class:`Tally`.

    Raises:
        ValueError: there is no value, the lengths differ, a number is not finite or a weight is negative.
    """
    values = np.asarray(points, dtype=np.float64)
    weight = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or values.shape != weight.shape:
        raise ValueError(f"{name}: {values.size} values but {weight.size} weights; pass one of each for every item")
    if (weight < 0).any():
        raise ValueError(f"{name}: weight {weight.min()} is negative; weights count what an item stands for")
    return Tally(name, np.stack([values * weight, weight], axis=-1), mean, **options)


def pooled(tallies: Sequence[Tally]) -> Tally:
    """Return one tally over the items of several of the same figure, such as those of several seeds.

    Raises:
        ValueError: there is none, or they are of different figures.
    """
    if not tallies:
        raise ValueError("no tallies to pool: pass at least one")
    first = tallies[0]
    if any(t.name != first.name or t.rows.shape[1] != first.rows.shape[1] for t in tallies):
        names = ", ".join(sorted({t.name for t in tallies}))
        raise ValueError(f"only tallies of one figure can be pooled, got {names}: pool each figure apart")
    return Tally(
        first.name,
        np.concatenate([t.rows for t in tallies]),
        first.combine,
        first.higher_is_better,
        first.per_item,
        np.concatenate([t.abstained for t in tallies]),
        sum(t.left_out for t in tallies),
    )
