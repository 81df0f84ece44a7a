# SPDX-License-Identifier: Apache-2.0
"""Hugging Face encoders give what their own classes give for each utterance alone, and frames are counted exactly."""

import json

import numpy as np
import pytest
import torch
from hf_models import ENCODERS, hf_encoder

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.hf import load_hf_encoder
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.planning.footprint import read_encoder_settings
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    for name in ENCODERS:
        hf_encoder(folder / name, name)
    return folder


def noise(*sizes):
    rng = np.random.default_rng(3)
    return [(0.1 * rng.standard_normal(size)).astype(np.float32) for size in sizes]


def padded(waves):
    lengths = torch.tensor([len(wave) for wave in waves])
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(wave) for wave in waves], batch_first=True), lengths


@torch.no_grad()
def reference(path, wave, layers=(), pad=True):
    """Frames by the model's own class."""
    from transformers import AutoFeatureExtractor, AutoModel

    model, extractor = AutoModel.from_pretrained(path).eval(), AutoFeatureExtractor.from_pretrained(path)
    if model.config.model_type == "whisper":
        model = model.get_encoder()
        if pad:
            features = extractor(wave, sampling_rate=RATE, return_tensors="pt").input_features
        else:
            features = extractor(
                wave, sampling_rate=RATE, return_tensors="pt", padding="longest", truncation=False
            ).input_features
            # a model of the same weights that was made for this length
            count = features.shape[-1] // 2
            model.config.max_source_positions = count
            model.embed_positions = torch.nn.Embedding.from_pretrained(model.embed_positions.weight[:count])
        out = model(features, output_hidden_states=True)
    else:
        values = extractor(wave, sampling_rate=RATE, return_tensors="pt").input_values
        out = model(values, output_hidden_states=True)
    states = [*out.hidden_states[:-1], out.last_hidden_state]
    return torch.cat([states[n] for n in layers or [-1]], -1)[0]


