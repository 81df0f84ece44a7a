# SPDX-License-Identifier: Apache-2.0
"""A part that trains and that the package does not know: a class and an entry of the list are all that it takes."""

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.speech_llm.model import SpeechLLM
from nemo_mtbi.speech_llm.trainable import TRAINABLE_PARTS, FirstStagePart, stored_parts

NAME = "speech_llm.prompts.values"
NO_DATA = {"train_ds": None, "validation_ds": None}


class PromptsPart(FirstStagePart):
    """Soft prompts, one of them in 64 bits: it stands first in the file."""

    name, prefix, key = "prompts", "speech_llm.prompts.", "model.prompts"

    def shapes(self, shape):
        return {"values": (3, shape.llm.hidden_size), "steps": ()}

    def tensors(self, model):
        return model.prompts.state_dict(keep_vars=True)


class Prompts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(3, width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))


@pytest.fixture
def prompts(monkeypatch):
    """Models have soft prompts in the test."""
    build = SpeechLLM.__init__

    def with_prompts(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.prompts = Prompts(self.decoder.config.hidden_size)

    monkeypatch.setattr(SpeechLLM, "__init__", with_prompts)
    TRAINABLE_PARTS.append(PromptsPart())
    yield TRAINABLE_PARTS[-1]
    TRAINABLE_PARTS.pop()


def build(section, value, **changes):
    seed_everything(1, verbose=False)
    model = MTBIModel(section(**NO_DATA, **changes))
    with torch.no_grad():
        model.speech_llm.prompts.values.fill_(value)
    return model


@pytest.mark.parametrize("full", [False, True])
def test_it_is_saved_and_restored(prompts, model_section, tmp_path, full):
    model = build(model_section, 2.0, lora={"rank": 2})
    model.save_to(tmp_path / "a.nemo", full)
    restored = MTBIModel.restore_from(tmp_path / "a.nemo", map_location="cpu")
    assert list(restored.state_dict()) == list(model.state_dict()) and NAME in model.state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in restored.state_dict().items())


def test_a_file_without_it_is_refused_by_its_key_and_starts_another_model(prompts, model_section, tmp_path):
    TRAINABLE_PARTS.remove(prompts)
    build(model_section, 0.0).save_to(tmp_path / "old.nemo")
    TRAINABLE_PARTS.append(prompts)
    with pytest.raises(ValueError, match=f"does not fit model.prompts; .*{NAME} is missing"):
        MTBIModel.restore_from(tmp_path / "old.nemo", map_location="cpu")
    model = build(model_section, 5.0)
    model.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(tmp_path / "old.nemo")})
    assert (model.state_dict()[NAME] == 5.0).all()


def test_a_model_starts_from_it(prompts, model_section, tmp_path):
    build(model_section, 2.0).save_to(tmp_path / "a.nemo")
    model = build(model_section, 0.0)
    model.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(tmp_path / "a.nemo")})
    assert (model.state_dict()[NAME] == 2.0).all()


def test_it_is_trained_by_the_connectors_optimizer(prompts, model_section):
    model = build(model_section, 0.0)
    assert any(value is model.speech_llm.prompts.values for value in model.trained)


def test_weights_of_the_llm_are_stored_with_it_where_it_is_inside():
    assert [part.name for part in stored_parts(())] == ["encoder", "connector", "adapters", "LLM"]
    assert [part.name for part in stored_parts({"llm"})] == ["encoder", "connector", "adapters"]
