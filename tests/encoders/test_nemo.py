# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel, EncDecRNNTBPEModel
from nemo.collections.asr.parts.submodules.subsampling import calc_length
from nemo_models import canary, characters, transducer
from torch import nn

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.nemo import NemoEncoder
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder
from nemo_mtbi.testing import tiny_asr_model


@pytest.fixture(scope="module")
def encoder(asr_model):
    return NemoEncoder(asr_model)


def sound(lengths, seed=0):
    """Utterances of noise, zero padded: [U, N] and [U]."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)


def test_it_is_the_front_end_and_the_encoder_of_the_model(encoder, asr_model):
    audio, lengths = sound([20000, 9000])
    asr_model.eval()
    log_probs, expected, _ = asr_model(input_signal=audio, input_signal_length=lengths)
    frames, found = encoder(audio, lengths)
    assert frames.shape == (2, 16, 16) and encoder.shape.size == 16
    assert encoder.shape.frame_rate == 12.5
    assert found.tolist() == expected.tolist()
    torch.testing.assert_close(asr_model.decoder(encoder_output=frames.transpose(1, 2)), log_probs, rtol=0, atol=1e-6)


def test_it_stays_in_eval_and_frozen(encoder):
    parent = nn.Sequential(encoder)
    parent.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(value.requires_grad for value in encoder.parameters())
    audio, lengths = sound([16000])
    first, second = encoder(audio, lengths)[0], encoder(audio, lengths)[0]
    assert torch.equal(first, second)  # no dropout, no dither
    assert not first.requires_grad


def test_padding_changes_nothing(encoder):
    lengths = [31999, 16000, 5000, 700]
    audio, _ = sound(lengths)
    together, counts = encoder(audio, torch.tensor(lengths))
    wider, _ = encoder(torch.nn.functional.pad(audio, (0, 16000)), torch.tensor(lengths))
    for u, n in enumerate(lengths):
        alone, count = encoder(audio[u : u + 1, :n], torch.tensor([n]))
        assert count.item() == counts[u]
        torch.testing.assert_close(together[u, :count], alone[0, :count], rtol=0, atol=1e-5)
        torch.testing.assert_close(wider[u, :count], alone[0, :count], rtol=0, atol=1e-5)


KINDS = {
    "ctc": tiny_asr_model,
    "characters": lambda folder: characters(),
    "transducer": lambda folder: transducer(EncDecRNNTBPEModel, folder),
    "hybrid": lambda folder: transducer(EncDecHybridRNNTCTCBPEModel, folder),
    "canary": canary,
    "limited_context": lambda folder: transducer(
        EncDecRNNTBPEModel, folder, att_context_size=[6, 2], att_context_style="chunked_limited"
    ),
    "local": lambda folder: tiny_asr_model(folder, self_attention_model="rel_pos_local_attn", att_context_size=[8, 8]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_of_every_kind_of_nemo_is_that_of_its_file(kind, tmp_path):
    """Also those whose attention sees a part of the utterance only: it sees the same part here."""
    model = KINDS[kind](tmp_path / "tokenizer")
    model.eval()
    model.save_to(str(tmp_path / "asr.nemo"))
    encoder = load_speech_encoder(tmp_path / "asr.nemo")
    audio, lengths = sound([40000, 23456])
    features, counts = model.preprocessor(input_signal=audio, length=lengths)
    expected, expected_lengths = model.encoder(audio_signal=features, length=counts)
    found, found_lengths = encoder(audio, lengths)
    assert found_lengths.tolist() == expected_lengths.tolist()
    torch.testing.assert_close(found, expected.transpose(1, 2).detach(), rtol=0, atol=1e-5)


def test_long_audio_is_heard_in_windows(tmp_path):
    """Of an encoder whose frames see 1.4 s about them, windows that overlap by 4 s give the frames of the whole."""
    model = tiny_asr_model(
        tmp_path, self_attention_model="rel_pos_local_attn", att_context_size=[8, 8], conv_kernel_size=5
    )
    model.preprocessor.featurizer.normalize = None  # by the mean of what is heard, which windows have of their own
    whole = NemoEncoder(model)
    cut = NemoEncoder(model, EncoderConfig(window_seconds=10.0, overlap_seconds=4.0))
    audio, lengths = sound([16000 * 25 + 123, 16000 * 10, 3000, 16000 * 11, 90])
    expected, counts = whole(audio, lengths)
    found, found_counts = cut(audio, lengths)
    assert found_counts.tolist() == counts.tolist() and found.shape == expected.shape
    for u, count in enumerate(counts.tolist()):
        torch.testing.assert_close(found[u, :count], expected[u, :count], rtol=0, atol=1e-5)


def test_layers_are_for_others(asr_model):
    with pytest.raises(ValueError, match="model.encoder.layers is for encoders of Hugging Face"):
        NemoEncoder(asr_model, EncoderConfig(layers=[1]))


@given(st.integers(1, 60 * 16000))
def test_frames_are_those_of_nemo_up_to_a_minute(encoder, samples):
    """By NeMo's own functions of lengths, which are what it masks by."""
    features = encoder.preprocessor.featurizer.get_seq_len(torch.tensor([samples]))
    stem = encoder.encoder.pre_encode
    (frames,) = calc_length(
        features,
        all_paddings=stem._left_padding + stem._right_padding,
        kernel_size=stem._kernel_size,
        stride=stem._stride,
        ceil_mode=stem._ceil_mode,
        repeat_num=stem._sampling_num,
    )
    assert FrameCounter(encoder.shape.stages, 16000)(samples) == max(int(frames), 0)


