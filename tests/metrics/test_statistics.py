# SPDX-License-Identifier: Apache-2.0
"""Intervals, tests and spreads: by hand, against scipy, and by simulation on known distributions."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nemo_mtbi.metrics import statistics
from nemo_mtbi.metrics.behavior import behavior_gap, prompt_spread
from nemo_mtbi.metrics.corpus import METRICS, evaluate
from nemo_mtbi.metrics.edits import wer
from nemo_mtbi.metrics.statistics import bootstrap, cluster_sums, compare, holm, seed_spread
from nemo_mtbi.metrics.tally import mean_tally

VALUES = np.random.default_rng(3).gamma(2.0, size=40)
PAIRS = [("the cat sat", "the cat"), ("a dog ran home", "a dog ran home"), ("yes it is", "no it is"), ("two", "too")]


def corpus(n, seed=0):
    """Reference, answer and utterance of n items, two about each utterance."""
    rng = random.Random(seed)
    pairs = [rng.choice(PAIRS) for _ in range(n)]
    return [r for r, _ in pairs], [a for _, a in pairs], [f"u{i // 2}" for i in range(n)]


def test_cluster_sums_by_hand():
    rows = np.array([[1.0, 1], [2, 1], [4, 1]])
    names, sums = cluster_sums(rows, ["b", "a", "b"])
    assert names == ["a", "b"] and sums.tolist() == [[2, 1], [5, 2]]
    with pytest.raises(ValueError, match="3 items but 1 utterances"):
        cluster_sums(rows, ["a"])


@pytest.mark.parametrize("seed", range(5))
def test_bounds_are_those_of_scipy(seed):
    """Bit by bit, from the same generator: SciPy draws the indices of the utterances as we do."""
    weights = VALUES[::-1] + 1

    def figure(drawn, axis):
        return (VALUES[drawn] * weights[drawn]).sum(axis) / weights[drawn].sum(axis)

    indices, rng = np.arange(len(VALUES)), np.random.default_rng(seed)
    theirs = stats.bootstrap((indices,), figure, n_resamples=999, method="percentile", random_state=rng)
    utterances = [f"{index:02}" for index in indices]
    ours = bootstrap(mean_tally("x", VALUES, weights), utterances, resamples=999, seed=seed)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, rel=1e-12)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in METRICS if not name.startswith(("choice", "one_choice", "follow"))])
def test_resampled_counts_are_resampled_corpora(name):
    """Each figure of the bootstrap is that of the metric on the corpus that was drawn."""
    references, answers, utterances = corpus(12)
    if name in ("json", "quotes", "bullets"):
        references = {"json": ["1"], "quotes": ['"a"'], "bullets": ["- a"]}[name] * 12
    tally = evaluate(name, references, answers)
    names, sums = cluster_sums(tally.rows, utterances)
    (draws,) = statistics._draws(len(names), 5, seed=0)
    for counts in draws:
        assert counts.sum() == len(names)
        drawn = [
            i
            for u, times in zip(names, counts, strict=True)
            for i in range(12)
            for _ in range(int(times))
            if utterances[i] == u
        ]
        again = evaluate(name, [references[i] for i in drawn], [answers[i] for i in drawn])
        assert float(tally.combine(counts @ sums)) == pytest.approx(again.value)


def test_order_of_items_changes_no_bit():
    rng = random.Random(0)
    rows = [(rng.random(), rng.random(), f"u{i // 7}") for i in range(70)]
    found = []
    for seed in range(4):
        a, b, utterances = (list(column) for column in zip(*random.Random(seed).sample(rows, 70), strict=True))
        a, b = mean_tally("x", a), mean_tally("x", b)
        sums = cluster_sums(a.rows, utterances)[1].tolist()
        found.append((sums, bootstrap(a, utterances), compare(a, b, utterances)))
    assert all(f == found[0] for f in found)


def test_seed_and_chunks(monkeypatch):
    tally = mean_tally("x", VALUES)
    first = bootstrap(tally, range(40), resamples=500)
    assert bootstrap(tally, range(40), resamples=500) == first
    assert bootstrap(tally, range(40), resamples=500, seed=1) != first
    monkeypatch.setattr(statistics, "_CELLS", 100)  # two resamples at once
    chunked = bootstrap(tally, range(40), resamples=500)
    assert (chunked.low, chunked.high) == (pytest.approx(first.low), pytest.approx(first.high))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=8))
def test_symmetric_cases_contain_the_figure_in_the_middle(half):
    values = [float(v) for v in half] + [-float(v) for v in half]
    interval = bootstrap(mean_tally("x", values), range(len(values)), resamples=4000)
    assert interval.value == 0.0 and interval.low <= 0.0 <= interval.high
    assert abs(interval.low + interval.high) <= 0.35 * (interval.high - interval.low) + 1e-12


def test_utterances_are_drawn_whole():
    """Ten equal items of an utterance are one piece of evidence, not ten."""
    once = [1.0, 0.0] * 20
    single = bootstrap(mean_tally("x", once), range(40))
    ten = bootstrap(mean_tally("x", np.repeat(once, 10)), np.repeat(range(40), 10).tolist())
    loose = bootstrap(mean_tally("x", np.repeat(once, 10)), range(400))
    assert (ten.low, ten.high, ten.utterances) == (single.low, single.high, 40)
    assert loose.high - loose.low < 0.5 * (ten.high - ten.low)


def test_coverage_on_a_known_distribution():
    """Intervals of a clustered share, whose truth is 2/3, hold it about as often as they claim."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(300):
        levels = rng.beta(2, 1, 60)
        points = (rng.random((60, 5)) < levels[:, None]).astype(float).ravel()
        found = bootstrap(mean_tally("x", points), np.repeat(range(60), 5).tolist(), resamples=400, seed=seed)
        held += found.low <= 2 / 3 <= found.high
    assert 0.91 <= held / 300 <= 0.985


