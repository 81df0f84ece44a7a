# SPDX-License-Identifier: Apache-2.0
"""Corpora as Lhotse cuts and FLAC on disk, built once for each content; resampling, noise and reverberation."""

import json
import multiprocessing
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
import torch
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio.mixer import AudioMixer
from lhotse.augmentation import ReverbWithImpulseResponse
from lhotse.supervision import AlignmentItem
from rich.console import Console
from rich.progress import Progress
from scipy.signal import firwin, resample_poly

from nemo_mtbi.config.checks import Section, Share
from nemo_mtbi.data.cut_files import CUTS_FILE, write_cuts
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text, is_live

SAMPLE_RATE = 16000
_MARKER = "corpus.json"  # written last: a folder without it is half built
_FILES_PER_FOLDER = 1000
_NOISE_FLOOR = 1e-4  # RMS of the white noise under every utterance: real recordings hold no exact zeros
_MIN_JOBS_PER_WORKER = 200  # starting a worker costs about 3 s of imports

Job = TypeVar("Job")
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------- utterances


@dataclass(frozen=True)
class SyntheticUtterance:
    """One finished utterance.

    Attributes:
        id: unique in the corpus.
        samples: [N] float32 in [-1, 1] at 16 kHz.
        words: the transcript.
        spans: [start, end) of each word, in samples.
        speaker: name of the speaker.
        references: right answer of each demo task, stored in the cut's custom field ``references``.
    """

    id: str
    samples: np.ndarray
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    speaker: str
    references: Mapping[str, str] | None = None

    def __post_init__(self):
        if len(self.words) != len(self.spans):
            raise ValueError(f"{self.id}: {len(self.words)} words but {len(self.spans)} word times")
        edges = [edge for span in self.spans for edge in span]
        if edges != sorted(edges) or not edges or edges[0] < 0 or edges[-1] > len(self.samples):
            raise ValueError(f"{self.id}: word times {self.spans} must rise within {len(self.samples)} samples")


def to_cut(utterance: SyntheticUtterance, audio_path: Path) -> MonoCut:
    """Return the Lhotse cut of an utterance whose audio is (or will be) at ``audio_path``."""
    num_samples = len(utterance.samples)
    duration = num_samples / SAMPLE_RATE
    recording = Recording(
        id=utterance.id,
        sources=[AudioSource(type="file", channels=[0], source=str(audio_path))],
        sampling_rate=SAMPLE_RATE,
        num_samples=num_samples,
        duration=duration,
    )
    words = [
        AlignmentItem(word, start / SAMPLE_RATE, (end - start) / SAMPLE_RATE)
        for word, (start, end) in zip(utterance.words, utterance.spans, strict=True)
    ]
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=duration,
        channel=0,
        text=" ".join(utterance.words),
        language="en",
        speaker=utterance.speaker,
        alignment={"word": words},
    )
    custom = None if utterance.references is None else {"references": dict(utterance.references)}
    return MonoCut(
        id=utterance.id,
        start=0.0,
        duration=duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
        custom=custom,
    )


