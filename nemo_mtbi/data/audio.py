# SPDX-License-Identifier: Apache-2.0
"""The audio of a cut as samples, checked."""

from __future__ import annotations

import numpy as np
import torch
from lhotse.audio import AudioLoadingError, DurationMismatchError
from lhotse.cut import Cut

from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.sources import FILES, SourcePolicy, check_cut
from nemo_mtbi.io.text import in_one_line
from nemo_mtbi.layouts.frames import FrameCounter

# What Lhotse raises for a missing, foreign or damaged file. Not RuntimeError, which it raises where a library is
# missing (torchaudio for reverberation): every single cut would be skipped.
LOADING_ERRORS = (AudioLoadingError, DurationMismatchError, AssertionError, OSError, ValueError)


class BadAudioError(ValueError):
    """Audio that cannot be trained on.

    Args:
        reason: name under which it is counted.
        message: of the error.
    """

    def __init__(self, reason: str, message: str | None = None):
        # Torch's loader raises the error of a worker process again with its text as the only argument: the reason is
        # lost then, and what came first is the message.
        super().__init__(reason if message is None else message)
        self.reason = "unusable" if message is None else reason


def load_samples(cut: Cut, frames: FrameCounter, policy: SourcePolicy = FILES) -> torch.Tensor:
    """Return a cut as mono ``[N]`` float32 samples at the encoder's rate; several channels are averaged.

    Args:
        cut: any cut with audio.
        frames: the frame counter of the model; it has the rate in hertz.
        policy: what it may be read from; files alone unless said otherwise.

    Raises:
        BadAudioError: if it is unreadable, empty, not finite, silent (all samples equal) or owns no speech frame.
        ForbiddenSourceError: if it would run a command or reach the network, and that is not allowed.
    """
    check_cut(cut, policy)
    with Reading(policy, f"cut {cut.id}"):
        try:
            samples = np.asarray(cut.resample(frames.sample_rate).load_audio(), dtype=np.float32)
        except LOADING_ERRORS as error:
            why = in_one_line(error)
            raise BadAudioError("unreadable", f"the audio of cut {cut.id} cannot be read: {why}") from error
    if samples.ndim == 2:
        samples = samples.mean(axis=0)
    return check_samples(torch.from_numpy(samples), f"the audio of cut {cut.id}", frames)


def check_samples(samples: torch.Tensor, name: str, frames: FrameCounter) -> torch.Tensor:
    """Return ``[N]`` samples as they are, checked.

    Args:
        samples: at the encoder's rate.
        name: for messages.
        frames: the frame counter of the model.

    Raises:
        BadAudioError: if they are empty, not finite, silent (all samples equal) or own no speech frame.
    """
    if len(samples) == 0:
        raise BadAudioError("empty", f"{name} has no samples")
    if not samples.isfinite().all():
        raise BadAudioError("not_finite", f"{name} holds NaN or infinite samples")
    if samples.min() == samples.max():
        raise BadAudioError("silent", f"{name} is silent: all its samples are equal")
    if frames(len(samples)) == 0:
        raise BadAudioError("too_short", f"{name} is too short to own a single speech frame")
    return samples
