# SPDX-License-Identifier: Apache-2.0
"""An encoder from outside of the package goes all the ways that ours go: load, plan, fingerprint, full ``.nemo``."""

import json

import pytest
import torch
from torch import nn

from nemo_mtbi.archive.embedded import ENCODER_SETTINGS, ENCODER_WEIGHTS, encoder_settings, read_encoder
from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderConfig, EncoderSection, SecondEncoder
from nemo_mtbi.encoders.base import EncoderShape, SpeechEncoder, trained_shapes
from nemo_mtbi.encoders.hf import HFSpeechEncoder
from nemo_mtbi.encoders.nemo import NemoEncoder
from nemo_mtbi.encoders.registry import ENCODERS, kind_of, name_of, register_encoder
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.io.untrusted_yaml import read_yaml
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.planning import footprint
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder


class BlockEncoder(SpeechEncoder):
    """A linear layer over blocks of 320 samples, stored as ``blocks.json`` and ``blocks.pt``."""

    title, embeds = "block encoder", True

    def __init__(self, width):
        super().__init__()
        self.encoder = nn.Linear(320, width)
        self.shape = EncoderShape(width, 16000, (LengthStage(320, 320),))

    @classmethod
    def recognizes(cls, path):
        return (path / "blocks.json").is_file()

    @classmethod
    def load(cls, path, config):
        encoder = cls.empty(path, config).to_empty(device="cpu")
        encoder.load_state_dict(torch.load(path / "blocks.pt", weights_only=True))
        return encoder

    @classmethod
    def empty(cls, path, config):
        with torch.device("meta"):
            return cls(json.loads((path / "blocks.json").read_text())["width"])

    def settings(self):
        return {"width": self.shape.size}

    @classmethod
    def from_settings(cls, settings, config, shapes, file, weights):
        if settings.get("width") != shapes.get("encoder.bias", (None,))[0]:
            raise ArchiveError(f"{file} does not fit {weights}")
        return cls(settings["width"])

    def forward(self, audio, lengths):
        with self.running(audio.device):
            blocks = audio[:, : audio.shape[1] // 320 * 320].unflatten(1, (-1, 320))  # [U, E, 320]
            return self.encoder(blocks.to(self.encoder.weight.dtype)), lengths // 320

    def first_convolution(self):
        return 2 * self.shape.size


@pytest.fixture
def folder(tmp_path):
    register_encoder("blocks", BlockEncoder)
    torch.save(BlockEncoder(8).state_dict(), tmp_path / "blocks.pt")
    (tmp_path / "blocks.json").write_text(json.dumps({"width": 8}))
    yield tmp_path
    del ENCODERS["blocks"]


def test_it_encodes_and_trains(folder):
    encoder = load_speech_encoder(folder, config=EncoderConfig(freeze=["bias"]))
    assert isinstance(encoder, BlockEncoder) and not encoder.training
    assert trained_shapes(encoder) == {"encoder.weight": (8, 320)}
    frames, lengths = encoder(torch.randn(2, 1000), torch.tensor([1000, 700]))
    count = FrameCounter(encoder.shape.stages, 16000)
    assert frames.shape == (2, 3, 8) and lengths.tolist() == [count(1000), count(700)] and frames.requires_grad


def test_a_plan_counts_it(folder):
    facts = footprint.read_encoder_settings(folder, EncoderConfig(freeze=["bias"]))
    assert (facts.shape.size, facts.parameters, facts.numbers, facts.fixed_bytes) == (8, 2568, 2568, 0)
    assert (facts.trained, facts.windowed, facts.padded) == (2560, False, False)
    sizes = dict(frames=10, bytes_per_param=2, share=1, states=2)
    parts = footprint.speech_parts(facts, ConnectorConfig(hidden_size=4, frame_rate=12.5), 16, **sizes)
    # in float32 where it trains; the first convolution works on 10 frames of 4 blocks, two at a time
    assert parts.encoder_bytes == 8 * 4 and parts.work[-1].size == 2 * 20 * 16 * 2
    beside = footprint.read_encoder_settings(folder, EncoderSection(beside=SecondEncoder(path=str(folder))))
    assert beside.shape.size == 16 and len(beside.parts) == 2


def test_its_fingerprint_covers_its_files(folder):
    before = kind_of(folder).fingerprint(folder)
    assert BlockEncoder.files(folder) == [folder / "blocks.json", folder / "blocks.pt"]
    (folder / "blocks.json").write_text(json.dumps({"width": 9}))
    assert before != kind_of(folder).fingerprint(folder)


class Archive:
    """The encoder's part of a full ``.nemo``."""

    def __init__(self, encoder, settings):
        self._settings, self._state = settings, encoder.state_dict()
        self.shapes = {name: tuple(value.shape) for name, value in self._state.items()}

    def settings(self, name):
        assert name == ENCODER_SETTINGS
        return read_yaml(self._settings, name)

    def tensors(self, name):
        assert name == ENCODER_WEIGHTS
        return self

    def tensor(self, name):
        return self._state[name]


def test_a_full_archive_holds_it(folder):
    encoder = load_speech_encoder(folder)
    settings = encoder_settings(encoder)
    restored = read_encoder(Archive(encoder, settings), torch.float32)
    assert isinstance(restored, BlockEncoder) and b"kind: blocks" in settings
    torch.testing.assert_close(restored.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="encoder.yaml does not fit encoder/encoder.safetensors"):
        read_encoder(Archive(encoder, settings.replace(b"8", b"9")), torch.float32)
    with pytest.raises(ValueError, match="names the encoder kind unknown: import what registers it first"):
        read_encoder(Archive(encoder, settings.replace(b"blocks", b"unknown")), torch.float32)


def test_kinds_are_named_once_and_tried_from_the_last(folder):
    with pytest.raises(ValueError, match="'blocks' is registered already"):
        register_encoder("blocks", BlockEncoder)
    (folder / "config.json").write_text("{}")  # Hugging Face's too
    assert kind_of(folder) is BlockEncoder and name_of(BlockEncoder) == "blocks"
    assert kind_of(folder / "nowhere") is NemoEncoder and name_of(HFSpeechEncoder) == "hf"


def test_errors_name_the_kind(folder):
    (folder / "blocks.pt").unlink()
    with pytest.raises(ValueError, match="model.pretrained_asr=.* is not a readable block encoder"):
        load_speech_encoder(folder)
