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

from nemo_mtbi.data.dataset import LOADING_ERRORS, BadAudioError, check_samples, in_one_line, load_samples
from nemo_mtbi.data.frames import FrameCounter
from nemo_mtbi.io.sources import FILES, Reading


def open_audio(path: str | Path) -> Cut:
    """The cut of an audio file; only its header is read, and no shell by its name.

    Raises:
        BadAudioError: if it can't be read.
        ForbiddenSourceError: a ``ValueError``: Lhotse would give the name to a shell as a command.
    """
    with Reading(FILES, "the audio file"):
        try:
            return Recording.from_file(path).to_cut()
        except LOADING_ERRORS as error:
            raise BadAudioError("unreadable", f"{path} can't be read as audio: {in_one_line(error)}") from error


def load_audio(audio: str | Path | np.ndarray | Tensor, frames: FrameCounter, sample_rate: int = 16000) -> Tensor:
    """Mono ``[n]`` float32 samples at the encoder's rate.

    Args:
        audio: a file that soundfile reads, or an array ``[n]`` or ``[channels, n]``, of floats, int16 or int32.
        frames: the model's frame counter.
        sample_rate: of an array, in hertz.

    Raises:
        BadAudioError: a ``ValueError`` that names the file and what is wrong with it.
    """
    if isinstance(audio, (str, Path)):
        try:
            there = Path(audio).is_file()
        except OSError as error:  # a name that is too long
            raise BadAudioError("unreadable", f"{str(audio)[:200]!r} can't be read: {error.strerror}") from error
        if not there:
            raise BadAudioError("unreadable", f"there is no audio file {str(audio)!r}: check the path")
        return load_samples(open_audio(audio), frames)
    samples = np.asarray(audio)
    if samples.dtype in (np.int16, np.int32):  # PCM as WAV files hold it
        samples = samples / np.iinfo(samples.dtype).max
    elif not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"an audio array must hold floats, int16 or int32, got {samples.dtype}")
    if sample_rate < 1:
        raise ValueError(f"sample_rate is {sample_rate}; it counts samples per second")
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim == 2:
        samples = samples.mean(axis=0)
    if samples.ndim != 1:
        raise ValueError(f"an audio array must be [n] or [channels, n], got shape {samples.shape}")
    if sample_rate != frames.sample_rate:
        divisor = math.gcd(sample_rate, frames.sample_rate)
        samples = resample_poly(samples, frames.sample_rate // divisor, sample_rate // divisor).astype(np.float32)
    return check_samples(torch.from_numpy(np.ascontiguousarray(samples)), "the audio array", frames)
