# SPDX-License-Identifier: Apache-2.0
"""Fake recordings at 8 kHz: a tone for each digit and speaker; where the index is below 5, of a third of the pitch."""

import shutil

import numpy as np
import pytest
import soundfile

from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.corpus import SAMPLE_RATE, load_corpus
from nemo_mtbi.demo.corpora.digits import build_digits, list_speakers, trim_silence

RATE = 8000
TONE = 0.3  # seconds
PITCH = {"ann": 400, "bob": 500}  # Hz of digit 0; 60 Hz more for each digit


def pitch_of(speaker: str, digit: int, reserved: bool) -> float:
    return (PITCH[speaker] + 60 * digit) * (1 if reserved else 3)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone")
    (root / "recordings").mkdir()
    times = np.arange(int(TONE * RATE)) / RATE
    for speaker in PITCH:
        for digit in range(10):
            for index in (0, 4, 5, 6):
                level = 0.02 + 0.1 * index
                sound = level * np.sin(2 * np.pi * pitch_of(speaker, digit, index < 5) * times)
                silence = np.zeros(int(0.4 * RATE))  # long: to be trimmed
                path = root / "recordings" / f"{digit}_{speaker}_{index}.wav"
                soundfile.write(path, np.concatenate([silence, sound, silence]), RATE, subtype="PCM_16")
    (root / "recordings" / "notes.wav").write_bytes(b"not a recording of a digit")
    return root


def build(folder, clone, **kwargs):
    arguments = {"speakers": ["ann", "bob"], "num_utterances": 10, "seed": 1, "split": "train", "num_workers": 1}
    return build_digits(folder, clone, **{**arguments, "progress": False, **kwargs})


def words_of(cut):
    """(word, its samples) of each word of a cut."""
    samples = cut.load_audio()[0]
    for item in cut.supervisions[0].alignment["word"]:
        yield item, samples[round(item.start * SAMPLE_RATE) : round(item.end * SAMPLE_RATE)]


