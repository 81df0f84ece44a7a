# SPDX-License-Identifier: Apache-2.0
"""Encoders whose weights train, wholly or in part."""

import pytest
import torch
from hf_models import hf_encoder

from nemo_mtbi.config.encoder import EncoderConfig, SecondEncoder
from nemo_mtbi.encoders.base import trained_shapes, unfrozen
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder
from nemo_mtbi.testing import tiny_asr_nemo

NAMES = ["pre_encode.out.weight", "layers.0.a", "layers.1.a", "layers.10.a"]


@pytest.fixture(scope="module", params=["nemo", "whisper", "wavlm"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearing")
    if request.param == "nemo":
        return tiny_asr_nemo(folder / "asr.nemo")
    return hf_encoder(folder / request.param, request.param)


def sound(samples=(16000, 12000)):
    audio = torch.randn(len(samples), max(samples), generator=torch.Generator().manual_seed(0)) * 0.1
    return audio, torch.tensor(samples)


def test_patterns_name_what_stays_frozen(monkeypatch):
    from nemo_mtbi.config import freezing

    told = []
    monkeypatch.setattr(freezing.logging, "warning", told.append)

    def chosen(freeze, kind=EncoderConfig):
        return unfrozen(NAMES, kind(freeze=freeze))

    assert unfrozen(NAMES, None) == chosen(True) == set() and chosen(False) == set(NAMES)
    assert chosen(["pre_encode", r"layers\.1\."]) == {"layers.0.a", "layers.10.a"}
    assert told == []
    assert chosen(["conv", "^a"], SecondEncoder) == set(NAMES)
    assert chosen(["e"]) == set()
    assert [text.split(" ", 2)[:2] for text in told] == [
        ["model.encoder.beside.freeze:", "'conv'"],
        ["model.encoder.beside.freeze:", "'^a'"],
        ["model.encoder.freeze:", "all"],
    ]


@pytest.mark.parametrize("freeze", ["pre_encode", ["[0-9"], 3, [], ["a", "("], [3]])
def test_what_is_no_choice_is_refused(freeze):
    with pytest.raises(ValueError, match="model.encoder.freeze is"):
        EncoderConfig(freeze=freeze)


def test_by_default_nothing_trains(path):
    encoder = load_speech_encoder(path, torch.bfloat16)
    frames, _ = encoder(*sound())
    assert not frames.requires_grad and frames.dtype == torch.bfloat16 and not trained_shapes(encoder)


def test_what_trains_gets_the_gradient_of_its_output(path):
    """The gradient in a direction is the difference quotient along it."""
    encoder = load_speech_encoder(path, torch.float64, EncoderConfig(freeze=["bias"], pad=False))
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    names = trained_shapes(encoder)
    assert names and all(name.startswith("encoder.") and "bias" not in name for name in names)
    values = {name: value for name, value in encoder.named_parameters() if name in names}

    def loss():
        frames, lengths = encoder(*sound())
        return sum((frames[u, :n] ** 2).sum() for u, n in enumerate(lengths))

    found = torch.autograd.grad(loss(), list(values.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in values.values()]
    slope = sum((gradient * step).sum() for gradient, step in zip(found, steps, strict=True) if gradient is not None)

    def moved(by):
        with torch.no_grad():
            for value, step in zip(values.values(), steps, strict=True):
                value += by * step
            there = loss()
            for value, step in zip(values.values(), steps, strict=True):
                value -= by * step
        return there

    torch.testing.assert_close(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


def test_trained_weights_are_float32_and_compute_in_bfloat16(path):
    encoder = load_speech_encoder(path, torch.bfloat16, EncoderConfig(freeze=False))
    assert {value.dtype for value in encoder.encoder.parameters()} == {torch.float32}
    frames, lengths = encoder(*sound())
    exact, _ = load_speech_encoder(path, torch.float32, EncoderConfig())(*sound())
    error = (frames.float() - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.05  # rounded as the frozen one would be
    frames.float().sum().backward()
    assert all(value.grad is None or value.grad.dtype == torch.float32 for value in encoder.parameters())


def test_long_audio_has_gradients_too(path):
    config = EncoderConfig(freeze=False, window_seconds=1.0, overlap_seconds=0.4, pad=False)
    encoder = load_speech_encoder(path, torch.float32, config)
    frames, _ = encoder(*sound((40000, 30000)))
    frames[0, -1].sum().backward()
    late = [value.grad.abs().sum() for value in encoder.encoder.parameters() if value.grad is not None]
    assert sum(late) > 0