def test_intervals_without_width_say_so():
    perfect = bootstrap(mean_tally("x", [1.0] * 9), range(9))
    assert perfect.flat and (perfect.low, perfect.high) == (1.0, 1.0)
    assert not bootstrap(mean_tally("x", [1.0] * 9 + [0.0]), range(10)).flat


def test_a_ratio_that_resamples_to_0_has_no_interval():
    gap = behavior_gap(mean_tally("x", [1.0, 0, 0, 0]), mean_tally("x", [1.0, 0, 0, 0]))
    interval = bootstrap(gap, range(4))
    assert interval.value == 1.0 and (interval.low, interval.high) == (None, None) and interval.undefined > 0
    never = bootstrap(behavior_gap(mean_tally("x", [0.0]), mean_tally("x", [1.0])), ["u"])
    assert (never.value, never.low) == (None, None) and not never.flat


def test_spread_over_wordings_is_resampled_by_utterance():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.random(50) < 0.9, rng.random(50) < 0.5]).astype(float)
    spread = prompt_spread(mean_tally("x", scores), ["t"] * 100, ["w1"] * 50 + ["w2"] * 50)
    interval = bootstrap(spread, [*range(50), *range(50)])
    assert 0.0 < interval.low < interval.value < interval.high


def test_exact_permutation_test_by_hand_and_scipy():
    a, b = np.array([1.0, 1, 1, 0, 1, 1]), np.array([0.0, 0, 1, 0, 0, 0])
    found = compare(mean_tally("x", a), mean_tally("x", b), range(6))
    # 4 utterances differ, all one way: of 2^4 ways to swap them 2 are as extreme.
    assert found.exact and found.p_value == pytest.approx(2 / 16)
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples")
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert found.difference.value == pytest.approx(4 / 6)


