# SPDX-License-Identifier: Apache-2.0
"""Figures as sums of counts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.metrics.tally import Tally, divide, mean, mean_tally, pooled

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


def test_a_mean_by_hand():
    tally = mean_tally("x", [1.0, 0.5, 0.0], [1, 2, 0])
    assert tally.value == pytest.approx(2 / 3)
    assert tally.items == [1.0, 0.5, None] and len(tally) == 3
    assert mean_tally("x", [1.0], [0]).value is None


@given(VALUES, st.randoms(use_true_random=False))
def test_order_changes_no_bit(values, rng):
    shuffled = rng.sample(values, len(values))
    assert mean_tally("x", values).value == mean_tally("x", shuffled).value == math.fsum(values) / len(values)


def test_divide():
    assert divide(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0])).tolist()[0] == 0.5
    assert np.isnan(divide(np.array([1.0, 0.0]), np.zeros(2))).all()
    assert divide(np.ones((2, 3)), np.array([1.0, 2.0, 4.0])).tolist() == [[1.0, 0.5, 0.25]] * 2


def test_pooled_takes_every_item():
    a, b = mean_tally("x", [1, 0], abstained=[False, True]), mean_tally("x", [1], left_out=1)
    both = pooled([a, b])
    assert (both.value, len(both), both.abstentions, both.left_out) == (pytest.approx(2 / 3), 3, 1, 1)
    with pytest.raises(ValueError, match="only tallies of one figure can be pooled, got x, y"):
        pooled([a, mean_tally("y", [1])])
    with pytest.raises(ValueError, match="no tallies"):
        pooled([])


def test_bad_counts_are_errors():
    with pytest.raises(ValueError, match="x of no items is undefined"):
        mean_tally("x", [])
    with pytest.raises(ValueError, match="x: item 1 has a count that is NaN or infinite"):
        mean_tally("x", [0.0, math.nan])
    with pytest.raises(ValueError, match="2 values but 1 weights"):
        mean_tally("x", [0.0, 1.0], [1])
    with pytest.raises(ValueError, match="weight -1.0 is negative"):
        mean_tally("x", [0.0, 1.0], [1, -1])
    with pytest.raises(ValueError, match="2 items but 1 marks of abstention"):
        mean_tally("x", [0.0, 1.0], abstained=[True])
    with pytest.raises(ValueError, match="x exists for a corpus only"):
        _ = Tally("x", np.ones((1, 2)), mean, per_item=False).items
