# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse.qa import validate

from nemo_mtbi.data.cut_files import CUTS_FILE
from nemo_mtbi.demo.corpora.corpus import (
    SAMPLE_RATE,
    Augment,
    SyntheticUtterance,
    build_corpus,
    cached,
    finish,
    load_corpus,
    noise,
    random_room,
    resample,
)
from nemo_mtbi.io.seeds import stable_seed


def tone(job: int) -> SyntheticUtterance:
    samples = 0.5 * np.sin(np.arange(8000 + job) * 0.1).astype(np.float32)
    references = {"first": "one"} if job % 2 else None
    return SyntheticUtterance(f"tone-{job}", samples, ("one", "two"), ((100, 3000), (3000, 8000)), "sine", references)


def build(folder, jobs=(0, 1, 2), **kwargs):
    arguments = {"name": "tones", "version": 1, "num_workers": 1, "progress": False, **kwargs}
    return build_corpus(tone, list(jobs), folder, {"jobs": list(jobs)}, **arguments)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------ cuts and audio


def test_corpus_reads_back(tmp_path):
    cuts = list(load_corpus(build(tmp_path)))
    assert [cut.id for cut in cuts] == ["tone-0", "tone-1", "tone-2"]
    for job, cut in enumerate(cuts):
        validate(cut, read_data=True)
        np.testing.assert_allclose(cut.load_audio()[0], tone(job).samples, atol=1 / 32767)
        [supervision] = cut.supervisions
        assert (supervision.text, supervision.speaker) == ("one two", "sine")
        items = supervision.alignment["word"]
        assert [item.symbol for item in items] == ["one", "two"]
        assert [round(item.start * SAMPLE_RATE) for item in items] == [100, 3000]
        assert [round(item.end * SAMPLE_RATE) for item in items] == [3000, 8000]
    assert cuts[0].custom is None
    assert cuts[1].references == {"first": "one"}


def test_equal_corpora_have_equal_bytes(tmp_path):
    first = build(tmp_path)
    content = files_of(first)
    first.rename(tmp_path / "aside")
    assert files_of(build(tmp_path)) == content
    assert len(content) == 5  # manifest, marker, three recordings


def test_manifest_names_existing_absolute_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = build("relative")
    lines = gzip.open(folder / CUTS_FILE, "rt").read().splitlines()
    for line in lines:
        [source] = json.loads(line)["recording"]["sources"]
        assert source["source"].startswith(str(folder)) and (folder / source["source"]).is_file()


@pytest.mark.parametrize(
    "spans",
    [((0, 10),), ((0, 10), (5, 20)), ((0, 10), (10, 101)), ((-1, 10), (10, 20)), ((10, 5), (10, 20))],
)
def test_wrong_word_times_are_refused(spans):
    with pytest.raises(ValueError, match="word times"):
        SyntheticUtterance("u", np.zeros(100, np.float32), ("one", "two"), spans, "nobody")


def test_moved_or_missing_corpus_is_refused(tmp_path):
    folder = build(tmp_path)
    folder.rename(tmp_path / "moved")
    with pytest.raises(RuntimeError, match="was moved from"):
        load_corpus(tmp_path / "moved")
    with pytest.raises(RuntimeError, match="no finished corpus"):
        load_corpus(folder)


# ------------------------------------------------------------------------------------------------ cache


def counting(log):
    def write(work, final):
        log.append(final)
        (work / "data").write_text(str(final))

    return write


def test_a_key_is_built_once(tmp_path):
    log = []
    first = cached(counting(log), tmp_path, {"a": 1, "b": [1, 2]})
    assert cached(counting(log), tmp_path, {"b": [1, 2], "a": 1}) == first
    assert log == [first] and (first / "data").read_text() == str(first)
    others = [
        cached(counting(log), tmp_path, {"a": 2, "b": [1, 2]}),
        cached(counting(log), tmp_path, {"a": 1, "b": [1, 2]}, version=2),
        cached(counting(log), tmp_path, {"a": 1, "b": [1, 2]}, name="other"),
    ]
    assert len({first, *others}) == 4 == len(log)


