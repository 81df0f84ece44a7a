# SPDX-License-Identifier: Apache-2.0
"""Buckets from costs, and from a configuration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from nemo_mtbi.planning.buckets import Bins, estimate_bins, find_bins


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 30))
def test_every_cut_has_a_bucket_and_none_is_empty(costs, number):
    bins = find_bins(costs, number)
    buckets = bins.buckets()
    assert len(buckets) == len(bins.bounds) + 1 <= number and all(buckets)
    assert sorted(cost for bucket in buckets for cost in bucket) == sorted(costs)
    for bucket, bound in zip(buckets, bins.bounds, strict=False):
        assert max(bucket) <= bound
    assert Bins((), bins.costs).fill - 1e-9 <= bins.fill <= 1.0


def test_fill_by_hand():
    bins = Bins((2,), (1, 2, 2, 4, 8))
    assert bins.buckets() == [[1, 2, 2], [4, 8]]
    assert bins.fill == 17 / (3 * 2 + 2 * 8)


def test_the_buckets_of_a_run(model_section, capsys):
    section = model_section()
    section["train_ds"] = {**section["train_ds"], "use_bucketing": True, "num_buckets": 3}
    bins = estimate_bins(OmegaConf.create({"model": section}))
    assert len(bins.costs) == 8 and 1 <= len(bins.bounds) <= 2
    bins.render(Console(width=100))
    said = capsys.readouterr().out
    assert f"num_buckets: {len(bins.bounds) + 1}" in said and f"bucket_duration_bins: {list(bins.bounds)}" in said
    from nemo_mtbi.data.loader_config import check_config

    given_back = {
        **section["train_ds"],
        "bucket_duration_bins": list(bins.bounds),
        "num_buckets": len(bins.bounds) + 1,
    }
    assert check_config(given_back, 16000)[0].use_bucketing


def test_costs_that_make_one_bucket_turn_bucketing_off(capsys):
    for costs in ([7], [7, 7, 7]):
        bins = find_bins(costs, 30)
        assert bins.bounds == ()
        bins.render(Console(width=100))
        said = capsys.readouterr().out
        assert "use_bucketing: false" in said and "bucket_duration_bins" not in said


def test_what_cannot_be_estimated(model_section):
    with pytest.raises(ValueError, match="set data=null"):
        estimate_bins(OmegaConf.create({"model": model_section(), "data": {"kind": "synthetic"}}))
    with pytest.raises(ValueError, match="model.train_ds is not set"):
        estimate_bins(OmegaConf.create({"model": {**model_section(), "train_ds": None}}))
    with pytest.raises(ValueError, match="model.pretrained_llm=/nowhere"):
        estimate_bins(OmegaConf.create({"model": model_section(pretrained_llm="/nowhere")}))
