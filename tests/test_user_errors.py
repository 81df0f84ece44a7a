# SPDX-License-Identifier: Apache-2.0
"""What users get wrong, as they would meet it: each gives one clear message or a counted skip.

The list is that of the first milestone; the files that test a part go into the details.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from lhotse import CutSet
from omegaconf import OmegaConf

from nemo_mtbi.commands.train import train
from nemo_mtbi.layouts.layout import collate, make_row
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.targets.tasks import TaskPool
from nemo_mtbi.testing import tiny_cuts

RATE = 16000
SPOILED = 2  # the number of the cut that a test spoils


def says(message, action):
    """``action`` raises a ValueError of one line that holds ``message``, a regular expression."""
    with pytest.raises(ValueError, match=message) as error:
        action()
    assert "\n" not in str(error.value)
    return error


@pytest.fixture(scope="module")
def model(model_section):
    return MTBIModel(model_section())


@pytest.fixture
def section(model_section, tmp_path):
    """A ``model:`` section whose data may be spoiled."""
    values = model_section()
    values.train_ds.cuts_path = str(tiny_cuts(tmp_path / "cuts", 5, llm=values.pretrained_llm))
    return values


def spoil(section, change):
    """Applies ``change`` to one cut of the training data."""
    path = section.train_ds.cuts_path
    cuts = list(CutSet.from_file(path))
    change(cuts[SPOILED])
    CutSet.from_cuts(cuts).to_file(path)


def train_on(section, policy):
    """What is left out of a pass over the training data, by reason."""
    section.on_bad_audio = policy
    skipped = {}
    for batch in MTBIModel(section)._train_dl:
        for reason, count in batch.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
        assert all(microbatch.layout.numel() for microbatch in batch.microbatches)
    return skipped


# Manifests ------------------------------------------------------------


@pytest.mark.parametrize("key", ["cuts_path", "manifest_filepath", "shar_path"])
@pytest.mark.parametrize("data", ["train_ds", "validation_ds"])
def test_missing_manifest(section, key, data):
    section[data] = {key: "/nowhere/data.jsonl", "batch_size": 2}
    says(f"{key}: there is no '/nowhere/data.jsonl': check the path", lambda: MTBIModel(section))


@pytest.mark.parametrize("key", ["cuts_path", "manifest_filepath"])
@pytest.mark.parametrize("text", ["no json\n", "", '{"text": "neither audio nor times"}\n', "\x00\x01"])
def test_unreadable_manifest(section, tmp_path, key, text):
    (tmp_path / "data.jsonl").write_text(text)
    section.train_ds = {key: str(tmp_path / "data.jsonl"), "batch_size": 2}
    says(rf"{key}={tmp_path}/data.jsonl.* is not JSON|holds no|is not an entry|has no id|", lambda: MTBIModel(section))


# Cuts ------------------------------------------------------------


def without_transcript(cut):
    cut.supervisions[0].text = None


def test_cut_without_transcript(section):
    spoil(section, without_transcript)
    says("cut tiny-0-0002 has no transcript.*on_bad_audio: skip", lambda: train_on(section, "raise"))
    assert train_on(section, "skip") == {"no_transcript": 1}


def audio_of(cut):
    return Path(cut.recording.sources[0].source)


def rewritten(samples):
    def change(cut):
        soundfile.write(audio_of(cut), samples(cut.num_samples), RATE, format="WAV", subtype="FLOAT")

    return change


def truncated(cut):
    whole = audio_of(cut).read_bytes()
    audio_of(cut).write_bytes(whole[: len(whole) // 2])


def noise(n):
    return np.random.default_rng(0).uniform(-0.5, 0.5, n)


BAD_AUDIO = {  # spoils the file of a cut; the reasons under which it may be counted; the message
    "an empty file": (lambda cut: audio_of(cut).write_bytes(b""), "unreadable", "cannot be read"),
    "no file": (lambda cut: audio_of(cut).unlink(), "unreadable", "cannot be read"),
    "no audio": (lambda cut: audio_of(cut).write_text("no audio"), "unreadable", "cannot be read"),
    "silence": (rewritten(np.zeros), "silent", "is silent"),
    "no sample": (rewritten(lambda n: np.zeros(0)), "unreadable", "cannot be read"),
    "NaN": (rewritten(lambda n: np.where(np.arange(n) == 99, np.nan, noise(n))), "not_finite", "holds NaN"),
    "a truncated file": (truncated, "unreadable", "cannot be read"),
    "less than was promised": (rewritten(lambda n: noise(n // 2)), "unreadable", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio(section, kind):
    change, reason, message = BAD_AUDIO[kind]
    spoil(section, change)
    says(f"the audio of cut tiny-0-0002 {message}.*on_bad_audio: skip", lambda: train_on(section, "raise"))
    assert train_on(section, "skip") == {reason: 1}


def resized(samples):
    """The manifest's own idea of the length."""

    def change(cut):
        cut.recording.num_samples, cut.recording.duration, cut.duration = samples, samples / RATE, samples / RATE

    return change


def test_cut_of_no_length(section):
    spoil(section, resized(50))
    says("cut tiny-0-0002 is too short.*on_bad_audio: skip", lambda: train_on(section, "raise"))
    assert train_on(section, "skip") == {"too_short": 1}


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_two_hours_of_audio_in_the_data(section, policy):
    spoil(section, resized(2 * 3600 * RATE))
    assert train_on(section, policy) == {"longer_than_max_duration": 1}


def test_audio_of_minutes_that_the_llm_cannot_take(section):
    spoil(section, resized(40 * RATE))
    assert train_on(section, "raise") == {"row_length": 2}  # both rows of the cut


# Audio that generate() gets ------------------------------------------------------------

