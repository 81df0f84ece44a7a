# SPDX-License-Identifier: Apache-2.0
"""Connected digits spoken by espeak-ng in many voices and accents: speakers that a few human recordings lack."""

import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from nemo_mtbi.config.checks import at_least
from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.corpus import Augment, SyntheticUtterance, build_corpus, finish, resample
from nemo_mtbi.demo.corpora.digits import draw_digits, join_sounds, level, trim_silence
from nemo_mtbi.demo.corpora.espeak import Espeak, espeak_version
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.seeds import stable_seed

VERSION = 1  # raise it when the same arguments give another corpus

ENGLISH = ("en-us", "en", "en-gb-x-rp", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
# Foreign accents: another language's voice reads the English digits, zero to nine, as its own spelling has them.
ACCENTS = {
    "de": "siro wann tuh sri fohr feif ßix ßewen eht nein",
    "el": "ζίροου γουάν του θρι φορ φάιβ σιξ σέβεν έιτ νάιν",
    "es": "siro uan tu tri for faif sics seven eit nain",
    "fr": "ziro ouane tou sri faure faïve sixe sévène eïte naïne",
    "hi": "ज़ीरो वन टू थ्री फ़ोर फ़ाइव सिक्स सेवन एट नाइन",
    "it": "ziro uan tu tri for faiv sics seven eit nain",
    "nl": "ziero wan toe srie foor faif siks seven eet nain",
    "pl": "ziro łan tu sri for fajw siks sewen ejt najn",
    "ru": "зиро уан ту сри фор файв сикс сэвэн эйт найн",
    "sv": "siro oann to tri får fajv sicks seven ejt najn",
    "tr": "ziro van tu tri for fayv siks sevın eyt nayn",
}
# Variants of a voice: men, women and children; none that whispers or croaks.
VARIANTS = tuple(
    (
        "f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 linda Annie belinda Alex Alicia Andy Denis Diogo Gene Gene2 Jacky Lee "
        "Mario Michael Mike Nguyen Reed RicishayMax Storm Tweaky anika antonio aunty benjamin caleb david ed edward "
        "edward2 iven john kaukovalta klatt klatt2 klatt3 klatt4 marcelo max miguel norbert pablo paul pedro quincy "
        "rob robert robosoft sandro shelby steph travis victor zac"
    ).split()
)
_FOREIGN = 0.5  # share of the utterances
_RATES = (110, 190)  # words per minute
_PITCHES = (20, 80)
_FORMANTS = (90, 110)  # percent; pitch and tempo move along


@dataclass(frozen=True)
class _Job:
    id: str
    words: tuple[str, ...]
    spelling: tuple[str, ...]  # of each word, for the voice
    pauses: tuple[float, ...]  # before each digit and after the last, in seconds
    voice: str
    rate: int
    pitch: int
    formants: int  # percent
    seed: int


def build_synthetic_digits(
    cache_dir: str | Path,
    *,
    num_utterances: int,
    seed: int,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Build a training corpus of connected digits by espeak-ng that sound as a telephone has them, or find it.

    Digits, pauses and augmentation are those of `nemo_mtbi.demo.corpora.digits.build_digits`, band-limited to 4 kHz
    like its recordings. The same arguments give the same bytes, with any number of workers.

    Args:
        cache_dir: where corpora are kept.
        num_utterances: how many utterances.
        seed: of digits, pauses, voices and sound.
        num_workers: processes; None: as many as there are cores.
        progress: show a progress bar.

    Returns:
        The folder with ``cuts.jsonl.gz`` (see `nemo_mtbi.demo.corpora.corpus.load_corpus`).

    Raises:
        ValueError: ``num_utterances`` below 1, or espeak-ng lacks a voice.
        RuntimeError: espeak-ng is not installed.
    """
    at_least(1).check("num_utterances", num_utterances)
    espeak = espeak_version()
    jobs = [_draw(seed, index) for index in range(num_utterances)]
    return build_corpus(
        _render,
        jobs,
        cache_dir,
        {"espeak": espeak, "plan": digest_of([asdict(job) for job in jobs])},
        name="synthetic-digits",
        version=VERSION,
        num_workers=num_workers,
        progress=progress,
    )


def _draw(seed: int, index: int) -> _Job:
    utterance_seed = stable_seed("synthetic-digits", seed, index)
    rng = random.Random(utterance_seed)
    digits, pauses = draw_digits(rng)
    language = rng.choice(sorted(ACCENTS) if rng.random() < _FOREIGN else ENGLISH)
    spelling = ACCENTS[language].split() if language in ACCENTS else grammar.DIGITS
    return _Job(
        id=f"synthetic-digits-{seed}-{index:06d}",
        words=tuple(grammar.DIGITS[digit] for digit in digits),
        spelling=tuple(spelling[digit] for digit in digits),
        pauses=pauses,
        voice=f"{language}+{rng.choice(VARIANTS)}",
        rate=rng.randint(*_RATES),
        pitch=rng.randint(*_PITCHES),
        formants=rng.randint(*_FORMANTS),
        seed=utterance_seed,
    )


@lru_cache(maxsize=1)
def _engine() -> Espeak:
    return Espeak()  # one in each process


def _render(job: _Job) -> SyntheticUtterance:
    samples, spans = join_sounds([_speak(word, job) for word in job.spelling], job.pauses)
    samples = finish(samples, np.random.default_rng(job.seed), Augment())
    return SyntheticUtterance(job.id, samples, job.words, spans, job.voice)


def _speak(word: str, job: _Job) -> np.ndarray:
    """Return one word by itself, as the human recordings have it: [N] float32 at 16 kHz without sound above 4 kHz."""
    speech = _engine().speak(word, job.voice, job.rate, job.pitch)
    sound = trim_silence(resample(speech.samples, speech.sample_rate * job.formants // 100))
    return level(resample_poly(resample_poly(sound, 1, 2), 2, 1).astype(np.float32))