def test_sampled_permutation_test_is_near_the_exact_one():
    rng = np.random.default_rng(1)
    a, b = rng.random(12), rng.random(12) + 0.2
    tallies = mean_tally("x", a), mean_tally("x", b)
    exact = compare(*tallies, range(12), resamples=5000)
    drawn = compare(*tallies, range(12), resamples=4000)
    assert exact.exact and not drawn.exact
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * (exact.p_value / 4000) ** 0.5 + 1e-3)
    signs = np.array(list(itertools.product([1, -1], repeat=12)))
    sums = np.abs(signs @ (a - b))
    assert exact.p_value == pytest.approx((sums >= sums[0] - 1e-12).mean())


def test_corpus_metrics_compare_by_counts():
    references, worse, utterances = corpus(40)
    a, b = evaluate("wer", references, references), evaluate("wer", references, worse)
    found = compare(a, b, utterances)
    assert found.difference.value == pytest.approx(-wer(references, worse))
    assert found.difference.high < 0 and found.p_value < 0.01
    assert compare(b, a, utterances).p_value == pytest.approx(found.p_value, abs=0.01)
    assert compare(a, a, utterances).p_value == 1.0
    same = compare(a, a, utterances).difference
    assert (same.low, same.high) == (0.0, 0.0)


def test_false_alarms_are_as_rare_as_they_claim():
    rng = np.random.default_rng(2)
    alarms = 0
    for seed in range(200):
        a, b = (rng.random((2, 30)) < 0.7).astype(float)
        alarms += compare(mean_tally("x", a), mean_tally("x", b), range(30), resamples=199, seed=seed).p_value <= 0.05
    assert alarms / 200 <= 0.09


def test_systems_in_another_order_are_matched_by_utterance():
    a, b = mean_tally("x", [1.0, 0, 1]), mean_tally("x", [0.0, 1, 1])
    assert compare(a, b, "pqr", "qpr") == compare(a, mean_tally("x", [1.0, 0, 1]), "pqr")


def test_comparisons_that_mean_nothing_are_errors():
    a, b = mean_tally("x", [1.0, 0]), mean_tally("x", [1.0, 0])
    with pytest.raises(
        ValueError, match="2 utterances were not asked about equally often in both systems .such as 'q'"
    ):
        compare(a, b, "pq", "pr")
    with pytest.raises(ValueError, match="repeat a system without seeds"):
        compare(a, mean_tally("x", [1.0, 0, 1, 0]), "pq", "pqpq")
    with pytest.raises(ValueError, match="only one figure can be compared, got x and y"):
        compare(a, mean_tally("y", [1.0, 0]), "pq")
    assert compare(mean_tally("x", [1.0], [0]), mean_tally("x", [1.0]), "p").p_value is None


def test_holm_by_hand():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
    with pytest.raises(ValueError, match="p-value of 'a'"):
        holm({"a": 1.5})


def test_seed_spread_by_hand():
    spread = seed_spread([0.9, 0.8, 1.0])
    assert (spread.mean, spread.deviation, spread.seeds) == (pytest.approx(0.9), pytest.approx(0.1), 3)
    assert spread.high - spread.mean == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t table, 2 degrees of freedom
    assert spread.mean - spread.low == pytest.approx(spread.high - spread.mean)
    one = seed_spread([0.9])
    assert (one.mean, one.deviation, one.low, one.high) == (0.9, None, None, None)
    for bad in ([], [0.9, None], [float("nan")]):
        with pytest.raises(ValueError, match="one finite number for each seed"):
            seed_spread(bad)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.sampled_from([0.8, 0.95]))
def test_seed_spread_is_the_t_interval_of_scipy(values, level):
    spread = seed_spread(values, level)
    assert seed_spread(values[::-1], level) == spread
    if spread.deviation > 1e-9:
        low, high = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
        assert (spread.low, spread.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resamples": 0}, "resamples must be a whole number"),
        ({"level": 95}, "level must be above 0 and below 1"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(mean_tally("x", [1.0]), ["u"], **options)