ARRAYS = {
    "empty": (lambda: np.zeros(0, np.float32), "has no samples"),
    "silent": (lambda: np.zeros(RATE, np.float32), "is silent"),
    "NaN": (lambda: np.full(RATE, np.nan, np.float32), "NaN"),
    "short": (lambda: noise(50), "too short"),
    "two hours": (lambda: np.tile(noise(60 * RATE).astype(np.float32), 120), "45005 positions; .*use shorter audio"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_are_no_utterance(model, kind):
    make, message = ARRAYS[kind]
    says(message, lambda: model.generate([make()], "say it"))


@pytest.mark.parametrize("kind", [kind for kind in BAD_AUDIO if kind != "less than was promised"])
def test_files_that_are_no_utterance(model, section, kind):
    spoil(section, BAD_AUDIO[kind][0])
    path = Path(section.train_ds.cuts_path).parent / "audio" / "tiny-0-0002.flac"
    error = says("tiny-0-0002", lambda: model.generate([path], "say it"))
    assert error.value.reason in (BAD_AUDIO[kind][1], "empty")


def test_a_file_of_hours_is_refused_before_it_is_read(model, tmp_path, monkeypatch):
    with soundfile.SoundFile(tmp_path / "hours.wav", "w", RATE, 1) as file:
        for _ in range(3 * 60):
            file.write(np.zeros(60 * RATE, np.int16))
    monkeypatch.setattr("lhotse.cut.MonoCut.load_audio", lambda *a, **k: pytest.fail("it was read"))
    says("hours.wav has 10800 s, but the LLM takes", lambda: model.generate([tmp_path / "hours.wav"], "say it"))


# Configuration ------------------------------------------------------------

SECTIONS = {"name": "run", "seed": 0, "trainer": {}, "exp_manager": {}}


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"modle": {}}, "unknown section modle: did you mean 'model'"),
        ({"data": {"train_utterance": 1}}, "unknown key data.train_utterance: did you mean 'train_utterances'"),
        ({"model": {"connecter": {}}}, "unknown key model.connecter: did you mean 'connector'"),
        (
            {"model": {"connector": {"frame_rte": 1}}},
            "unknown key model.connector.frame_rte: did you mean 'frame_rate'",
        ),
        (
            {"model": {"train_ds": {"rows_per_cuts": 1}}},
            "unknown data key 'rows_per_cuts': did you mean 'rows_per_cu",
        ),
        ({"trainer": {"max_epoch": 1}}, "unknown key trainer.max_epoch: did you mean 'max_epochs'"),
        ({"benchmark": {"cut": "x"}}, "unknown key benchmark.cut: did you mean 'cuts'"),
        ({"exp_manager": {"exp_dri": "x"}}, "unknown key exp_manager.exp_dri: did you mean 'exp_dir'"),
        ({"model": {"train_ds": {"batch_tokens": 9}}}, "batch_size and batch_tokens are both set.*keep one"),
        ({"model": {"validation_ds": {"batch_tokens": 9}}}, "batch_size and batch_tokens are both set.*keep one"),
    ],
)
def test_unknown_and_contradictory_keys(model_section, extra, message, tmp_path):
    cfg = OmegaConf.merge(SECTIONS, {"model": model_section(), "exp_manager": {"exp_dir": str(tmp_path)}}, extra)
    says(message, lambda: train(cfg))


def task(**changes):
    return {"name": "say", "scoring": "wer", "split": "train", "prompts": {"train": ["say it"]}, **changes}


@pytest.mark.parametrize(
    "tasks, message",
    [
        ([task(scoring="bleurt")], "task 'say': scoring is 'bleurt'; it must be one of wer, cer, exact"),
        ([task(), task(scoring="exact")], "duplicate task name 'say'.*rename or remove one"),
    ],
)
def test_task_pools_that_make_no_sense(model_section, tmp_path, tasks, message):
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks}))
    says(f"{path}: {message}", lambda: TaskPool.from_yaml(path))
    cfg = OmegaConf.merge(SECTIONS, {"model": model_section(), "benchmark": {"tasks": str(path)}})
    says(f"{path}: {message}", lambda: train(cfg))


# Models and layouts ------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b but no gzip", json.dumps({"a": 1}).encode()])
def test_nemo_that_is_none(tmp_path, content):
    (tmp_path / "model.nemo").write_bytes(content)
    says(
        "model.nemo can't be restored: it is not a .nemo", lambda: MTBIModel.restore_from(str(tmp_path / "model.nemo"))
    )


def test_nemo_of_another_model(model_section):
    path = model_section().pretrained_asr
    says("it holds a nemo.collections.asr.*EncDecCTCModelBPE, no MTBI model", lambda: MTBIModel.restore_from(path))


def test_layout_past_the_last_frame(model):
    audio = torch.randn(RATE)
    count = model.speech_llm.frame_counter(RATE)
    row = make_row([5, -1, -(count + 1)], [6, 7], utterance=0)
    says(
        f"the layout of cut-7 points at speech frame {count}, but there are only {count} frames",
        lambda: collate([audio], [count], [row], 100, ["cut-7"]),
    )
    frames = model.responder().encode([audio])
    says(
        f"points at speech frame {count}, but there are {count} frames",
        lambda: model.responder().layouts([[5, -(count + 1)]], frames),
    )


def test_data_that_counts_other_frames_than_the_model(model):
    """A layout that is right in itself, but was built for another encoder."""
    batch = collate([torch.randn(RATE)], [4], [make_row([5, -1], [6, 7], utterance=0)], 100, ["cut-7"])
    with pytest.raises(RuntimeError, match="cut-7 has .* but its layout was built for 4: data and model disagree"):
        model.speech_llm.train_step(batch, 2)
