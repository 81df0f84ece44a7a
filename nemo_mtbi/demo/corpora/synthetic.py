# SPDX-License-Identifier: Apache-2.0
"""The embedded corpus: sentences of the demo grammar, spoken by espeak-ng, with exact word times."""

import hashlib
import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nemo_mtbi.config.checks import at_least
from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.corpus import SAMPLE_RATE, Augment, SyntheticUtterance, build_corpus, finish, resample
from nemo_mtbi.demo.corpora.espeak import Espeak, espeak_version
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.seeds import stable_seed

VERSION = 1  # raise it when the same arguments give another corpus

# Voices are disjoint between splits, and so are their variants (the part after "+").
VOICES = {
    "train": (
        "en-us",
        "en-us+f1",
        "en-us+f2",
        "en-us+f4",
        "en-us+linda",
        "en-us+Annie",
        "en-us+m1",
        "en-us+m3",
        "en-us+m7",
        "en-us+m8",
        "en",
        "en+f2",
        "en+m3",
        "en-gb-x-rp+f1",
        "en-gb-x-rp+m1",
        "en-029+m7",
        "en-gb-scotland+m3",
    ),
    "validation": ("en-us+m2", "en-us+belinda", "en+m2", "en-gb-x-rp+belinda"),
    "test": ("en-us+f3", "en-us+m4", "en-us+m6", "en+m4", "en-gb-x-rp+f3"),
}
_SHARES = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}  # of all sentences, percent
_RATES = (140, 210)  # words per minute
_PITCHES = (30, 70)
_SILENCE = (0.05, 0.25)  # seconds before and after the speech
_MAX_DRAWS = 2000  # in a row without a new sentence of the split


@dataclass(frozen=True)
class _Job:
    id: str
    words: tuple[str, ...]
    voice: str
    rate: int
    pitch: int
    seed: int
    augment: Augment | None
    references: dict[str, str] | None


def split_of(text: str) -> str:
    """Return the split of a sentence, whatever the seed: by the hash of its text."""
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(split for split, share in _SHARES.items() if percent in share)


def build_synthetic(
    cache_dir: str | Path,
    *,
    num_utterances: int,
    seed: int,
    split: str,
    with_references: bool = False,
    augment: Augment | None = Augment(),  # noqa: B008 (frozen)
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Build a corpus of unique sentences, or find it in the cache.

    Sentences, voices and voice variants are disjoint between the splits. The same arguments give the same bytes, with
    any number of workers.

    Args:
        cache_dir: where corpora are kept.
        num_utterances: how many sentences.
        seed: of sentences, voices and sound.
        split: ``train``, ``validation`` or ``test``.
        with_references: store the right answer of each demo task in the cuts' custom field ``references``.
        augment: noise and reverberation; None for clean speech.
        num_workers: processes; None: as many as there are cores.
        progress: show a progress bar.

    Returns:
        The folder with ``cuts.jsonl.gz`` (see `nemo_mtbi.demo.corpora.corpus.load_corpus`).

    Raises:
        ValueError: unknown split, or the grammar has too few sentences for ``num_utterances``.
        RuntimeError: espeak-ng is not installed.
    """
    if split not in VOICES:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(VOICES)}")
    at_least(1).check("num_utterances", num_utterances)
    espeak = espeak_version()
    jobs = _plan(num_utterances, seed, split, augment, with_references)
    # The plan stands for the grammar, the voices and all arguments: when any of them changes, so does the key.
    key = {"espeak": espeak, "plan": digest_of([asdict(job) for job in jobs])}
    return build_corpus(
        _render,
        jobs,
        cache_dir,
        key,
        name=f"synthetic-{split}",
        version=VERSION,
        num_workers=num_workers,
        progress=progress,
    )


def _plan(num_utterances: int, seed: int, split: str, augment: Augment | None, with_references: bool) -> list[_Job]:
    jobs: list[_Job] = []
    seen: set[tuple[str, ...]] = set()
    for index in range(num_utterances):
        utterance_seed = stable_seed("synthetic", seed, split, index)
        rng = random.Random(utterance_seed)
        words = _new_sentence(rng, split, seen)
        seen.add(words)
        job = _Job(
            id=f"synthetic-{split}-{seed}-{index:06d}",
            words=words,
            voice=rng.choice(VOICES[split]),
            rate=rng.randint(*_RATES),
            pitch=rng.randint(*_PITCHES),
            seed=utterance_seed,
            augment=augment,
            references=dict(grammar.references(" ".join(words))) if with_references else None,
        )
        jobs.append(job)
    return jobs


def _new_sentence(rng: random.Random, split: str, seen: set[tuple[str, ...]]) -> tuple[str, ...]:
    for _ in range(_MAX_DRAWS):
        sentence = grammar.sample_sentence(rng)
        words = tuple(sentence.words)
        if words not in seen and split_of(" ".join(words)) == split:
            return words
    raise ValueError(
        f"the grammar gives no new sentence for split {split!r} after {len(seen)} of them: lower num_utterances"
    )


@lru_cache(maxsize=1)
def _engine() -> Espeak:
    return Espeak()  # one in each process


def _render(job: _Job) -> SyntheticUtterance:
    rng = np.random.default_rng(job.seed)
    speech = _engine().speak(" ".join(job.words), job.voice, job.rate, job.pitch)
    sound = resample(speech.samples, speech.sample_rate)
    before, after = (int(rng.uniform(*_SILENCE) * SAMPLE_RATE) for _ in range(2))
    samples = np.pad(sound, (before, after))
    spans = tuple(
        (before + round(start * SAMPLE_RATE), before + round((start + duration) * SAMPLE_RATE))
        for start, duration in speech.words
    )
    return SyntheticUtterance(job.id, finish(samples, rng, job.augment), job.words, spans, job.voice, job.references)