SUBSAMPLING = [("dw_striding", 8), ("dw_striding", 4), ("striding", 4), ("striding", 2)]


@pytest.mark.parametrize("kind, factor", SUBSAMPLING)
def test_frames_are_those_that_the_counter_counts(tmp_path, kind, factor):
    encoder = NemoEncoder(tiny_asr_model(tmp_path, subsampling=kind, subsampling_factor=factor))
    counter = FrameCounter(encoder.shape.stages, encoder.shape.sample_rate)
    assert counter.samples_per_frame == 160 * factor and encoder.shape.frame_rate == 100 / factor
    generator = torch.Generator().manual_seed(1)
    samples = [*range(160, 200), *torch.randint(160, 40000, (300,), generator=generator).tolist()]
    samples += [edge + offset for edge in range(1280, 20000, 1280) for offset in (-1, 0, 1)]
    for first in range(0, len(samples), 64):
        part = samples[first : first + 64]
        frames, lengths = encoder(torch.zeros(len(part), max(part)), torch.tensor(part))
        assert lengths.tolist() == [counter(n) for n in part]
        assert frames.shape[1] >= max(lengths)


def test_audio_shorter_than_a_frame_gives_none(encoder):
    counter = FrameCounter(encoder.shape.stages, encoder.shape.sample_rate)
    for n in (1, 80, 159, 160):
        frames, lengths = encoder(*sound([n]))
        assert lengths.tolist() == [counter(n)] == [int(n == 160)]
        assert frames.isfinite().all()


def test_the_front_end_stays_in_float32(encoder, tmp_path):
    half = NemoEncoder(tiny_asr_model(tmp_path))
    half.encoder.to(torch.bfloat16)
    seen = []
    half.preprocessor.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    audio, lengths = sound([16000])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frames, _ = half(audio.to(torch.bfloat16), lengths)
    reference = encoder.preprocessor(input_signal=audio.to(torch.bfloat16).float(), length=lengths)[0]
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], reference)
    assert frames.dtype == torch.bfloat16


class Quartz(nn.Module):
    """An encoder that strides elsewhere than in ``pre_encode``."""

    d_model = 4


def test_encoders_whose_frames_cannot_be_counted_are_refused(asr_model):
    def model(**parts):
        own = {"preprocessor": asr_model.preprocessor, "encoder": asr_model.encoder, "cfg": asr_model.cfg}
        return SimpleNamespace(**{**own, **parts})

    with pytest.raises(ValueError, match="Quartz.*use a Conformer or FastConformer"):
        NemoEncoder(model(encoder=Quartz()))
    with pytest.raises(ValueError, match="Linear can't be counted; use .* AudioToMelSpectrogramPreprocessor"):
        NemoEncoder(model(preprocessor=nn.Linear(2, 2)))


def test_an_encoder_that_strides_once_more_is_refused(tmp_path):
    """Its pre_encode looks well, but a reduction inside halves the frames again."""
    model = tiny_asr_model(tmp_path, n_layers=2, reduction="pooling", reduction_position=0, reduction_factor=2)
    with pytest.raises(ValueError, match="its configuration says"):
        NemoEncoder(model)


def test_stacking_subsampling_is_refused(tmp_path):
    with pytest.raises(ValueError, match="StackingSubsampling has no convolutional subsampling"):
        NemoEncoder(tiny_asr_model(tmp_path, subsampling="stacking"))
