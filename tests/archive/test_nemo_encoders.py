# SPDX-License-Identifier: Apache-2.0
"""Models whose encoder trains in part, or that have two: what is trained, saved and restored."""

import numpy as np
import pytest
import torch
from hf_models import hf_encoder
from lightning.pytorch import Trainer, seed_everything

from nemo_mtbi.archive.save_restore import NemoFile
from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.io.nemo_tar import WEIGHTS
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.speech_llm.trainable import CONNECTOR, ENCODER
from nemo_mtbi.testing import tiny_asr_nemo

ENCODER_SECTION = {"freeze": ["pre_encode"]}


@pytest.fixture(scope="module")
def trained(model_section):
    """A model after some steps, and all of its weights before them."""
    seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    runner = Trainer(
        max_steps=3, accelerator="cpu", devices=1, strategy=MTBIStrategy(), limit_val_batches=0,
        use_distributed_sampler=False, num_sanity_val_steps=0, **quiet
    )  # fmt: skip
    model = MTBIModel(model_section(encoder=ENCODER_SECTION), runner)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    runner.fit(model)
    return model, before


def answers(model):
    rng = np.random.default_rng(0)
    return model.generate([rng.uniform(-0.1, 0.1, 24000).astype(np.float32)], ["say it"])


def test_what_is_not_frozen_is_trained_and_nothing_else(trained):
    model, before = trained
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    chosen = {name for name, value in model.named_parameters() if value.requires_grad}
    assert moved <= chosen == set(model.state_dict())
    encoder = {name for name in chosen if name.startswith(ENCODER.prefix)}
    assert encoder and not any("pre_encode" in name for name in encoder) and len(moved & encoder) > len(encoder) / 2
    assert all(name.startswith((ENCODER.prefix, CONNECTOR.prefix)) for name in chosen)


@pytest.mark.parametrize("full", [False, True])
def test_a_nemo_holds_what_is_trained(trained, tmp_path, full):
    model, _ = trained
    model.save_to(tmp_path / "hearing.nemo", full=full)
    restored = MTBIModel.restore_from(tmp_path / "hearing.nemo", map_location="cpu")
    here = dict(model.named_parameters())
    assert all(torch.equal(value, here[name]) for name, value in restored.named_parameters())
    assert answers(restored) == answers(model)
    with NemoFile(tmp_path / "hearing.nemo") as file:
        assert set(file.tensors(WEIGHTS).names()) == set(model.state_dict())


def test_what_nemo_freezes_for_a_while_is_saved_too(trained, tmp_path):
    model, _ = trained
    names, asked = set(model.state_dict()), {name for name, value in model.named_parameters() if value.requires_grad}
    model.freeze()
    try:
        assert set(model.state_dict()) == names
        model.save_to(tmp_path / "frozen.nemo")
    finally:
        for name, value in model.named_parameters():
            value.requires_grad_(name in asked)
        model.train()
    restored = MTBIModel.restore_from(tmp_path / "frozen.nemo", map_location="cpu")
    here = dict(model.named_parameters())
    assert all(torch.equal(value, here[name]) for name, value in restored.named_parameters())


def test_first_the_connector_then_the_encoder(model_section, trained, tmp_path):
    """What a file does not have is left as it is; what belongs to another encoder is refused."""
    alone = MTBIModel(model_section(train_ds=None, validation_ds=None))
    alone.save_to(tmp_path / "connector.nemo")
    model = MTBIModel(model_section(encoder=ENCODER_SECTION, train_ds=None, validation_ds=None))
    before = {name: value.clone() for name, value in model.named_parameters() if name.startswith(ENCODER.prefix)}
    model.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(tmp_path / "connector.nemo")})
    here = dict(model.named_parameters())
    assert all(torch.equal(value, here[name]) for name, value in before.items())
    connector = {name: value for name, value in alone.named_parameters() if name.startswith(CONNECTOR.prefix)}
    assert all(torch.equal(value, here[name]) for name, value in connector.items())

    trained[0].save_to(tmp_path / "trained.nemo")
    model.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(tmp_path / "trained.nemo")})
    assert all(torch.equal(value, here[name]) for name, value in trained[0].named_parameters())
    other = str(tiny_asr_nemo(tmp_path / "other.nemo", seed=7))
    section = model_section(encoder=ENCODER_SECTION, pretrained_asr=other, train_ds=None, validation_ds=None)
    with pytest.raises(ValueError, match="has trained weights of another encoder than model.pretrained_asr"):
        MTBIModel(section).maybe_init_from_pretrained_checkpoint(
            {"init_from_nemo_model": str(tmp_path / "trained.nemo")}
        )


def test_another_choice_does_not_fit(trained, tmp_path):
    trained[0].save_to(tmp_path / "hearing.nemo")
    with pytest.raises(ValueError, match=r"hearing.nemo does not fit model.encoder.freeze; missing or unknown: "):
        MTBIModel.restore_from(tmp_path / "hearing.nemo", override_config_path={"encoder": {"freeze": True}})


def test_frames_of_an_encoder_that_trains_are_not_kept(tmp_path):
    section = {"pretrained_asr": "demo", "pretrained_llm": "demo", "encoder_cache": str(tmp_path)}
    parse_model_config(section)
    with pytest.raises(ValueError, match="encoder_cache keeps what a frozen encoder gives: remove it"):
        parse_model_config({**section, "encoder": ENCODER_SECTION})


@pytest.fixture(scope="module")
def pair(model_section, tmp_path_factory):
    """A model with a second encoder beside the first."""
    folder = tmp_path_factory.mktemp("pair")
    second = hf_encoder(folder / "wavlm", "wavlm")
    seed_everything(0, verbose=False)
    section = {"beside": {"path": str(second), "layers": [1, -1]}}
    return MTBIModel(model_section(encoder=section, train_ds=None, validation_ds=None)), second


def test_two_encoders_stand_in_one_nemo(pair, tmp_path):
    model, second = pair
    model.save_to(tmp_path / "pair.nemo")
    restored = MTBIModel.restore_from(tmp_path / "pair.nemo", map_location="cpu")
    assert answers(restored) == answers(model)
    with pytest.raises(ValueError, match="a full .nemo holds one encoder of NeMo"):
        model.save_to(tmp_path / "full.nemo", full=True)
    moved = second.rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match=r"'beside': \{'path': its path\}"):
            MTBIModel.restore_from(tmp_path / "pair.nemo", map_location="cpu")
        place = {"encoder": {"beside": {"path": str(moved)}}}
        restored = MTBIModel.restore_from(tmp_path / "pair.nemo", override_config_path=place, map_location="cpu")
        assert answers(restored) == answers(model)
        (moved / "preprocessor_config.json").write_text((moved / "preprocessor_config.json").read_text() + " ")
        with pytest.raises(ValueError, match="this model was trained with"):
            MTBIModel.restore_from(tmp_path / "pair.nemo", override_config_path=place, map_location="cpu")
    finally:
        moved.rename(second)
