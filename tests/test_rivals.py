# SPDX-License-Identifier: Apache-2.0
"""What MTBI is compared with are configurations: they differ from the demo in what the rival is and nothing else."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.demo.recipe import load_pool, parse_data_config, trained_pool

CONF = Path(__file__).resolve().parent.parent / "conf"
DIFFERENT = {
    "mtbi": set(),
    "mtbi_kl": {"model.loss.ce_weight", "model.loss.kl_weight"},
    "mtbi_ce_kl": {"model.loss.kl_weight"},
    "imitation": {"model.interleave"},
    "multitask_sft": {"model.interleave", "data.targets"},
    "transcription_sft": {"model.interleave", "data.targets", "data.train_tasks"},
    "continuation": {"model.interleave", "data.train_tasks"},
    "no_instruction": {"model.interleave", "data.train_tasks"},
}


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("mtbi_demo", overrides=list(overrides))


def differences(one, other, name=""):
    """Keys whose values differ; whole sections where one has none."""
    if not (OmegaConf.is_dict(one) and OmegaConf.is_dict(other)):
        return {name} if one != other else set()
    keys = {*one, *other}
    return set().union(*(differences(one.get(key), other.get(key), f"{name}.{key}".lstrip(".")) for key in keys))


def test_each_configuration_is_listed_here():
    assert {path.stem for path in (CONF / "rival").glob("*.yaml")} == set(DIFFERENT)


@pytest.mark.parametrize("rival", DIFFERENT)
def test_a_rival_differs_in_what_it_is(rival):
    demo, cfg = composed(), composed(f"+rival={rival}")
    assert differences(demo, cfg) == DIFFERENT[rival]
    model, data = parse_model_config(cfg.model), parse_data_config(cfg.data)
    assert model.loss.uses_teacher == ("kl" in rival)
    assert trained_pool(load_pool(data.tasks), data.train_tasks).train
