# SPDX-License-Identifier: Apache-2.0
"""``MTBIModel.generate``: audio as users have it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from lightning.pytorch import seed_everything
from scipy.signal import resample_poly

from nemo_mtbi.models.mtbi_model import MTBIModel

RATE = 16000
PROMPTS = ["say it", "first word", "count it"]


@pytest.fixture(scope="module")
def model(model_section):
    seed_everything(0, verbose=False)
    return MTBIModel(model_section())


@pytest.fixture(scope="module")
def utterances(model_section):
    """Arrays ``[n]`` at 16 kHz, without energy above 4 kHz."""
    cuts = CutSet.from_file(model_section().train_ds.cuts_path)
    return [resample_poly(resample_poly(cut.load_audio()[0], 1, 2), 2, 1).astype(np.float32) for cut in cuts][:3]


def test_an_answer_does_not_depend_on_the_batch(model, utterances):
    together = model.generate(utterances, PROMPTS)
    alone = [model.generate([audio], prompt)[0] for audio, prompt in zip(utterances, PROMPTS, strict=True)]
    assert together == alone and len(set(alone)) == 3


def test_one_prompt_serves_all_and_may_be_empty(model, utterances):
    assert model.generate(utterances, "say it") == model.generate(utterances, ["say it"] * 3)
    assert len(model.generate(utterances, "")) == 3
    assert model.generate([], "say it") == []


def test_files_arrays_tensors_and_channels_mean_the_same(model, utterances, tmp_path):
    expected = model.generate(utterances, PROMPTS)
    paths = [tmp_path / f"{number}.wav" for number in range(3)]
    for path, samples in zip(paths, utterances, strict=True):
        soundfile.write(path, samples, RATE, subtype="FLOAT")
    forms = {
        "path": paths,
        "name": [str(path) for path in paths],
        "tensor": [torch.from_numpy(samples) for samples in utterances],
        "one channel": [samples[None] for samples in utterances],
        "two channels": [np.stack([1.5 * samples, 0.5 * samples]) for samples in utterances],
    }
    assert {form: model.generate(audio, PROMPTS) for form, audio in forms.items()} == dict.fromkeys(forms, expected)


@pytest.mark.parametrize("rate, up, down", [(8000, 1, 2), (44100, 441, 160)])
@pytest.mark.parametrize("as_file", [False, True])
def test_other_sample_rates_give_the_same_answer(model, utterances, tmp_path, rate, up, down, as_file):
    audio = [resample_poly(samples, up, down).astype(np.float32) for samples in utterances]
    if as_file:
        for number, samples in enumerate(audio):
            stereo = np.stack([samples, samples], axis=1)
            soundfile.write(tmp_path / f"{number}.wav", stereo, rate, subtype="FLOAT")
        answers = model.generate([tmp_path / f"{number}.wav" for number in range(3)], PROMPTS)
    else:
        answers = model.generate(audio, PROMPTS, sample_rate=rate)
    assert answers == model.generate(utterances, PROMPTS)


def test_calls_that_do_not_fit_say_what_to_give(model, utterances):
    with pytest.raises(ValueError, match="3 utterances, but 2 prompts: give one each, or one for all"):
        model.generate(utterances, PROMPTS[:2])
    for audio in ("a.wav", Path("a.wav"), utterances[0], torch.from_numpy(utterances[0])):
        with pytest.raises(ValueError, match=r"audio must be a list .*audio=\[...\]"):
            model.generate(audio, "say it")


def test_audio_that_is_too_long_is_refused_before_it_is_encoded(model, monkeypatch):
    """The encoder's memory grows with the square of the length."""
    monkeypatch.setattr(model.speech_llm.encoder, "forward", lambda *args: pytest.fail("it was encoded"))
    noise = np.random.default_rng(0).standard_normal(60 * RATE, dtype=np.float32)
    with pytest.raises(ValueError, match=r"75\d\d positions; .* the LLM takes 1 to 120: use shorter audio"):
        model.generate([np.tile(noise, 20)], "say it")
