# SPDX-License-Identifier: Apache-2.0
import shutil

import numpy as np
import pytest

from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.corpus import SAMPLE_RATE, load_corpus
from nemo_mtbi.demo.corpora.espeak import Espeak
from nemo_mtbi.demo.corpora.synthetic_digits import ACCENTS, ENGLISH, VARIANTS, build_synthetic_digits

pytest.importorskip("espeakng_loader")


def build(folder, **kwargs):
    return build_synthetic_digits(folder, **{"num_utterances": 12, "seed": 3, "num_workers": 1, **kwargs})


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def share_above(samples, hertz) -> float:
    """Share of the energy above a frequency."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float(power[round(hertz * len(samples) / SAMPLE_RATE) :].sum() / power.sum())


def test_each_digit_sounds_at_its_time_and_nothing_between(tmp_path):
    languages = set()
    for cut in load_corpus(build(tmp_path)):
        [supervision] = cut.supervisions
        items = supervision.alignment["word"]
        assert supervision.text == " ".join(item.symbol for item in items)
        assert 2 <= len(items) <= 6 and {item.symbol for item in items} <= set(grammar.DIGITS)
        language, variant = supervision.speaker.split("+")
        languages.add(language)
        assert variant in VARIANTS
        samples = cut.load_audio()[0]
        sounds = [samples[round(i.start * SAMPLE_RATE) : round(i.end * SAMPLE_RATE)] for i in items]
        pauses = [
            samples[round(a.end * SAMPLE_RATE) : round(b.start * SAMPLE_RATE)]
            for a, b in zip(items, items[1:], strict=False)
        ]
        assert all(0.0499 * SAMPLE_RATE <= len(pause) <= 0.3001 * SAMPLE_RATE for pause in pauses)
        # Reverberation fills the pauses, but less than speech does.
        assert max(np.mean(pause**2) for pause in pauses) < 0.5 * min(np.mean(sound**2) for sound in sounds)
    assert languages & set(ENGLISH) and languages & set(ACCENTS)
    assert languages <= {*ENGLISH, *ACCENTS}


def test_speech_is_limited_to_the_band_of_the_human_recordings():
    from nemo_mtbi.demo.corpora import synthetic_digits

    for index in range(5):
        job = synthetic_digits._draw(0, index)
        sound = synthetic_digits._speak(job.spelling[0], job)
        assert share_above(sound, 4400) < 1e-4 < share_above(sound, 500)


def test_same_arguments_same_bytes_with_any_number_of_workers(tmp_path):
    folder = build(tmp_path)
    content = files_of(folder)
    shutil.rmtree(folder)
    assert build(tmp_path, num_workers=2) == folder
    assert files_of(folder) == content


def test_other_arguments_give_another_corpus(tmp_path):
    folders = {build(tmp_path, num_utterances=2, **change) for change in ({}, {"seed": 4})}
    assert len({*folders, build(tmp_path, num_utterances=3)}) == 3


@pytest.mark.parametrize("language", [*ENGLISH, *ACCENTS])
def test_every_language_says_every_digit(language):
    spelling = ACCENTS[language].split() if language in ACCENTS else grammar.DIGITS
    assert len(spelling) == 10
    sounds = [Espeak().speak(word, language) for word in spelling]
    for sound in sounds:
        assert 0.1 < len(sound.samples) / sound.sample_rate < 1.5
    assert len({sound.samples.tobytes() for sound in sounds}) == 10


def test_every_variant_speaks_in_a_voice_of_its_own():
    assert len(set(VARIANTS)) == len(VARIANTS)
    voice_box = Espeak()
    sounds = {variant: voice_box.speak("seven", f"en-us+{variant}").samples.tobytes() for variant in VARIANTS}
    assert len(set(sounds.values())) == len(VARIANTS)


def test_no_utterances_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_utterances is 0; it must be at least 1"):
        build(tmp_path, num_utterances=0)
