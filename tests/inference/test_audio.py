# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly

from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.inference.audio import load_audio
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

RATE = 16000
FRAMES = FrameCounter((LengthStage(400, 160), LengthStage(16, 16)), RATE)


@pytest.fixture
def speech():
    """One second without energy above 4 kHz."""
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, RATE // 4)
    return resample_poly(noise, 4, 1).astype(np.float32)


def close(found, expected, tolerance=1e-6):
    assert found.dtype == torch.float32 and found.ndim == 1
    middle = slice(400, -400)  # resampling filters differ at the ends
    return found.shape == expected.shape and np.abs(found.numpy() - expected)[middle].max() < tolerance


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: torch.from_numpy(x),
        lambda x: x.astype(np.float64),
        lambda x: x[None],
        lambda x: np.stack([x, x]),
        lambda x: np.stack([1.5 * x, 0.5 * x, x]),
        lambda x: np.stack([1.5 * x, 0.5 * x], axis=1),  # as soundfile gives it
        lambda x: torch.from_numpy(x)[:, None],
        lambda x: np.repeat(x, 2)[::2],  # with a stride
        lambda x: x.tolist(),
    ],
)
def test_arrays_become_mono_float32(speech, form):
    assert close(load_audio(form(speech), FRAMES), speech)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_pcm_integers_are_scaled(speech, dtype):
    pcm = (np.iinfo(dtype).max * speech.astype(np.float64)).astype(dtype)
    assert close(load_audio(pcm, FRAMES), speech, 1e-4)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, complex])
def test_other_numbers_are_refused(dtype):
    with pytest.raises(ValueError, match="must hold floats, int16 or int32, got "):
        load_audio(np.arange(RATE).astype(dtype), FRAMES)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_arrays_of_any_rate_are_resampled(speech, rate):
    other = resample_poly(speech, rate // 50, RATE // 50)
    assert close(load_audio(other, FRAMES, rate), speech, 0.01)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_know_their_rate_and_channels(speech, tmp_path, suffix, rate, channels):
    samples = resample_poly(speech, rate // 100, RATE // 100)
    path = tmp_path / f"speech.{suffix}"
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate)
    found = load_audio(path, FRAMES, sample_rate=11025)  # of arrays only
    assert found.shape == speech.shape
    error = (found.numpy() - speech)[400:-400]
    assert np.abs(error).max() < (0.3 if suffix == "ogg" else 0.01)  # ogg is lossy
    assert np.corrcoef(found.numpy(), speech)[0, 1] > 0.95


def audio_file(tmp_path, content):
    path = tmp_path / "audio.wav"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"", b"no audio", b"RIFF\x00\x00\x00\x00WAVEfmt "])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_file_that_is_no_audio_is_named(tmp_path, content, as_text):
    path = audio_file(tmp_path, content)
    with pytest.raises(BadAudioError, match="audio.wav can't be read as audio") as error:
        load_audio(str(path) if as_text else path, FRAMES)
    assert error.value.reason == "unreadable"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nothing.wav", tmp_path):
        with pytest.raises(BadAudioError, match=f"there is no audio file '{path}'"):
            load_audio(path, FRAMES)


def test_a_truncated_file_is_refused(tmp_path, speech):
    soundfile.write(tmp_path / "whole.flac", speech, RATE)
    whole = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadAudioError, match="half") as error:
        load_audio(tmp_path / "half.flac", FRAMES)
    assert error.value.reason == "unreadable"


def bad(kind):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
    if kind == "not_finite":
        samples[77] = np.nan
    return {"empty": samples[:0], "silent": 0 * samples, "too_short": samples[:100]}.get(kind, samples)


@pytest.mark.parametrize("kind", ["empty", "silent", "not_finite", "too_short"])
@pytest.mark.parametrize("rate", [8000, 16000])
def test_samples_without_speech_are_refused_by_reason(tmp_path, kind, rate):
    with pytest.raises(BadAudioError, match="the audio array") as error:
        load_audio(bad(kind), FRAMES, rate)
    assert error.value.reason == kind


@pytest.mark.parametrize("kind, reasons", [("empty", ("empty", "unreadable")), ("silent", ("silent",))])
def test_files_without_speech_are_refused_too(tmp_path, kind, reasons):
    soundfile.write(tmp_path / "bad.wav", bad(kind), RATE)
    with pytest.raises(BadAudioError, match="bad") as error:
        load_audio(tmp_path / "bad.wav", FRAMES)
    assert error.value.reason in reasons


@pytest.mark.parametrize("samples", [np.float32(3), np.zeros((1, 2, 3), np.float32)])
def test_other_shapes_are_refused(samples):
    with pytest.raises(ValueError, match=r"must be \[n\], \[channels, n\] or \[n, channels\], got shape"):
        load_audio(samples, FRAMES)


@pytest.mark.parametrize("rate", [0, -16000])
def test_a_rate_must_be_positive(speech, rate):
    with pytest.raises(ValueError, match="sample_rate"):
        load_audio(speech, FRAMES, rate)


def test_a_file_that_is_too_long_is_refused_by_its_header(tmp_path, speech, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(speech, 30), RATE)
    longest = FRAMES(30 * RATE)
    assert len(load_audio(path, FRAMES, longest=longest)) == 30 * RATE
    monkeypatch.setattr("nemo_mtbi.inference.audio.load_samples", None)  # nothing is read
    with pytest.raises(BadAudioError, match=f"{path} has 30 s, but the LLM takes .* s at most: use shorter") as error:
        load_audio(path, FRAMES, longest=longest - 1)
    assert error.value.reason == "too_long"