def write_flac(path: Path, samples: np.ndarray) -> None:
    """Write [N] float samples in [-1, 1] as 16-bit FLAC at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pcm = np.rint(np.clip(samples, -1.0, 1.0) * 32767.0).astype(np.int16)
    soundfile.write(path, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


def load_corpus(folder: str | Path) -> CutSet:
    """Return the cuts of a corpus made by `build_corpus`, read lazily.

    Raises:
        RuntimeError: the folder holds no finished corpus, or was moved (its cuts hold absolute audio paths).
    """
    folder = Path(folder).resolve()
    root = _finished_root(folder)
    if root is None:
        raise RuntimeError(f"{folder} holds no finished corpus; build it (again) with the builder that made it")
    if root != folder:
        raise RuntimeError(f"the corpus in {folder} was moved from {root}: move it back or build it again")
    return CutSet.from_file(folder / CUTS_FILE)


# ---------------------------------------------------------------------------------------------------- building


def cached(
    build: Callable[[Path, Path], None],
    cache_dir: str | Path,
    key: Mapping[str, Any],
    *,
    name: str = "corpus",
    version: int = 1,
) -> Path:
    """Return a folder that is built once for each key, and never seen half built.

    Args:
        build: called as ``build(work, final)``: writes into ``work``, which is renamed to ``final`` at the end.
        cache_dir: parent of all such folders.
        key: JSON values that decide the content.
        name: readable start of the folder's name; the rest is the hash of the key.
        version: of the builder's code; raise it when the same key gives other content.

    Several processes may ask for the same key at once: each builds in a folder of its own, the first to finish wins.
    Folders ``*.building`` are left behind only by killed processes and can be deleted.
    """
    content = {"key": dict(key), "name": name, "version": version}
    final = Path(cache_dir).expanduser().resolve() / f"{name}-{digest_of(content)[:16]}"
    if _finished_root(final) == final:
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    work = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.building")
    work.mkdir()
    try:
        build(work, final)
        (work / _MARKER).write_text(json.dumps({**content, "root": str(final)}, sort_keys=True, indent=1))
        _publish(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _publish(work: Path, final: Path) -> None:
    if _finished_root(final) == final:
        return  # another process was faster
    if final.exists():  # half built by hand, or copied from elsewhere with the paths of that place
        trash = final.with_name(work.name + ".old")
        final.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    try:
        work.rename(final)
    except OSError:
        if _finished_root(final) != final:
            raise


def _finished_root(folder: Path) -> Path | None:
    """Return where the finished corpus in this folder was built; None when there is none."""
    try:
        return Path(json.loads((folder / _MARKER).read_text())["root"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None


def build_corpus(
    render: Callable[[Job], SyntheticUtterance],
    jobs: Sequence[Job],
    cache_dir: str | Path,
    key: Mapping[str, Any],
    *,
    name: str,
    version: int,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render every job to audio and write one corpus (`cached`): ``cuts.jsonl.gz`` and ``audio/NNN/ID.flac``.

    Args:
        render: picklable; depends on its job alone, so that the number of workers can't matter.
        jobs: in the order of the manifest.
        cache_dir: parent of all corpora.
        key: JSON values that decide the content.
        name: readable start of the folder's name.
        version: of the builder's code; raise it when the same key gives other content.
        num_workers: processes; None: as many as there are cores, fewer for a small corpus.
        progress: show a progress bar.
    """

    def build(work: Path, final: Path) -> None:
        write = partial(_render_to_disk, render, work, final)
        cuts = parallel_map(write, list(enumerate(jobs)), num_workers=num_workers, progress=progress, description=name)
        write_cuts(work / CUTS_FILE, cuts)

    return cached(build, cache_dir, key, name=name, version=version)


def _render_to_disk(
    render: Callable[[Job], SyntheticUtterance], work: Path, final: Path, item: tuple[int, Job]
) -> MonoCut:
    index, job = item
    utterance = render(job)
    relative = Path("audio") / f"{index // _FILES_PER_FOLDER:03d}" / f"{utterance.id}.flac"
    write_flac(work / relative, utterance.samples)
    return to_cut(utterance, final / relative)


