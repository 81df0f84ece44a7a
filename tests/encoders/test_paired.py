# SPDX-License-Identifier: Apache-2.0
"""Two encoders side by side."""

import pytest
import torch
from hf_models import hf_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderSection, SecondEncoder
from nemo_mtbi.encoders.base import EncoderShape
from nemo_mtbi.encoders.paired import PairedEncoder
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.planning.footprint import read_encoder_settings, speech_parts
from nemo_mtbi.planning.memory import total
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder
from nemo_mtbi.testing import tiny_asr_nemo


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    found = {name: hf_encoder(folder / name, name) for name in ("whisper", "wavlm")}
    return {**found, "nemo": tiny_asr_nemo(folder / "asr.nemo")}


def section(path, **values):
    return EncoderSection(pad=False, beside=SecondEncoder(path=str(path), pad=False), **values)


@pytest.fixture(scope="module", params=[("nemo", "wavlm"), ("wavlm", "nemo"), ("whisper", "wavlm")])
def pair(request, paths):
    """Both together, and each alone."""
    first, second = request.param
    both = load_speech_encoder(paths[first], config=section(paths[second]))
    alone = EncoderSection(pad=False)
    return both, load_speech_encoder(paths[first], config=alone), load_speech_encoder(paths[second], config=alone)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(800, 48000), min_size=1, max_size=3))
def test_each_frame_has_what_the_other_gives_in_the_same_time(pair, lengths):
    both, first, second = pair
    audio = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(0)) * 0.1
    frames, counts = both(audio, torch.tensor(lengths))
    own, own_counts = first(audio, torch.tensor(lengths))
    other, other_counts = second(audio, torch.tensor(lengths))
    assert counts.tolist() == own_counts.tolist() == [counter(both)(n) for n in lengths]
    assert frames.shape[-1] == both.shape.size
    torch.testing.assert_close(frames[..., : first.shape.size], own)
    step, other_step = counter(first).samples_per_frame, counter(second).samples_per_frame
    for u, count in enumerate(counts.tolist()):
        for e in range(count):
            given = frames[u, e, first.shape.size :].reshape(-1, second.shape.size)
            for index, found in enumerate(given):
                place = (e * step + index * other_step) // other_step
                expected = other[u, place] if place < other_counts[u] else torch.zeros_like(found)
                torch.testing.assert_close(found, expected)


def counter(encoder):
    return FrameCounter(encoder.shape.stages, encoder.shape.sample_rate)


def test_the_footprint_is_that_of_both(paths):
    config = section(paths["wavlm"], freeze=False)
    both = read_encoder_settings(str(paths["nemo"]), config)
    built = load_speech_encoder(paths["nemo"], torch.bfloat16, config)
    assert isinstance(built, PairedEncoder) and both.shape == built.shape
    first, second = both.parts
    assert [part.parameters for part in both.parts] == [
        sum(value.numel() for value in part.parameters()) for part in (built.first, built.second)
    ]
    assert first.trained == sum(value.numel() for value in built.first.parameters()) and second.trained == 0
    held = [value for value in [*built.parameters(), *built.buffers()] if not value.requires_grad]
    bytes_held = sum(value.numel() * value.element_size() for value in held)
    assert first.frozen_bytes(2) + second.frozen_bytes(2) == bytes_held


@pytest.mark.parametrize("names", [("nemo", "wavlm"), ("wavlm", "nemo")])
def test_the_fuller_moment_counts(paths, names):
    """Each hears the same samples, one after the other."""
    first, second = (str(paths[name]) for name in names)
    facts = [
        read_encoder_settings(first, section(second)),
        *(read_encoder_settings(path, EncoderSection()) for path in (first, second)),
    ]
    settings = dict(hidden=16, bytes_per_param=2, share=1, states=2)
    moments = []
    for found in facts:
        rate = found.shape.frame_rate  # 60 s, one connector frame for each of the encoder's
        parts = speech_parts(found, ConnectorConfig(frame_rate=rate), frames=round(60 * rate), **settings)
        moments.append(total([parts.work[-1]]))
    assert moments[0] == pytest.approx(max(moments[1:]), rel=0.01)


def test_what_does_not_fit_together_is_refused(paths, monkeypatch):
    with pytest.raises(ValueError, match="model.encoder.beside.path=nothing: nothing does not exist"):
        load_speech_encoder(paths["nemo"], config=section("nothing"))
    first, second = (load_speech_encoder(paths[name]) for name in ("nemo", "wavlm"))
    shape = second.shape
    monkeypatch.setattr(second, "shape", EncoderShape(shape.size, 8000, shape.stages))
    with pytest.raises(ValueError, match="beside takes 8000 Hz, and model.pretrained_asr 16000 Hz"):
        PairedEncoder(first, second)
    odd = (*shape.stages[:-1], type(shape.stages[-1])(3, 3))
    monkeypatch.setattr(second, "shape", EncoderShape(shape.size, 16000, odd))
    with pytest.raises(ValueError, match="one must be a multiple of the other"):
        PairedEncoder(first, second)