@pytest.mark.parametrize("name", ENCODERS)
def test_frames_are_those_of_the_reference(folder, name):
    waves = noise(RATE, 3 * RATE // 2 + 77, 5000, RATE)
    encoder = load_hf_encoder(folder / name)
    encoded, lengths = encoder(*padded(waves))
    for wave, frames, count in zip(waves, encoded, lengths.tolist(), strict=True):
        wanted = reference(folder / name, wave)
        assert count == (len(wave) // 160 + 1) // 2 if name == "whisper" else count == len(wanted)
        torch.testing.assert_close(frames[:count], wanted[:count], rtol=0, atol=1e-4)
        assert not frames[count:].any()


def test_whisper_without_padding(folder):
    waves = noise(RATE, 16_320)
    encoder = load_hf_encoder(folder / "whisper", EncoderConfig(pad=False))
    encoded, lengths = encoder(*padded(waves))
    for wave, frames, count in zip(waves, encoded, lengths.tolist(), strict=True):
        wanted = reference(folder / "whisper", wave, pad=False)
        assert count == len(wanted)
        torch.testing.assert_close(frames[:count], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["whisper", "wavlm", "hubert"])
def test_layers_stand_side_by_side(folder, name):
    (wave,) = noise(RATE)
    encoder = load_hf_encoder(folder / name, EncoderConfig(layers=[0, 2, -1]))
    encoded, lengths = encoder(*padded([wave]))
    assert encoder.shape.size == 3 * 16
    wanted = reference(folder / name, wave, layers=(0, 2, 3))
    torch.testing.assert_close(encoded[0], wanted[: int(lengths)], rtol=0, atol=1e-4)
    last = load_hf_encoder(folder / name)(*padded([wave]))[0]
    torch.testing.assert_close(encoded[..., -16:], last, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", ["whisper", "wavlm"])
@pytest.mark.parametrize("samples", [1, 159, 160, 161, 319, 320, 399, 400, 401, 719, 720, 721, 16000])
def test_short_audio(folder, name, samples):
    encoder = load_hf_encoder(folder / name, EncoderConfig(pad=False))
    encoded, lengths = encoder(*padded(noise(samples)))
    count = FrameCounter(encoder.shape.stages, RATE)(samples)
    assert lengths.tolist() == [count] and encoded.shape == (1, count, 16)
    assert encoded.isfinite().all()


def test_long_audio_of_whisper(folder):
    """Frames of the first window are those of the window alone."""
    (wave,) = noise(32 * RATE)
    encoded, lengths = load_hf_encoder(folder / "whisper")(*padded([wave]))
    assert lengths.tolist() == [1600]
    wanted = reference(folder / "whisper", wave[: 30 * RATE])
    torch.testing.assert_close(encoded[0, :1450], wanted[:1450], rtol=0, atol=1e-4)


def test_speech_from_a_directory_is_found_by_its_kind(folder):
    encoder = load_speech_encoder(folder / "wavlm", torch.bfloat16, EncoderConfig(layers=[1]))
    assert {value.dtype for value in encoder.parameters()} == {torch.bfloat16}
    encoded, _ = encoder(*padded(noise(RATE)))
    assert encoded.dtype == torch.bfloat16 and not encoder.train().training
    assert not any(value.requires_grad for value in encoder.parameters())


@pytest.mark.parametrize("name", ["whisper", "wavlm"])
def test_the_facts_of_a_plan_are_those_of_the_encoder(folder, name):
    config = EncoderConfig(layers=[1, 2])
    encoder, facts = load_hf_encoder(folder / name, config), read_encoder_settings(str(folder / name), config)
    assert facts.shape == encoder.shape
    assert facts.numbers == sum(value.numel() for value in (*encoder.parameters(), *encoder.buffers()))


@pytest.mark.parametrize("name", ["whisper", "wavlm"])
def test_a_model_hears_by_it(folder, name, model_section, tmp_path):
    """Training, ``.nemo`` and answers."""
    from lightning.pytorch import Trainer

    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel.strategy import MTBIStrategy

    changes = {"pretrained_asr": str(folder / name), "encoder": {"layers": [1, 3], "pad": False}}
    model = MTBIModel(model_section(**changes, encoder_cache=str(tmp_path / "cache")))
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    strategy = MTBIStrategy(model.config.layout)
    Trainer(max_steps=2, accelerator="cpu", devices=1, strategy=strategy, **dict.fromkeys(off, False)).fit(model)
    assert model.speech_llm.encoder_cache.misses
    model.save_to(tmp_path / "model.nemo")
    said = model.generate(noise(RATE), ["say it"])
    restored = MTBIModel.restore_from(tmp_path / "model.nemo", map_location="cpu")
    assert restored.generate(noise(RATE), ["say it"]) == said
    with pytest.raises(ValueError, match="a full .nemo holds one encoder of NeMo"):
        model.save_to(tmp_path / "full.nemo", full=True)
    assert [path.name for path in tmp_path.glob("*.nemo")] == ["model.nemo"]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("whisper", {"layers": [4]}, r"model.encoder.layers has 4, but the encoder has layers 0 to 3"),
        ("whisper", {"window_seconds": 31.0}, "window_seconds is 31; Whisper takes 30 s at most"),
        ("wavlm", {"overlap_seconds": 0.0}, "windows of this encoder must overlap by 0.04 s or more"),
        ("wavlm", {"overlap_seconds": 20.0}, "must be below half of window_seconds, 15"),
    ],
)
def test_what_does_not_fit_is_refused(folder, name, values, message):
    with pytest.raises(ValueError, match=message):
        load_hf_encoder(folder / name, EncoderConfig(**values))


def test_other_directories_are_refused(folder, tmp_path, llm_dir):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type is 'bert'; encoders are read of whisper"):
        load_speech_encoder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "wavlm" / "config.json").read_text())
    with pytest.raises(ValueError, match="the encoder in .* can't be read"):
        load_speech_encoder(tmp_path)
    with pytest.raises(ValueError, match="model.encoder.layers is for encoders of Hugging Face"):
        load_speech_encoder("demo", config=EncoderConfig(layers=[-1]))
