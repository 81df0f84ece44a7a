# SPDX-License-Identifier: Apache-2.0
import hashlib
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_mtbi.demo.corpora.espeak import Espeak

pytest.importorskip("espeakng_loader")

TEXT = "the small red fox jumps over a fence near the river"


@pytest.fixture(scope="module")
def espeak() -> Espeak:
    return Espeak()


def test_words_follow_each_other_to_the_end_of_the_sound(espeak):
    speech = espeak.speak(TEXT)
    assert speech.samples.dtype == np.float32
    assert 0.1 < np.abs(speech.samples).max() <= 1
    assert len(speech.words) == len(TEXT.split())
    ends = [start + duration for start, duration in speech.words]
    assert speech.words[0][0] == 0
    assert [start for start, _ in speech.words[1:]] == pytest.approx(ends[:-1], abs=1e-9)
    assert min(duration for _, duration in speech.words) > 0.03
    last = round(ends[-1] * speech.sample_rate)
    assert np.abs(speech.samples[last - 1 :]).max() > 0.003  # the last sample of the last word is sound
    assert np.abs(speech.samples[last:]).max(initial=0) <= 0.003
    assert len(speech.samples) - last < 0.1 * speech.sample_rate


@pytest.mark.parametrize("text", ["in the house", "to be of the garden", "i am not going to be in the lake"])
def test_pairs_that_espeak_likes_to_join_stay_apart(espeak, text):
    assert len(espeak.speak(text).words) == len(text.split())


def test_word_times_hold_the_words(espeak):
    """A long word between two short ones takes the longest time, wherever it stands."""
    for position in range(3):
        words = ["a", "a"]
        words.insert(position, "waterfall")
        durations = [duration for _, duration in espeak.speak(" ".join(words)).words]
        assert int(np.argmax(durations)) == position


# Plain; with flutter; with breath; Klatt's synthesizer: each keeps or draws other state in the C library.
@pytest.mark.parametrize("voice", ["en-us", "en-us+f1", "en-us+f2", "en-us+klatt2"])
def test_what_was_said_before_does_not_matter(espeak, voice):
    first = espeak.speak(TEXT, voice, 150, 40)
    espeak.speak("something else with many other words", "en-us+m7", 200, 60)
    again = espeak.speak(TEXT, voice, 150, 40)
    assert np.array_equal(first.samples, again.samples)
    assert first.words == again.words


@pytest.mark.parametrize("voice", ["en-us", "en-us+f2"])
def test_another_process_at_another_time_says_the_same(espeak, voice):
    begun = int(time.time())
    ours = hashlib.sha256(espeak.speak(TEXT, voice).samples.tobytes()).hexdigest()
    while int(time.time()) == begun:  # espeak seeds its noise by the second
        time.sleep(0.05)
    code = (
        "import hashlib; from nemo_mtbi.demo.corpora.espeak import Espeak; e = Espeak(); e.speak('first of all'); "
        f"print(hashlib.sha256(e.speak({TEXT!r}, {voice!r}).samples.tobytes()).hexdigest())"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ours


def test_rate_pitch_and_voice_are_heard(espeak):
    slow, fast = (espeak.speak(TEXT, rate=rate) for rate in (120, 220))
    assert len(slow.samples) > 1.4 * len(fast.samples)
    assert not np.array_equal(espeak.speak(TEXT, pitch=20).samples, espeak.speak(TEXT, pitch=80).samples)
    assert not np.array_equal(espeak.speak(TEXT, "en-us").samples, espeak.speak(TEXT, "en-us+f2").samples)


@pytest.mark.parametrize("text", ["42 dogs", "3.5", "a - b", "e.g. this", "..."])
def test_text_without_a_word_for_each_word_is_refused(espeak, text):
    with pytest.raises(ValueError, match="spell out"):
        espeak.speak(text)


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_text_is_refused(espeak, text):
    with pytest.raises(ValueError, match="empty text"):
        espeak.speak(text)


@pytest.mark.parametrize("voice", ["xx-none", "en-us+nobody", "en-us+"])
def test_unknown_voice_is_refused(espeak, voice):
    with pytest.raises(ValueError, match="espeak-ng has no"):
        espeak.speak("hello", voice)


def test_missing_wheel_names_the_extra(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError, match=r"pip install nemo_mtbi\[demo\]"):
        Espeak()


def test_the_private_copy_of_the_library_is_removed():
    engine = Espeak()
    folder = Path(engine._library).parent
    assert folder.is_dir()
    del engine
    assert not folder.exists()
