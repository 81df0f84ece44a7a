# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_mtbi.llm.weights import MemoryWeights, load_weights
from nemo_mtbi.speech_llm.pretrained import (
    load_asr_model,
    load_speech_encoder,
    load_text_llm,
    resolve,
    save_text_llm,
)
from nemo_mtbi.testing import END, TURN, tiny_asr_nemo


@pytest.fixture
def copy(llm_dir, tmp_path):
    """A copy of the tiny LLM to spoil."""
    return shutil.copytree(llm_dir, tmp_path / "copy")


def edit(path, change):
    settings = yaml.safe_load((path / "llm.yaml").read_text())
    change(settings)
    (path / "llm.yaml").write_text(yaml.safe_dump(settings))


def edit_weights(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


@torch.no_grad()
def test_an_llm_comes_back_as_it_was_saved(llm_dir, tmp_path):
    first = load_text_llm(llm_dir)
    weights = dict(first.decoder.named_parameters())
    assert (first.chat.turn, first.chat.end) == (TURN, END)
    tokenizer = (llm_dir / "tokenizer.model").read_bytes()
    save_text_llm(tmp_path / "again", first.decoder.architecture, weights, tokenizer, TURN, END)
    second = load_text_llm(tmp_path / "again")
    assert second.decoder.architecture == first.decoder.architecture
    assert second.fingerprint == first.fingerprint
    assert second.chat.fingerprint() == first.chat.fingerprint()
    assert second.chat.encode("red cat") == first.chat.encode("red cat")
    for name, value in second.decoder.named_parameters():
        assert torch.equal(value, weights[name]), name
        assert value.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_take_the_dtype_asked_for(llm_dir, dtype):
    decoder = load_text_llm(llm_dir, dtype).decoder
    assert {value.dtype for value in decoder.parameters()} == {dtype}
    stored = load_file(llm_dir / "model.safetensors")["embedding.word_embeddings.weight"]
    assert torch.equal(decoder.embedding.word_embeddings.weight, stored.to(dtype))


def test_without_weights_the_file_is_not_read_into_the_model(llm_dir):
    loaded, empty = load_text_llm(llm_dir), load_text_llm(llm_dir, weights=False)
    assert empty.fingerprint == loaded.fingerprint
    assert not torch.equal(
        empty.decoder.embedding.word_embeddings.weight, loaded.decoder.embedding.word_embeddings.weight
    )


@pytest.mark.parametrize("missing", ["llm.yaml", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(copy, missing):
    (copy / missing).unlink()
    with pytest.raises(ValueError, match=f"lacks {missing}; it is not a text LLM directory"):
        load_text_llm(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.update({"decoder.final_layernorm.weight": torch.ones(7)}), "decoder.final_layernorm.weight"),
        (lambda w: w.pop("decoder.layers.1.mlp.linear_fc2.weight"), "decoder.layers.1.mlp.linear_fc2.weight"),
        (lambda w: w.update({"lm_head.weight": torch.ones(1)}), "lm_head.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(copy, change, message):
    edit_weights(copy, change)
    with pytest.raises(ValueError, match=f"do not fit its llm.yaml; .*{message}"):
        load_text_llm(copy)


def test_nothing_is_copied_if_one_weight_does_not_fit(llm_dir):
    decoder = load_text_llm(llm_dir).decoder
    before = {name: value.clone() for name, value in decoder.named_parameters()}
    weights = {name: torch.zeros_like(value) for name, value in before.items()}
    weights["decoder.final_layernorm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError):
        load_weights([decoder], MemoryWeights(weights))
    assert all(torch.equal(value, before[name]) for name, value in decoder.named_parameters())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(format_version=2), "has format_version 2; this version reads 1"),
        (lambda s: s.pop("chat"), "lacks a key, or has one too many: 'chat'"),
        (lambda s: s["architecture"].pop("num_layers"), "one too many: .*num_layers"),
        (lambda s: s["architecture"].update(rope_stretching=8), "one too many: .*rope_stretching"),
        (lambda s: s["architecture"].update(rope_scaling=8), "rope_scaling is 8; it must hold the keys"),
        (lambda s: s["architecture"].update(rope_scaling={"factor": 8}), "one too many: .*low_freq_factor"),
        (lambda s: s["architecture"].update(vocab_size=100), "has 128 tokens, but the LLM embeds 100"),
        (lambda s: s["architecture"].update(ffn_hidden_size=50), "do not fit its llm.yaml"),
        (lambda s: s["chat"].update(end="<|im_end|>"), "ends with '<|im_end|>', which is not a token"),
    ],
)
def test_settings_that_do_not_fit_are_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        load_text_llm(copy)


def test_damaged_files_are_refused(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_text_llm(copy)
    (copy / "llm.yaml").write_text("")
    with pytest.raises(ValueError, match="format_version None"):
        load_text_llm(copy)


def test_the_fingerprint_tells_every_part(llm_dir, copy):
    seen = {load_text_llm(llm_dir).fingerprint}
    assert load_text_llm(copy).fingerprint in seen

    def nudge(weights):
        weights["decoder.final_layernorm.weight"][3] += 0.01

    for change in (
        lambda: edit_weights(copy, nudge),
        lambda: edit(copy, lambda s: s["chat"].update(turn=[*TURN, "so"])),
        lambda: edit(copy, lambda s: s["architecture"].update(rotary_base=20000.0)),
    ):
        change()
        fingerprint = load_text_llm(copy).fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)


def test_an_unknown_path_is_refused_by_the_name_of_its_key(tmp_path):
    with pytest.raises(ValueError, match="model.pretrained_llm=.*nowhere does not exist; give a path or 'demo'"):
        load_text_llm(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model.pretrained_asr=.*nowhere.nemo does not exist"):
        load_asr_model(tmp_path / "nowhere.nemo")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llm").mkdir()
    assert resolve("~/llm", "model.pretrained_llm", "llm") == tmp_path / "llm"


def test_a_speech_encoder_is_read_from_an_asr_model(tmp_path):
    path = tiny_asr_nemo(tmp_path / "asr.nemo")
    encoder = load_speech_encoder(path)
    expected = load_asr_model(path).encoder.state_dict()
    for name, value in encoder.encoder.state_dict().items():
        assert torch.equal(value, expected[name])
    assert (encoder.shape.size, encoder.shape.frame_rate) == (16, 12.5)


@pytest.mark.parametrize("content", [b"", b"not an archive at all", b"PK\x03\x04"])
def test_a_file_that_is_no_asr_model_is_refused(tmp_path, content):
    (tmp_path / "other.nemo").write_bytes(content)
    with pytest.raises(ValueError, match="other.nemo is not a readable NeMo ASR checkpoint"):
        load_asr_model(tmp_path / "other.nemo")


def test_a_folder_or_a_cut_off_archive_is_no_asr_model(tmp_path):
    whole = tiny_asr_nemo(tmp_path / "asr.nemo").read_bytes()
    (tmp_path / "cut.nemo").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.nemo").mkdir()
    for name in ("cut.nemo", "folder.nemo"):
        with pytest.raises(ValueError, match=f"{name} is not a readable NeMo ASR checkpoint"):
            load_asr_model(tmp_path / name)