def pitch(samples) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 16))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / (1 << 16)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_speakers_are_listed_for_both_shapes_of_the_folder(clone):
    assert list_speakers(clone) == list_speakers(clone / "recordings") == ["ann", "bob"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_word_sounds_at_its_time_from_a_recording_of_its_split(tmp_path, clone, split):
    for cut in load_corpus(build(tmp_path, clone, split=split)):
        [supervision] = cut.supervisions
        assert 2 <= len(supervision.text.split()) <= 6
        for item, samples in words_of(cut):
            digit = grammar.DIGITS.index(item.symbol)
            assert pitch(samples) == pytest.approx(pitch_of(supervision.speaker, digit, split == "validation"), abs=4)
            # 50 ms of silence may stay at each end, counted in frames of 10 ms.
            assert TONE <= item.duration <= TONE + 2 * 0.06


def test_test_split_uses_all_recordings_of_the_speaker(tmp_path, clone):
    heard = set()
    for cut in load_corpus(build(tmp_path, clone, split="test", speakers=["bob"], num_utterances=20)):
        assert cut.supervisions[0].speaker == "bob"
        heard |= {pitch(samples) > 1100 for _, samples in words_of(cut)}
    assert heard == {True, False}


def test_pauses_and_levels(tmp_path, clone):
    for cut in load_corpus(build(tmp_path, clone)):
        items = cut.supervisions[0].alignment["word"]
        for before, after in zip(items, items[1:], strict=False):
            assert 0.0499 <= after.start - before.end <= 0.3001
        assert 0.0499 <= items[0].start <= 0.2501 and 0.0499 <= cut.duration - items[-1].end <= 0.2501
        samples = cut.load_audio()[0]
        assert (
            1e-5 < np.abs(samples[: round(items[0].start * SAMPLE_RATE)]).max() < 1e-3
        )  # noise, neither zeros nor sound
        levels = [np.abs(sound).max() for _, sound in words_of(cut)]
        assert max(levels) / min(levels) < 1.1  # recorded at 0.42 and 0.62


@pytest.mark.slow
@pytest.mark.full
def test_augmentation_moves_formants_durations_and_levels_apart(tmp_path, clone):
    formants, durations, levels = [], [], []
    for cut in load_corpus(build(tmp_path, clone, augment=True, num_utterances=25)):
        of_cut = []
        for item, samples in words_of(cut):
            expected = pitch_of(cut.supervisions[0].speaker, grammar.DIGITS.index(item.symbol), False)
            of_cut.append((pitch(samples) / expected, item.duration / (TONE + 2 * 0.05)))
            levels.append(np.abs(samples).max())
        # One vocal tract and one tempo in one utterance; frames of 10 ms at the original tempo.
        assert np.ptp(of_cut, axis=0)[0] < 0.02 and np.ptp(of_cut, axis=0)[1] < 0.1
        formants.append(of_cut[0][0])
        durations.append(of_cut[0][1])
    assert 0.74 < min(formants) < 0.85 and 1.18 < max(formants) < 1.35
    assert 0.75 < min(durations) < 0.88 and 1.12 < max(durations) < 1.35
    assert abs(np.corrcoef(formants, durations)[0, 1]) < 0.5
    assert max(levels) / min(levels) > 1.5


def test_transcripts_and_references(tmp_path, clone):
    for cut in load_corpus(build(tmp_path, clone, with_references=True)):
        text = cut.supervisions[0].text
        assert set(text.split()) <= set(grammar.DIGITS)
        assert cut.references == grammar.references(text)
    assert all(cut.custom is None for cut in load_corpus(build(tmp_path, clone)))


def test_same_arguments_same_bytes(tmp_path, clone):
    folder = build(tmp_path, clone, augment=True)
    content = files_of(folder)
    shutil.rmtree(folder)
    # Neither the order of the speakers nor where the clone lies matters.
    copy = tmp_path / "copy"
    shutil.copytree(clone / "recordings", copy)
    assert build(tmp_path, copy, augment=True, speakers=["bob", "ann"]) == folder
    assert files_of(folder) == content


def test_other_recordings_or_arguments_give_another_corpus(tmp_path, clone):
    copy = tmp_path / "copy"
    shutil.copytree(clone, copy)
    folders = [
        build(tmp_path, clone),
        build(tmp_path, clone, seed=2),
        build(tmp_path, clone, augment=True),
        build(tmp_path, clone, speakers=["ann"]),
    ]
    soundfile.write(copy / "recordings" / "3_ann_5.wav", 0.1 * np.ones(4000), RATE)
    folders.append(build(tmp_path, copy))
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speakers": ["ann", "zoe"]}, "unknown speaker zoe .* it has ann, bob"),
        ({"speakers": []}, "must be a list of names out of ann, bob"),
        ({"speakers": "ann"}, "must be a list of names out of ann, bob"),
        ({"split": "dev"}, "must be one of train, validation, test"),
        ({"num_utterances": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, clone, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, clone, **arguments)


def test_folder_without_recordings_names_the_remedy(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="no recordings .* clone of https://"):
            list_speakers(folder)


def test_missing_digit_is_named(tmp_path, clone):
    shutil.copytree(clone, tmp_path / "copy")
    for index in (5, 6):
        (tmp_path / "copy" / "recordings" / f"7_bob_{index}.wav").unlink()
    with pytest.raises(ValueError, match="no recording of digit 7 by bob for split 'train'"):
        build(tmp_path, tmp_path / "copy")
    build(tmp_path, tmp_path / "copy", split="validation")


@pytest.mark.parametrize("damage", ["empty", "silent", "nan", "garbage"])
def test_damaged_recording_is_named(tmp_path, clone, damage):
    shutil.copytree(clone, tmp_path / "copy")
    for digit in range(10):  # every digit, so that any utterance meets one
        path = tmp_path / "copy" / "recordings" / f"{digit}_ann_5.wav"
        other = path.with_name(f"{digit}_ann_6.wav")
        sounds = {"empty": np.zeros(0), "silent": np.zeros(800), "nan": np.full(800, np.nan)}
        for file in (path, other):
            if damage == "garbage":
                file.write_bytes(b"RIFFnothing")
            else:
                soundfile.write(file, sounds[damage], RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"_ann_[56]\.wav"):
        build(tmp_path, tmp_path / "copy", speakers=["ann"])


def test_trimming_overlooks_clicks_and_keeps_speech():
    rng = np.random.default_rng(0)
    samples = 1e-4 * rng.standard_normal(SAMPLE_RATE).astype(np.float32)
    samples[4000:8000] += 0.3 * np.sin(np.arange(4000) * 0.2).astype(np.float32)
    samples[15900:15910] = 0.9  # a click at the end
    trimmed = trim_silence(samples)
    assert 4000 + 2 * 400 <= len(trimmed) <= 4000 + 2 * 1000
    assert np.sum(trimmed**2) > 0.999 * np.sum(samples[4000:8000] ** 2)
    short = samples[4000:4100]
    assert np.array_equal(trim_silence(short), short)