def parallel_map(
    function: Callable[[Job], Result],
    items: Sequence[Job],
    *,
    num_workers: int | None = None,
    progress: bool = True,
    description: str = "",
) -> Iterator[Result]:
    """Map over processes, in order, with a bar, or a line every 30 seconds in a log.

    One worker (or a small job) stays in this process.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(cores, len(items) // _MIN_JOBS_PER_WORKER)
    shown = partial(_shown, total=len(items), description=description, progress=progress)
    if num_workers <= 1:
        yield from shown(map(function, items))
        return
    # Not fork: this process may hold threads of PyTorch, whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as pool:
        yield from shown(pool.map(function, items, chunksize=min(64, -(-len(items) // num_workers))))


def _shown(results: Iterable[Result], total: int, description: str, progress: bool) -> Iterator[Result]:
    """Yield results, with their progress on standard error."""
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not (progress and is_live(console)))
    task = bar.add_task(description, total=total)
    with bar, Heartbeat(lambda: bar_text(bar), console, progress, last=True):
        for result in results:
            yield result
            bar.advance(task)


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("a worker of parallel_map must be started by multiprocessing")

    def follow() -> None:  # a parent that is killed can't end its workers, which would wait for work forever
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="parent").start()


# ---------------------------------------------------------------------------------------------------- sound


@dataclass(frozen=True)
class Augment(Section):
    """Noise and reverberation, each on a share of the utterances.

    Attributes:
        noise: share with white or pink noise.
        snr_db: range of its signal-to-noise ratio.
        reverb: share with reverberation.
        t60: range of the time, in seconds, in which the reverberation falls by 60 dB.
        direct_db: range of the direct sound's energy over the reverberation's.
    """

    noise: Share = 0.5
    snr_db: tuple[float, float] = (15.0, 40.0)
    reverb: Share = 0.25
    t60: tuple[float, float] = (0.1, 0.35)
    direct_db: tuple[float, float] = (6.0, 15.0)

    def __post_init__(self):
        super().__post_init__()
        if self.direct_db[0] < 3:
            raise ValueError("direct_db must start at 3 dB or more: the loudest sound must be the direct one")


def resample(samples: np.ndarray, source_rate: int) -> np.ndarray:
    """Return [N] at ``source_rate`` as [N'] float32 at 16 kHz; times are kept."""
    if source_rate == SAMPLE_RATE:
        return samples.astype(np.float32)
    divisor = int(np.gcd(source_rate, SAMPLE_RATE))
    up, down = SAMPLE_RATE // divisor, source_rate // divisor
    return resample_poly(samples, up, down, window=_low_pass(max(up, down))).astype(np.float32)


@lru_cache
def _low_pass(factor: int) -> np.ndarray:
    # What resample_poly would design anew for each utterance.
    return firwin(20 * factor + 1, 1.0 / factor, window=("kaiser", 5.0))


def noise(rng: np.random.Generator, num_samples: int, *, pink: bool) -> np.ndarray:
    """Return [N] float32 noise of RMS 1; pink falls by 3 dB per octave from 50 Hz on."""
    if not pink:
        return rng.standard_normal(num_samples, dtype=np.float32)
    length = 1 << max(num_samples - 1, 1).bit_length()  # a power of two: fast to transform
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 50.0))
    colored = np.fft.irfft(spectrum, length)[:num_samples]
    return (colored / np.sqrt(np.mean(colored**2))).astype(np.float32)


def random_room(rng: np.random.Generator, augment: Augment) -> np.ndarray:
    """Return [1, N] float32 impulse response: direct sound at 0, then noise that decays (Polack's model of a room)."""
    t60 = rng.uniform(*augment.t60)
    times = np.arange(1, int(t60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(times)) * 10 ** (-3 * times / t60)
    tail *= np.sqrt(10 ** (-rng.uniform(*augment.direct_db) / 10) / np.sum(tail**2))
    return np.concatenate([[1.0], tail]).astype(np.float32)[None]


def finish(samples: np.ndarray, rng: np.random.Generator, augment: Augment | None) -> np.ndarray:
    """Augment, and set a random level and noise floor: [N] → [N] float32, times unchanged (the RIR's peak is at 0)."""
    samples = samples.astype(np.float32)
    if augment is not None and rng.random() < augment.reverb:
        room = random_room(rng, augment)
        samples = ReverbWithImpulseResponse(rir_generator=lambda nsource: room)(samples[None], SAMPLE_RATE)[0]
    if augment is not None and rng.random() < augment.noise and samples.any():
        mixer = AudioMixer(samples[None], SAMPLE_RATE)
        mixer.add_to_mix(noise(rng, len(samples), pink=rng.random() < 0.5)[None], snr=rng.uniform(*augment.snr_db))
        samples = mixer.mixed_mono_audio[0]
    peak = float(np.abs(samples).max(initial=0.0))
    if peak > 0:
        samples = samples * (rng.uniform(0.25, 0.9) / peak)
    return (samples + _NOISE_FLOOR * noise(rng, len(samples), pink=False)).astype(np.float32)