def test_failed_build_leaves_nothing_and_is_repeated(tmp_path):
    def fail(work, final):
        (work / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached(fail, tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    assert (cached(counting([]), tmp_path, {}) / "data").is_file()


@pytest.mark.parametrize("marker", [None, "", "{}", "not json", json.dumps({"root": "elsewhere"})])
def test_half_built_or_copied_folder_is_rebuilt(tmp_path, marker):
    folder = cached(counting([]), tmp_path, {})
    (folder / "corpus.json").unlink()
    (folder / "stale").write_text("x")
    if marker is not None:
        (folder / "corpus.json").write_text(marker)
    assert cached(counting([]), tmp_path, {}) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.json", "data"]
    assert list(tmp_path.iterdir()) == [folder]


def test_two_builders_at_once_end_with_one_folder(tmp_path):
    barrier = threading.Barrier(2, timeout=20)
    results = []

    def write(work, final):
        (work / "data").write_text("same")
        barrier.wait()  # both are building before either one publishes

    threads = [threading.Thread(target=lambda: results.append(cached(write, tmp_path, {}))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0] == results[1]
    assert list(tmp_path.iterdir()) == [results[0]]
    assert (results[0] / "data").read_text() == "same"


def test_seeds_are_stable():
    assert stable_seed("synthetic", 0, "train", 1) == 3_238_663_546_440_143_312  # SHA-256 of ["synthetic",0,"train",1]
    assert len({stable_seed("a", seed, index) for seed in range(20) for index in range(20)}) == 400


# ------------------------------------------------------------------------------------------------ sound


@settings(deadline=None, max_examples=30)
@given(rate=st.sampled_from([7200, 8000, 8480, 16000, 22050, 44100]), time=st.floats(0.05, 0.15))
def test_resampling_keeps_times(rate, time):
    samples = np.zeros(round(0.2 * rate), np.float32)
    index = round(time * rate)
    samples[index] = 1
    resampled = resample(samples, rate)
    assert resampled.dtype == np.float32
    assert abs(len(resampled) - 0.2 * SAMPLE_RATE) <= 2
    assert abs(int(np.argmax(np.abs(resampled))) - index / rate * SAMPLE_RATE) <= 1


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), position=st.integers(0, 3999))
def test_reverberation_keeps_times(seed, position):
    clap = np.zeros(4000, np.float32)
    clap[position] = 1
    heard = finish(clap, np.random.default_rng(seed), Augment(noise=0, reverb=1))
    assert len(heard) == len(clap) and int(np.argmax(np.abs(heard))) == position


@pytest.mark.parametrize("pink", [False, True])
def test_noise_has_its_level_and_color(pink):
    sound = noise(np.random.default_rng(3), 40_001, pink=pink)
    assert len(sound) == 40_001
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(1, abs=0.02)
    power = np.abs(np.fft.rfft(sound)) ** 2
    frequency = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)
    low, high = (power[(frequency > f) & (frequency < 2 * f)].mean() for f in (200, 3200))
    assert low / high == pytest.approx(16 if pink else 1, rel=0.3)  # four octaves of 3 dB


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_is_mixed_at_the_snr(snr):
    speech = tone(0).samples
    noisy = finish(speech, np.random.default_rng(1), Augment(noise=1, snr_db=(snr, snr), reverb=0))
    gain = np.dot(noisy, speech) / np.dot(speech, speech)
    rest = noisy - gain * speech
    measured = 10 * np.log10(np.sum((gain * speech) ** 2) / np.sum(rest**2))
    assert measured == pytest.approx(snr, abs=0.5)


def test_shares_of_augmentation_are_kept():
    speech = tone(0).samples
    clean = finish(speech, np.random.default_rng(0), None)
    assert np.abs(clean / np.abs(clean).max() - speech / np.abs(speech).max()).max() < 5e-3
    changed = 0
    for seed in range(400):
        heard = finish(speech, np.random.default_rng(seed), Augment(noise=0.3, snr_db=(0, 5), reverb=0))
        changed += bool(np.abs(heard / np.abs(heard).max() - speech / np.abs(speech).max()).max() > 0.05)
    assert 90 <= changed <= 150


def test_room_has_its_energy():
    room = random_room(np.random.default_rng(0), Augment(direct_db=(10, 10)))
    assert room.shape[0] == 1 and room[0, 0] == 1 == room.max()
    assert np.sum(room[0, 1:] ** 2) == pytest.approx(0.1, rel=1e-4)


def test_digital_silence_gets_a_noise_floor():
    heard = finish(np.zeros(1600, np.float32), np.random.default_rng(0), Augment(noise=1, reverb=1))
    assert 5e-5 < np.sqrt(np.mean(heard**2)) < 2e-4


@pytest.mark.parametrize("arguments", [{"noise": 1.5}, {"reverb": -0.1}, {"direct_db": (0, 10)}])
def test_impossible_augmentation_is_refused(arguments):
    with pytest.raises(ValueError):
        Augment(**arguments)


ORPHANS = """
import os, sys, time
from pathlib import Path
from nemo_mtbi.demo.corpora.corpus import parallel_map
sys.path.insert(0, sys.argv[2])
from busy import busy
if __name__ == "__main__":
    list(parallel_map(busy, [sys.argv[1]] * 4, num_workers=2, progress=False))
"""
BUSY = """
import os, time
from pathlib import Path
def busy(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    (tmp_path / "parent.py").write_text(ORPHANS)
    told = tmp_path / "told"
    told.mkdir()
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", told, tmp_path])
    try:
        assert wait_for(lambda: len(list(told.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    workers = [int(path.name) for path in told.iterdir()]
    assert wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_a_build_in_a_log_shows_a_line(capsys):
    from nemo_mtbi.demo.corpora.corpus import parallel_map

    assert list(parallel_map(len, ["a", "bb"], num_workers=1, description="corpus")) == [1, 2]
    assert "corpus: 2/2 in 0:00:00" in capsys.readouterr().err
    assert list(parallel_map(len, ["a"], num_workers=1, progress=False)) == [1]
    assert capsys.readouterr().err == ""
