# SPDX-License-Identifier: Apache-2.0
"""Connected digits of human speakers, made of the recordings in a clone of the Free Spoken Digit Dataset.

The corpus has one file for each spoken digit, ``recordings/{digit}_{speaker}_{index}.wav``:
https://github.com/Jakobovski/free-spoken-digit-dataset
"""

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import soundfile
from scipy.ndimage import median_filter

from nemo_mtbi.config.checks import OneOf, at_least
from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.corpus import SAMPLE_RATE, Augment, SyntheticUtterance, build_corpus, finish, resample
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.seeds import stable_seed

VERSION = 2  # raise it when the same arguments and recordings give another corpus

SPLITS = OneOf("train", "validation", "test")
_RESERVED = 5  # recordings 0 to 4 of each digit are kept from training: the corpus' own convention
_NUM_DIGITS = (2, 6)
_PAUSE = (0.05, 0.3)  # seconds between two digits
_SILENCE = (0.05, 0.25)  # seconds before and after the speech
# Vocal tracts and tempos, each moved by itself and evenly on a logarithmic scale: few speakers become many.
_FORMANTS = (75, 133)  # percent of the speaker's pitch and formants
_DURATIONS = (80, 125)  # percent of the speaker's own
_STRETCH_FFT = 512  # samples: short enough for the stops in "eight" and "six"
_GAIN_DB = (-3.0, 3.0)  # of one digit against the others
_LEVEL = 0.1  # RMS of the loud part of each recording
_FRAME = SAMPLE_RATE // 100
_QUIET_DB = -30.0  # below the loudest frame: silence
_MARGIN = 5  # frames of silence that stay at each end
_FADE = SAMPLE_RATE // 200  # so that no recording starts or ends with a click
_FILE_NAME = re.compile(r"(?P<digit>[0-9])_(?P<speaker>.+)_(?P<index>[0-9]+)\.wav")
_REMEDY = "give the folder of a clone of https://github.com/Jakobovski/free-spoken-digit-dataset"


@dataclass(frozen=True)
class _Recording:
    digit: int
    speaker: str
    index: int
    path: Path


@dataclass(frozen=True)
class _Job:
    id: str
    speaker: str
    files: tuple[str, ...]  # one recording for each digit spoken
    words: tuple[str, ...]
    pauses: tuple[float, ...]  # before each digit and after the last, in seconds
    gains_db: tuple[float, ...]
    formants: int  # percent
    duration: int  # percent
    seed: int
    augment: Augment | None
    references: dict[str, str] | None


def list_speakers(digits_dir: str | Path) -> list[str]:
    """Return names of the speakers in a clone of the corpus, sorted.

    Raises:
        ValueError: there are no recordings.
    """
    return sorted({recording.speaker for recording in _find_recordings(digits_dir)})


