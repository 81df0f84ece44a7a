# SPDX-License-Identifier: Apache-2.0
"""A model with adapters in its LLM, in one process: what is trained, saved and restored."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lora_values import ALL, draw_adapters

from nemo_mtbi.archive.save_restore import NemoFile
from nemo_mtbi.config.llm import LoraConfig
from nemo_mtbi.io.nemo_tar import WEIGHTS
from nemo_mtbi.llm.lora import adapter_shapes
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.speech_llm.trainable import ADAPTERS, CONNECTOR

LORA = {"rank": 3, "target_modules": ALL}


def build(section, **changes):
    seed_everything(3, verbose=False)
    return MTBIModel(section(**changes))


@pytest.fixture(scope="module")
def model(model_section):
    model = build(model_section, lora=LORA, train_ds=None, validation_ds=None)
    draw_adapters(model.speech_llm.chunks)
    return model


def answers(model):
    rng = np.random.default_rng(0)
    audio = [rng.uniform(-0.1, 0.1, samples).astype(np.float32) for samples in (16000, 24000)]
    return model.generate(audio, ["say it", "count it"])


def test_the_state_is_what_is_trained(model):
    shapes = adapter_shapes(model.speech_llm.decoder.architecture, LoraConfig(**LORA))
    state = model.state_dict()
    assert {name for name in state if name.startswith(ADAPTERS.prefix)} == {ADAPTERS.prefix + name for name in shapes}
    assert {name.startswith((CONNECTOR.prefix, ADAPTERS.prefix)) for name in state} == {True}
    own = {id(value) for value in model.state_dict(keep_vars=True).values()}
    assert {id(value) for value in model.trained} <= own


@pytest.mark.parametrize("full", [False, True])
def test_a_nemo_holds_the_adapters(model, tmp_path, full):
    model.save_to(tmp_path / "lora.nemo", full=full)
    restored = MTBIModel.restore_from(tmp_path / "lora.nemo", map_location="cpu")
    before = dict(model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in restored.named_parameters())
    assert answers(restored) == answers(model)
    with NemoFile(tmp_path / "lora.nemo") as file:
        assert set(file.tensors(WEIGHTS).names()) == set(model.state_dict())


def test_adapters_that_do_not_fit_are_named(model, tmp_path):
    model.save_to(tmp_path / "lora.nemo")
    for changes, message in (
        ({"lora": {"rank": 4}}, r"lora.nemo does not fit model.lora; .*lora.a is \[3, .*\] instead of \[4, "),
        ({"lora": None}, "does not fit model.lora; missing or unknown: speech_llm.adapters.*is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            MTBIModel.restore_from(tmp_path / "lora.nemo", override_config_path=changes)


def test_merged_it_answers_alike_and_is_not_saved(model, tmp_path):
    before = answers(model)
    model.merge_lora()
    try:
        assert answers(model) == before
        with pytest.raises(ValueError, match=r"merged into the LLM's weights: call unmerge_lora\(\) before saving"):
            model.save_to(tmp_path / "merged.nemo")
    finally:
        model.unmerge_lora()
    assert answers(model) == before and not list(tmp_path.iterdir())


def test_connector_and_adapters_are_trained_and_the_llm_is_not(model_section):
    model = build(model_section, lora={"rank": 2}, loss={"kl_weight": 1.0})
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = Trainer(
        max_steps=3,
        limit_val_batches=0,
        accelerator="cpu",
        devices=1,
        strategy=MTBIStrategy(model.config.layout),
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        use_distributed_sampler=False,
    )
    trainer.fit(model)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.startswith("speech_llm.connector.") or ".lora." in name for name in changed} == {True}
    assert sum(name.endswith("linear_qkv.lora.b") for name in changed) == 2


def test_the_text_llm_stays_what_it_was(model, model_section):
    """The row that a benchmark compares with, and the teacher of the KL."""
    from dataclasses import replace

    from nemo_mtbi.inference.respond import Responder
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    text = load_text_llm(model_section().pretrained_llm)
    asked = [("say it", "red cat"), ("count it", "dog"), ("first word", "cat red dog")]
    responder = model.responder()
    plain = Responder(LayoutDecoder(text.chunks), text.chat, responder.config).text(asked)
    assert replace(responder, adapted=False).text(asked) == plain
    assert responder.text(asked) != plain
