# SPDX-License-Identifier: Apache-2.0
"""Sizes of the speech side, without weights, against the modules with weights."""

import pytest
import torch

from nemo_mtbi.config.checks import choices
from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.planning.footprint import kept_bytes, read_encoder_settings, speech_parts
from nemo_mtbi.planning.memory import total
from nemo_mtbi.speech_llm.connector import build_connector
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder
from nemo_mtbi.testing import tiny_asr_nemo


@pytest.fixture(scope="module", params=["tiny", "demo"])
def archive(request, tmp_path_factory):
    return "demo" if request.param == "demo" else tiny_asr_nemo(tmp_path_factory.mktemp("asr") / "asr.nemo")


def test_an_encoder_without_weights_is_like_the_loaded_one(archive):
    facts, encoder = read_encoder_settings(archive), load_speech_encoder(archive)
    assert facts.shape == encoder.shape
    assert facts.parameters == sum(value.numel() for value in encoder.parameters())
    held = sum(value.numel() * value.element_size() for value in (*encoder.parameters(), *encoder.buffers()))
    assert facts.numbers * 4 + facts.fixed_bytes == held
    encoder.encoder.to(torch.bfloat16)
    held = sum(value.numel() * value.element_size() for value in (*encoder.parameters(), *encoder.buffers()))
    assert facts.numbers * 2 + facts.fixed_bytes == held


@pytest.mark.parametrize("kind", choices(ConnectorConfig, "kind"))
def test_the_connector_counts_as_built(kind, archive):
    facts, config = read_encoder_settings(archive), ConnectorConfig(kind, hidden_size=24)
    parts = speech_parts(facts, config, 32, frames=10, bytes_per_param=2, share=2, states=2)
    connector = build_connector(config, facts.shape.size, 32, facts.shape.frame_rate)
    assert parts.trained_parameters == sum(value.numel() for value in connector.parameters())
    steps = 10 * connector.reduction
    kept = kept_bytes(connector, torch.randn(1, steps, facts.shape.size), torch.tensor([steps]))
    # the first convolution halves time and bands: 10 frames of 16 encoder steps of 8 feature frames are 80 of its own
    bands = facts.convolution
    assert total(parts.work) == kept + 2 * 10 * 32 * 4 + 2 * (steps * 8 // 2) * bands * 2 // 2
    assert parts.encoder_bytes == facts.numbers * 2 + facts.fixed_bytes


def test_what_autograd_keeps_of_a_linear_layer_is_its_input():
    layer = torch.nn.Linear(3, 5)
    assert kept_bytes(layer, torch.zeros(7, 3)) == 7 * 3 * 4
    assert kept_bytes(torch.nn.Sequential(layer, torch.nn.GELU()), torch.zeros(7, 3)) == 7 * (3 + 5) * 4


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_archive_is_refused(content, tmp_path):
    (tmp_path / "x.nemo").write_bytes(content)
    with pytest.raises(ValueError, match="model.pretrained_asr=.*x.nemo.* is not a readable NeMo ASR checkpoint"):
        read_encoder_settings(tmp_path / "x.nemo")


def test_a_path_that_does_not_exist():
    with pytest.raises(ValueError, match="model.pretrained_asr=/nowhere: /nowhere does not exist"):
        read_encoder_settings("/nowhere")
