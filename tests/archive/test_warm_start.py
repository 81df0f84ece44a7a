# SPDX-License-Identifier: Apache-2.0
"""``init_from_nemo_model``: the connector of another file, and nothing else of it."""

import pytest
import torch
from lightning.pytorch import seed_everything
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.speech_llm.trainable import CONNECTOR
from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_text_llm(folder / "llm")
    tiny_asr_nemo(folder / "asr.nemo")
    return {
        "pretrained_asr": str(folder / "asr.nemo"),
        "pretrained_llm": str(folder / "llm"),
        "connector": {"hidden_size": 24},
    }


def build(section, seed, **changes):
    seed_everything(seed, verbose=False)
    return MTBIModel(OmegaConf.merge(section, changes))


@pytest.fixture(scope="module")
def trained(section, tmp_path_factory):
    """A model, small and full on the disk."""
    model, folder = build(section, 1), tmp_path_factory.mktemp("trained")
    model.save_to(folder / "small.nemo")
    model.save_to(folder / "full.nemo", full=True)
    return model, folder


@pytest.fixture
def warnings(monkeypatch):
    heard = []
    monkeypatch.setattr(logging, "warning", heard.append)
    return heard


def taken(model, before, trained):
    """Names of the weights that come from ``trained``; the others are as they were."""
    found = {name for name, value in model.state_dict().items() if torch.equal(value, trained.state_dict()[name])}
    for name in model.state_dict().keys() - found:
        assert torch.equal(model.state_dict()[name], before[name])
    return {name.removeprefix(CONNECTOR.prefix) for name in found}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


NAMES = {"convs.0.weight", "convs.0.bias", "norm.weight", "norm.bias"}
NAMES |= {f"mlp.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")}
SAME_ANYWAY = {"norm.weight", "norm.bias"}  # ones and zeros at the start


@pytest.mark.parametrize("name", ["small.nemo", "full.nemo"])
def test_all_of_the_connector_is_taken(section, trained, name, warnings):
    model, (source, folder) = build(section, 2), trained
    before = state(model)
    assert taken(model, before, source) == SAME_ANYWAY
    model.maybe_init_from_pretrained_checkpoint(OmegaConf.create({"init_from_nemo_model": str(folder / name)}))
    assert taken(model, before, source) == NAMES
    assert not warnings
    assert "init_from_nemo_model" not in model.cfg


def test_nothing_is_taken_without_the_key(section, trained):
    model, (source, _) = build(section, 2), trained
    for cfg in ({}, {"init_from_nemo_model": None}):
        model.maybe_init_from_pretrained_checkpoint(OmegaConf.create(cfg))
    assert taken(model, state(model), source) == SAME_ANYWAY


def test_parts_of_several_files_are_taken(section, trained, tmp_path, warnings):
    third = build(section, 3)
    third.save_to(tmp_path / "third.nemo")
    model, (source, folder) = build(section, 2), trained
    before = state(model)
    one = {"path": str(folder / "small.nemo"), "include": ["convs", "mlp"], "exclude": ["mlp.3"]}
    cfg = {"init_from_nemo_model": {"one": one, "two": {"path": str(tmp_path / "third.nemo"), "include": ["mlp.3"]}}}
    model.maybe_init_from_pretrained_checkpoint(OmegaConf.create(cfg))
    assert not warnings
    assert taken(model, before | state(third), source) == NAMES - {"mlp.3.weight", "mlp.3.bias"}


def test_another_frozen_part_is_worth_a_warning(section, trained, tmp_path, warnings):
    model = build(section, 2, pretrained_llm=str(tiny_text_llm(tmp_path / "llm", seed=1)))
    model.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(trained[1] / "small.nemo")})
    assert len(warnings) == 1 and "was trained with another llm than this model has" in warnings[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"connector": {"hidden_size": 25}}, r"mlp.0.bias is \[24\] instead of \[25\]"),
        ({"connector": {"kind": "stack"}}, "convs.0.bias is unknown"),
    ],
)
def test_a_connector_of_another_shape_is_refused(section, trained, changes, message):
    model = build(section, 2, **changes)
    before = state(model)
    with pytest.raises(ValueError, match="small.nemo does not fit model.connector; missing or unknown: .*" + message):
        model.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(trained[1] / "small.nemo")})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_names_are_left_if_that_is_wanted(section, trained, warnings):
    model = build(section, 2, connector={"kind": "stack", "frame_rate": 12.5})
    cfg = {"init_from_nemo_model": {"a": {"path": str(trained[1] / "small.nemo"), "include": ["mlp.3", "convs"]}}}
    model.maybe_init_from_pretrained_checkpoint({**cfg, "init_strict": False})
    name = CONNECTOR.prefix + "mlp.3.weight"
    assert torch.equal(model.state_dict()[name], trained[0].state_dict()[name])
    assert len(warnings) == 1 and warnings[0].endswith(
        f"not used: {CONNECTOR.prefix}convs.0.bias, {CONNECTOR.prefix}convs.0.weight"
    )


@pytest.mark.parametrize(
    "cfg, message",
    [
        ({"init_from_nemo_model": "nowhere.nemo"}, "init_from_nemo_model: nowhere.nemo can't .*it does not exist"),
        (
            {"init_from_nemo_model": {"a": "x.nemo"}},
            "or name: {path, include, exclude} .* it has x.nemo",
        ),
        ({"init_from_nemo_model": {"path": "x.nemo"}}, "must be a path, or name: {path"),
        ({"init_from_nemo_model": {"a": {"path": "x.nemo", "with": 1}}}, "must be a path, or name: {path"),
        ({"init_from_nemo_model": {"a": {"path": "x.nemo", "include": "mlp"}}}, "with lists of parts of names"),
        ({"init_from_nemo_model": 3}, "must be a path, or name: {path"),
        ({"init_from_pretrained_model": "x"}, "init_from_pretrained_model is not supported: give the path of a .nemo"),
        ({"init_from_ptl_ckpt": "x"}, "init_from_ptl_ckpt is not supported: give the path of a .nemo"),
    ],
)
def test_what_can_not_be_a_start_is_refused(section, trained, cfg, message):
    with pytest.raises(ValueError, match=message):
        trained[0].maybe_init_from_pretrained_checkpoint(OmegaConf.create(cfg))


def test_an_asr_model_is_no_start(section, trained):
    with pytest.raises(ValueError, match="it holds a nemo.collections.asr.*, no MTBI model"):
        trained[0].maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": section["pretrained_asr"]})
