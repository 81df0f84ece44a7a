# SPDX-License-Identifier: Apache-2.0
"""Audio as users have it: files and arrays, any rate, mono or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from lhotse import Recording
from lhotse.cut import Cut
from scipy.signal import resample_poly
from torch import Tensor

from nemo_mtbi.data.audio import LOADING_ERRORS, BadAudioError, check_samples, load_samples
from nemo_mtbi.io.paths import is_file
from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.sources import FILES
from nemo_mtbi.io.text import in_one_line, is_writable_text
from nemo_mtbi.layouts.frames import FrameCounter


def open_audio(path: str | Path) -> Cut:
    """Return the cut of an audio file; only its header is read, and no shell by its name.

    Raises:
        ForbiddenSourceError: a ``ValueError``: Lhotse would give the name to a shell as a command.
        OSError, AudioLoadingError, …: see ``LOADING_ERRORS``, if it can't be read.
    """
    with Reading(FILES, "the audio file"):
        if is_writable_text(str(path)):
            return Recording.from_file(path).to_cut()
        # a name that is not Unicode, which libsndfile does not take
        return Recording.from_bytes(Path(path).read_bytes(), "audio").to_cut()


def load_audio(
    audio: str | Path | np.ndarray | Tensor, frames: FrameCounter, sample_rate: int = 16000, longest: int | None = None
) -> Tensor:
    """Return mono ``[n]`` float32 samples at the encoder's rate.

    Args:
        audio: a file that soundfile reads, or an array ``[n]``, ``[channels, n]`` or ``[n, channels]`` (as soundfile
            gives it: the shorter side has the channels), of floats, int16 or int32.
        frames: the model's frame counter.
        sample_rate: of an array, in hertz.
        longest: speech frames that the LLM can take; a file with more is refused by its header. ``None``: any.

    Raises:
        BadAudioError: a ``ValueError`` that names the file and what is wrong with it.
    """
    if isinstance(audio, (str, Path)):
        return load_samples(_open(audio, frames, longest), frames)
    samples = np.asarray(audio)
    if samples.dtype in (np.int16, np.int32):  # PCM as WAV files hold it
        samples = samples / np.iinfo(samples.dtype).max
    elif not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"an audio array must hold floats, int16 or int32, got {samples.dtype}")
    if sample_rate < 1:
        raise ValueError(f"sample_rate is {sample_rate}; it counts samples per second")
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim == 2:
        samples = samples.mean(axis=0 if samples.shape[0] <= samples.shape[1] else 1)
    if samples.ndim != 1:
        raise ValueError(f"an audio array must be [n], [channels, n] or [n, channels], got shape {samples.shape}")
    if sample_rate != frames.sample_rate:
        divisor = math.gcd(sample_rate, frames.sample_rate)
        samples = resample_poly(samples, frames.sample_rate // divisor, sample_rate // divisor).astype(np.float32)
    return check_samples(torch.from_numpy(np.ascontiguousarray(samples)), "the audio array", frames)


def _open(path: str | Path, frames: FrameCounter, longest: int | None) -> Cut:
    """Return the cut of a whole file; only the header is read."""
    if not is_file(path):
        raise BadAudioError("unreadable", f"there is no audio file {str(path)!r}: check the path")
    try:
        cut = open_audio(path)
    except LOADING_ERRORS as error:
        raise BadAudioError("unreadable", f"{path} can't be read as audio: {in_one_line(error)}") from error
    if longest is not None and frames(round(cut.duration * frames.sample_rate)) > longest:
        raise BadAudioError(
            "too_long",
            f"{path} has {cut.duration:.0f} s, but the LLM takes {longest * frames.frame_seconds:.0f} s at most: use "
            "shorter audio, or cut it into pieces",
        )
    return cut