def build_digits(
    cache_dir: str | Path,
    digits_dir: str | Path,
    *,
    speakers: Sequence[str],
    num_utterances: int,
    seed: int,
    split: str,
    with_references: bool = False,
    augment: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Build a corpus of connected digits (2 to 6, one speaker each), or find it in the cache.

    Args:
        cache_dir: where corpora are kept.
        digits_dir: the clone, or its folder of recordings. It is only read.
        speakers: whose recordings are used.
        num_utterances: how many utterances.
        seed: of digits, recordings, pauses and sound.
        split: ``train`` uses the recordings from index 5 on, ``validation`` those before (the same speakers, never the
            same recording); ``test`` uses all of them, so it is for speakers held out from training.
        with_references: store the right answer of each demo task in the cuts' custom field ``references``.
        augment: pitch and formants from 0.75 to 1.33, durations from 0.8 to 1.25, a gain for each digit, noise and
            reverberation; for training.
        num_workers: processes; None: as many as there are cores.
        progress: show a progress bar.

    Returns:
        The folder with ``cuts.jsonl.gz`` (see `nemo_mtbi.demo.corpora.corpus.load_corpus`).

    Raises:
        ValueError: no recordings, a recording that can't be used, an unknown speaker or split, or a digit of which a
            speaker has no recording in this split. The message says what to do.
    """
    SPLITS.check("split", split)
    at_least(1).check("num_utterances", num_utterances)
    pool = _pool(_find_recordings(digits_dir), speakers, split, digits_dir)
    jobs = _plan(pool, num_utterances, seed, split, augment, with_references)
    paths = sorted({path for takes in pool.values() for path in takes}, key=lambda path: path.name)
    recordings = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    return build_corpus(
        partial(_render, paths[0].parent),
        jobs,
        cache_dir,
        {"plan": digest_of([asdict(job) for job in jobs]), "recordings": digest_of(recordings)},
        name=f"digits-{split}",
        version=VERSION,
        num_workers=num_workers,
        progress=progress,
    )


def _find_recordings(digits_dir: str | Path) -> list[_Recording]:
    root = Path(digits_dir).expanduser()
    for folder in (root / "recordings", root):
        matches = ((path, _FILE_NAME.fullmatch(path.name)) for path in sorted(folder.glob("*.wav")))
        recordings = [_Recording(int(m["digit"]), m["speaker"], int(m["index"]), path) for path, m in matches if m]
        if recordings:
            return recordings
    raise ValueError(f"no recordings such as 7_theo_0.wav in {root} or {root / 'recordings'}: {_REMEDY}")


def _pool(
    recordings: Sequence[_Recording], speakers: Sequence[str], split: str, digits_dir: str | Path
) -> dict[tuple[str, int], list[Path]]:
    """Return (speaker, digit) → the recordings that the split may use."""
    known = sorted({recording.speaker for recording in recordings})
    if isinstance(speakers, str) or not speakers:
        raise ValueError(f"speakers={speakers!r} must be a list of names out of {', '.join(known)}")
    unknown = sorted(set(speakers) - set(known))
    if unknown:
        raise ValueError(f"unknown speaker {', '.join(unknown)} in {digits_dir}; it has {', '.join(known)}")
    usable = {
        "train": lambda index: index >= _RESERVED,
        "validation": lambda index: index < _RESERVED,
        "test": lambda index: True,
    }[split]
    pool: dict[tuple[str, int], list[Path]] = {}
    for speaker in sorted(set(speakers)):
        for digit in range(10):
            takes = [r for r in recordings if (r.speaker, r.digit) == (speaker, digit) and usable(r.index)]
            if not takes:
                raise ValueError(
                    f"{digits_dir} has no recording of digit {digit} by {speaker} for split {split!r} (train: index "
                    f"{_RESERVED} and up, validation: below {_RESERVED}): leave that speaker out or {_REMEDY}"
                )
            pool[speaker, digit] = [r.path for r in sorted(takes, key=lambda r: r.index)]
    return pool


def _plan(
    pool: dict[tuple[str, int], list[Path]],
    num_utterances: int,
    seed: int,
    split: str,
    augment: bool,
    with_references: bool,
) -> list[_Job]:
    speakers = sorted({speaker for speaker, _ in pool})
    jobs = []
    for index in range(num_utterances):
        utterance_seed = stable_seed("digits", seed, split, index)
        rng = random.Random(utterance_seed)
        speaker = rng.choice(speakers)
        digits, pauses = draw_digits(rng)
        words = tuple(grammar.DIGITS[digit] for digit in digits)
        job = _Job(
            id=f"digits-{split}-{seed}-{index:06d}",
            speaker=speaker,
            files=tuple(rng.choice(pool[speaker, digit]).name for digit in digits),
            words=words,
            pauses=pauses,
            gains_db=tuple(rng.uniform(*_GAIN_DB) if augment else 0.0 for _ in digits),
            formants=_log_uniform(rng, _FORMANTS) if augment else 100,
            duration=_log_uniform(rng, _DURATIONS) if augment else 100,
            seed=utterance_seed,
            augment=Augment() if augment else None,
            references=dict(grammar.references(" ".join(words))) if with_references else None,
        )
        jobs.append(job)
    return jobs


def draw_digits(rng: random.Random) -> tuple[list[int], tuple[float, ...]]:
    """Return digits of one utterance, and the pauses before each and after the last, in seconds."""
    digits = [rng.randrange(10) for _ in range(rng.randint(*_NUM_DIGITS))]
    inner = [rng.uniform(*_PAUSE) for _ in digits[1:]]
    return digits, (rng.uniform(*_SILENCE), *inner, rng.uniform(*_SILENCE))


def _log_uniform(rng: random.Random, limits: tuple[int, int]) -> int:
    return round(math.exp(rng.uniform(*map(math.log, limits))))


def _render(folder: Path, job: _Job) -> SyntheticUtterance:
    sounds = [
        _load_digit(folder / file, job.formants, job.duration) * np.float32(10 ** (gain_db / 20))
        for file, gain_db in zip(job.files, job.gains_db, strict=True)
    ]
    samples, spans = join_sounds(sounds, job.pauses)
    samples = finish(samples, np.random.default_rng(job.seed), job.augment)
    return SyntheticUtterance(job.id, samples, job.words, spans, job.speaker, job.references)


def join_sounds(
    sounds: Sequence[np.ndarray], pauses: Sequence[float]
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Join sounds of [N] samples, with silence around each.

    Args:
        sounds: at 16 kHz.
        pauses: before each sound and after the last, in seconds.

    Returns:
        [N'] samples and the [start, end) of each sound.
    """
    silences = [np.zeros(round(pause * SAMPLE_RATE), np.float32) for pause in pauses]
    parts, spans, position = [silences[0]], [], len(silences[0])
    for sound, silence in zip(sounds, silences[1:], strict=True):
        parts += [sound, silence]
        spans.append((position, position + len(sound)))
        position += len(sound) + len(silence)
    return np.concatenate(parts), tuple(spans)


@lru_cache(maxsize=1024)
def _load_digit(path: Path, formants: int, duration: int) -> np.ndarray:
    """Return one digit: [N] float32 at 16 kHz, at a common level, without long silences, with soft ends."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"can't read the recording {path} ({error}): {_REMEDY}") from error
    mono = samples.mean(axis=1)
    if not len(mono) or not np.isfinite(mono).all() or not mono.any():
        raise ValueError(f"the recording {path} is empty, silent or damaged: delete it or {_REMEDY}")
    # Samples read as if recorded at another rate: pitch, formants and tempo change together, then the tempo alone.
    return level(_stretch(trim_silence(resample(mono, rate * formants // 100)), duration * formants / 10000))


def _stretch(samples: np.ndarray, factor: float) -> np.ndarray:
    """Stretch [N] → [N * factor], pitch and formants unchanged (phase vocoder)."""
    if factor == 1.0 or len(samples) < _STRETCH_FFT:
        return samples
    from librosa.effects import time_stretch  # takes a while to import

    return time_stretch(samples, rate=1 / factor, n_fft=_STRETCH_FFT, hop_length=_STRETCH_FFT // 4)


def trim_silence(samples: np.ndarray) -> np.ndarray:
    """Cut silence at both ends, but for 50 ms: [N] → [N'] at 16 kHz, N' ≥ 1 where N ≥ 1."""
    # The median of five frames overlooks the clicks that some recordings end with.
    energy = median_filter(_frame_energy(samples), 5, mode="constant")
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (_QUIET_DB / 10))
    first, last = max(loud[0] - _MARGIN, 0), loud[-1] + 1 + _MARGIN
    return samples[first * _FRAME : last * _FRAME]


def _frame_energy(samples: np.ndarray) -> np.ndarray:
    """Return mean square of each 10 ms, the last frame padded with zeros."""
    frames = np.pad(samples, (0, -len(samples) % _FRAME)).reshape(-1, _FRAME)
    return np.mean(frames.astype(np.float64) ** 2, axis=1)


def level(samples: np.ndarray) -> np.ndarray:
    """Bring speech to a common level, with soft ends: [N] → [N] at 16 kHz."""
    energy = _frame_energy(samples)
    loud = energy[energy >= energy.max() * 0.05]  # speech, not the pauses in it
    samples = samples * np.float32(_LEVEL / np.sqrt(loud.mean()))
    fade = min(_FADE, len(samples) // 2)
    ramp = np.linspace(0.0, 1.0, fade, dtype=np.float32)
    samples[:fade] *= ramp
    samples[len(samples) - fade :] *= ramp[::-1]
    return samples
