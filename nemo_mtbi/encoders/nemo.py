# SPDX-License-Identifier: Apache-2.0
"""The speech encoder: front end and encoder of any NeMo ASR model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.base import Hearing
from nemo_mtbi.encoders.windows import Windows
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage


@dataclass(frozen=True)
class EncoderShape:
    """What the other parts must know of an encoder, also in processes that do not hold it.

    Attributes:
        size: width of its frames.
        sample_rate: in hertz.
        stages: what turns a number of samples into a number of frames.
    """

    size: int
    sample_rate: int
    stages: tuple[LengthStage, ...]

    @property
    def frame_rate(self) -> float:
        """Encoder frames per second."""
        return 1.0 / FrameCounter(self.stages, self.sample_rate).frame_seconds


class SpeechEncoder(Hearing):
    """Front end (float32) and encoder of a NeMo ASR model, always in ``eval()``.

    Args:
        asr_model: any NeMo ASR model with ``preprocessor`` and ``encoder``; its decoder is not kept.
        config: how it is used; ``None``: every utterance is heard as a whole.

    Raises:
        ValueError: if ``config`` asks for layers, or the lengths that the modules report can't be counted exactly
            without running them.
    """

    def __init__(self, asr_model: nn.Module, config: EncoderConfig | None = None):
        super().__init__()
        self.preprocessor = asr_model.preprocessor
        self.encoder = asr_model.encoder
        stages = (*front_end_stages(self.preprocessor), *subsampling_stages(self.encoder))
        self.shape = EncoderShape(int(self.encoder.d_model), int(asr_model.cfg.sample_rate), stages)
        # NeMo asks all processes for the longest audio, also those that have no encoder. What it is for, one table of
        # positions for all of them, is not needed: each process makes its own longer when it must.
        self.encoder.sync_max_audio_length = False
        self.requires_grad_(False)
        self.eval()
        self._windows: Windows | None = None
        self._check_stages()
        self._windows = windows_of(self.shape, config)

    @property
    def _counter(self) -> FrameCounter:
        return FrameCounter(self.shape.stages, self.shape.sample_rate)

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            audio: ``[U, N]`` samples at ``sample_rate``.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` encoder frames and their ``[U]`` valid lengths.
        """
        with self.running(audio.device):
            if self._windows and not self._windows.hold(audio.shape[1]):  # what is short needs none: padding is masked
                return self._windows.encode(audio, lengths, self._encode)
            return self._hear(audio, lengths)

    def _encode(self, pieces: Sequence[Tensor]) -> Tensor:
        """Windows of equal length."""
        samples = torch.stack(list(pieces))
        return self._hear(samples, torch.full((len(pieces),), samples.shape[1], device=samples.device))[0]

    def _hear(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(audio.device.type, enabled=False):
            features, feature_lengths = self.preprocessor(input_signal=audio.float(), length=lengths)
        features = features.to(next(self.encoder.parameters()).dtype)
        encoded, encoded_lengths = self.encoder(audio_signal=features, length=feature_lengths)  # [U, D, E]
        return encoded.transpose(1, 2), encoded_lengths.long()

    def _check_stages(self) -> None:
        """Compares the counted frames with those of the modules at lengths around every rounding edge."""
        counter = self._counter
        step = counter.samples_per_frame
        samples = [8 * step + offset for offset in (-1, 0, 1, step // 2, step - 1, step)]
        audio = torch.zeros(len(samples), max(samples))
        device = next(self.encoder.parameters()).device
        _, lengths = self(audio.to(device), torch.tensor(samples, device=device))
        counted = [counter(n) for n in samples]
        if lengths.tolist() != counted:
            raise ValueError(
                f"this encoder gives {lengths.tolist()} frames for {samples} samples, but its configuration says "
                f"{counted}: this kind of front end or subsampling is not supported; use a (Fast)Conformer encoder"
            )


def windows_of(shape: EncoderShape, config: EncoderConfig | None) -> Windows | None:
    """The windows in which an encoder of NeMo hears long audio.

    Raises:
        ValueError: if ``config`` asks for what is not there.
    """
    if config is not None and config.layers:
        raise ValueError(f"{config.SECTION}.layers is for encoders of Hugging Face: leave it out for one of NeMo")
    if config is None or config.window_seconds is None:
        return None
    return Windows(FrameCounter(shape.stages, shape.sample_rate), config, shape.size)


def front_end_stages(preprocessor: nn.Module) -> Iterable[LengthStage]:
    """The short-time Fourier transform as NeMo counts it (``FilterbankFeatures.get_seq_len``)."""
    featurizer = getattr(preprocessor, "featurizer", None)
    if not hasattr(featurizer, "get_seq_len"):
        raise ValueError(
            f"the frames of {type(preprocessor).__name__} can't be counted; use an ASR model whose front end is "
            "AudioToMelSpectrogramPreprocessor"
        )
    padding = featurizer.n_fft // 2 * 2 if featurizer.stft_pad_amount is None else featurizer.stft_pad_amount * 2
    probe = torch.tensor([featurizer.n_fft + 10 * featurizer.hop_length])
    plain = (int(probe) + padding - featurizer.n_fft) // featurizer.hop_length
    extra = int(featurizer.get_seq_len(probe)) - plain  # older NeMo counts one frame more
    # LengthStage adds one; take it back by one more stride of kernel where NeMo does not
    kernel = featurizer.n_fft + (1 - extra) * featurizer.hop_length
    yield LengthStage(kernel, featurizer.hop_length, padding)


def subsampling_stages(encoder: nn.Module) -> Iterable[LengthStage]:
    """The strided convolutions in front of a (Fast)Conformer."""
    subsampling = getattr(encoder, "pre_encode", None)
    try:
        for _ in range(subsampling._sampling_num):
            yield LengthStage(
                subsampling._kernel_size,
                subsampling._stride,
                subsampling._left_padding + subsampling._right_padding,
                subsampling._ceil_mode,
            )
    except AttributeError as error:
        raise ValueError(
            f"{type(encoder).__name__} with {type(subsampling).__name__} has no convolutional subsampling whose "
            "lengths can be counted; use a Conformer or FastConformer encoder"
        ) from error
