# SPDX-License-Identifier: Apache-2.0
"""The ``.nemo`` of a model whose LLM lies in a Hugging Face directory."""

import tarfile

import numpy as np
import pytest
import torch
import yaml
from hf_models import hf_llm
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf
from tar_tricks import repacked

from nemo_mtbi.chat import template as chat_template
from nemo_mtbi.llm.directory import open_text_llm
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.testing import tiny_asr_nemo

TEXTS = {"llm/llm.yaml", "llm/config.json", "llm/tokenizer.json", "llm/tokenizer_config.json"}
TEXTS |= {"llm/chat_template.jinja"}


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return OmegaConf.create(
        {
            "pretrained_asr": str(tiny_asr_nemo(folder / "asr.nemo")),
            "pretrained_llm": str(hf_llm(folder / "llm")),
            "chat": {"system": "Be brief.", "audio": "before"},
            "connector": {"hidden_size": 24},
            "generation": {"max_new_tokens": 8},
        }
    )


def build(section):
    seed_everything(3, verbose=False)
    return MTBIModel(section)


@pytest.fixture(scope="module")
def model(section):
    return build(section)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_to(folder / "small.nemo")
    model.save_to(folder / "full.nemo", full=True)
    return folder


def answers(model):
    rng = np.random.default_rng(0)
    audio = [rng.uniform(-0.1, 0.1, samples).astype(np.float32) for samples in (16000, 24000)]
    return model.generate(audio, ["Say it.", "How many?"])


def names(path):
    with tarfile.open(path) as tar:
        return {member.name.removeprefix("./") for member in tar if "/" in member.name.removeprefix("./")}


def test_settings_and_tokenizer_are_held(saved):
    optional = {"llm/special_tokens_map.json"}  # which older transformers write
    assert names(saved / "small.nemo") - optional == TEXTS
    weights = {"llm/model.safetensors", "encoder/encoder.yaml", "encoder/encoder.safetensors"}
    assert names(saved / "full.nemo") - optional == TEXTS | weights


@pytest.mark.parametrize("kind", ["small", "full"])
def test_it_answers_as_before(saved, model, kind):
    restored = MTBIModel.restore_from(saved / f"{kind}.nemo", map_location="cpu")
    assert answers(restored) == answers(model)
    assert restored.expected_targets == model.expected_targets
    assert restored.chat.turn == model.chat.turn and "system\nBe brief." in model.chat.turn
    before = dict(model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in restored.named_parameters())


def test_unpacked_it_is_a_text_llm(saved, model, tmp_path):
    with tarfile.open(saved / "full.nemo") as tar:
        tar.extractall(tmp_path, filter="data")
    found = open_text_llm(tmp_path / "llm")
    assert not found.missing() and found.chat().fingerprint() == model.chat.fingerprint()


@pytest.mark.parametrize("kind", ["small", "full"])
def test_another_chat_may_be_asked_for(saved, kind, caplog):
    changes = {"chat": {"system": "Be long.", "audio": "after"}}
    restored = MTBIModel.restore_from(saved / f"{kind}.nemo", override_config_path=changes)
    assert "system\nBe long." in restored.chat.turn
    assert restored.chat.turn.index("{prompt}") < restored.chat.turn.index("{audio}")


def test_prompts_that_changed_by_themselves_are_refused(saved, monkeypatch):
    own = chat_template.HFTokenizer.render
    monkeypatch.setattr(chat_template.HFTokenizer, "render", lambda *args: own(*args).replace("user\n", "user: "))
    with pytest.raises(ValueError, match="trained with .*: the chat template of the LLM, or the transformers"):
        MTBIModel.restore_from(saved / "small.nemo")
    MTBIModel.restore_from(saved / "full.nemo")  # holds the prompts themselves


# ------------------------------------------------------------------------------------------------- archives of before


def rewritten(path, out, change):
    """A copy of an archive with another ``llm/llm.yaml``."""

    def edit(files):
        settings = yaml.safe_load(files["llm/llm.yaml"])
        change(settings["chat"])
        files["llm/llm.yaml"] = yaml.safe_dump(settings, sort_keys=False).encode()

    return repacked(path, out, edit)


@pytest.mark.parametrize("kind", ["small", "full"])
def test_an_archive_that_names_one_end_token_is_restored(section, tmp_path, kind):
    """The others come from the files of the LLM."""
    llm = hf_llm(tmp_path / "llm", eos_token_id=[2, 9])
    model = build(OmegaConf.merge(section, {"pretrained_llm": str(llm)}))
    assert model.chat.ends == (9,)
    model.save_to(tmp_path / "new.nemo", full=kind == "full")
    rewritten(tmp_path / "new.nemo", tmp_path / "old.nemo", lambda chat: chat.pop("ends"))
    for path in ("new.nemo", "old.nemo"):
        restored = MTBIModel.restore_from(tmp_path / path, map_location="cpu")
        assert restored.chat.end_ids == (2, 9) and answers(restored) == answers(model)
        assert restored.expected_targets == model.expected_targets


@pytest.mark.parametrize("kind", ["small", "full"])
def test_an_archive_with_turns_that_the_template_does_not_have_is_restored(section, tmp_path, kind):
    """Single turns are answered as before; further ones are refused."""
    changes = {"chat": {"options": {"enable_thinking": False}}}
    model = build(OmegaConf.merge(section, changes))
    assert model.chat.turn[-1].endswith("</think>\n\n") and model.chat.single
    model.save_to(tmp_path / "new.nemo", full=kind == "full")
    user, answer = ["\n", "<|im_start|>", "user\n"], ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
    more = [*user, "{audio}", "\n", "{prompt}", *answer]
    old = rewritten(tmp_path / "new.nemo", tmp_path / "old.nemo", lambda chat: chat.update(more=more))
    restored = MTBIModel.restore_from(old, map_location="cpu")
    assert answers(restored) == answers(model)
    several = [{"role": role, "content": "Say it."} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="its template can't be split into turns"):
        restored.converse([several])
