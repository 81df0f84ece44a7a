# SPDX-License-Identifier: Apache-2.0
"""Optimizer states by the names of parameters."""

from types import SimpleNamespace

import pytest
import torch

from nemo_mtbi.parallel.checkpoint import optimizer_state
from nemo_mtbi.parallel.checkpoint.tensors import Place


@pytest.fixture
def trained():
    """Three parameters by name, and an optimizer with two groups in another order, which leaves one out."""
    weights = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("a.weight", "b.weight", "frozen")}
    groups = [{"params": [weights["b.weight"]], "lr": 0.1}, {"params": [weights["a.weight"]], "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups)
    for name in ("a.weight", "b.weight"):
        weights[name].grad = torch.ones(2, 3)
    optimizer.step()
    return weights, optimizer


def test_numbers_of_the_state_dictionary_have_names(trained):
    weights, optimizer = trained
    assert optimizer_state.parameter_names(optimizer, weights) == ["b.weight", "a.weight"]


def test_a_parameter_without_a_name_is_refused(trained):
    weights, optimizer = trained
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match=r"shapes \[\(4,\)\] that the model's state_dict\(\) leaves out"):
        optimizer_state.parameter_names(optimizer, weights)


def test_states_are_found_by_name_whatever_their_numbers(trained):
    weights, optimizer = trained
    names = ["b.weight", "a.weight"]
    shards = optimizer_state.state_shards(1, optimizer.state_dict()["state"], names, weights, Place())
    stored = {shard.key: shard.data for shard in shards}
    assert stored.keys() == {f"optimizer.1.{k}.{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in names}
    metadata = SimpleNamespace(state_dict_metadata={**stored, "model.a.weight": 0, "optimizer.10.exp_avg.a.weight": 0})
    keys = optimizer_state.state_keys(1, ["c", "a.weight"], metadata)
    assert sorted(keys) == [(f"optimizer.1.{k}.a.weight", 1, k, False) for k in ("exp_avg", "exp_avg_sq", "step")]


def test_groups_keep_their_options_and_their_parameters(trained):
    _, optimizer = trained
    saved = [optimizer_state.group_options(group) for group in optimizer.state_dict()["param_groups"]]
    assert [options["lr"] for options in saved] == [0.1, 0.2] and all("params" not in options for options in saved)
    now = [{"params": [0], "lr": 9.0, "param_names": ["x"]}, {"params": [1, 2], "lr": 9.0}]
    merged = optimizer_state.with_options(now, saved)
    assert [(group["params"], group["lr"]) for group in merged] == [([0], 0.1), ([1, 2], 0.2)]
    assert merged[0]["param_names"] == ["x"] and "param_names" not in merged[1]
    with pytest.raises(ValueError, match="has 1 parameter groups, the one that was saved 2"):
        optimizer_state.with_options(now[:1], saved)
