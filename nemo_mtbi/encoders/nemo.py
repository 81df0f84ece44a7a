# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of NeMo: front end and encoder of any NeMo ASR model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from nemo_mtbi.compat.nemo import first_convolution_numbers, module_config, subsampling_convolutions
from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.base import EncoderShape, SpeechEncoder
from nemo_mtbi.encoders.nemo_parts import CLASSES, build_encoder, check_encoder, section_class
from nemo_mtbi.encoders.windows import Windows
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage


class NemoEncoder(SpeechEncoder):
    """Front end (float32) and encoder of a NeMo ASR model, always in ``eval()``.

    Args:
        asr_model: any NeMo ASR model with ``preprocessor``, ``encoder`` and ``cfg.sample_rate``; its decoder is not
            kept.
        config: how it is used; ``None``: every utterance is encoded as a whole.
        check: whether to run the modules, whose lengths are compared with those that are counted; impossible for
            tensors that hold nothing.

    Raises:
        ValueError: if ``config`` asks for layers, or the lengths that the modules report can't be counted exactly
            without running them.
    """

    title = "NeMo ASR checkpoint"
    embeds = True

    def __init__(self, asr_model: Any, config: EncoderConfig | None = None, check: bool = True):
        super().__init__()
        self.preprocessor: nn.Module = asr_model.preprocessor
        encoder: Any = asr_model.encoder
        self.encoder = encoder
        stages = (*front_end_stages(self.preprocessor), *subsampling_stages(encoder))
        self.shape = EncoderShape(int(encoder.d_model), int(asr_model.cfg.sample_rate), stages)
        # NeMo asks all processes for the longest audio, also those that have no encoder. What it is for, one table of
        # positions for all of them, is not needed: each process makes its own longer when it must.
        encoder.sync_max_audio_length = False
        self.requires_grad_(False)
        self.eval()
        if check:
            self._check_stages()
        self.windows = _windows_of(self.shape, config)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Return whether there is a file: its content is judged when it is read."""
        return path.is_file()

    @classmethod
    def load(cls, path: Path, config: EncoderConfig | None) -> NemoEncoder:
        """Return the encoder of a NeMo ASR ``.nemo``.

        Raises:
            ArchiveError: if it is damaged, harmful or not the archive of an ASR model.
        """
        from nemo_mtbi.encoders.asr_archive import AsrFile

        return cls(AsrFile(path).encoder(), config)

    @classmethod
    def empty(cls, path: Path, config: EncoderConfig | None) -> NemoEncoder:
        """Return the encoder of a NeMo ASR ``.nemo`` without its weights.

        Raises:
            ArchiveError: as :meth:`load`, as far as it shows without weights.
        """
        from nemo_mtbi.encoders.asr_archive import AsrFile

        try:
            return cls(AsrFile(path).probe(weights=False), config, check=False)
        except AttributeError as error:  # of modules that are not built like those of an ASR model
            raise ArchiveError(str(error)) from error

    def settings(self) -> dict[str, Any]:
        """Return the sections of front end and encoder, and the sample rate."""
        parts: dict[str, Any] = {name: module_config(getattr(self, name)) for name in CLASSES}
        parts = {name: OmegaConf.to_container(OmegaConf.create(part), resolve=True) for name, part in parts.items()}
        return {"sample_rate": self.shape.sample_rate, **parts}

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        config: EncoderConfig | None,
        shapes: Mapping[str, tuple[int, ...]],
        file: str,
        weights: str,
    ) -> NemoEncoder:
        """Build front end and encoder of a full ``.nemo``.

        Raises:
            ArchiveError: if a class is not allowed, or the settings are not those of the weights.
        """
        for name in CLASSES:
            section_class(settings.get(name), name)
        if {*CLASSES, "sample_rate"} != settings.keys() or type(settings["sample_rate"]) is not int:
            raise ArchiveError(f"{file} must hold preprocessor, encoder and sample_rate, and no more")
        check_encoder(settings, shapes, file, weights)
        return cls(build_encoder(settings, file), config)

    def first_convolution(self) -> int:
        """Return numbers for two feature frames: that convolution halves their rate and their bands."""
        return first_convolution_numbers(self.encoder)

    @property
    def _counter(self) -> FrameCounter:
        return FrameCounter(self.shape.stages, self.shape.sample_rate)

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances, longer ones in windows; padding is masked, so that short ones need none.

        Args:
            audio: ``[U, N]`` samples at ``shape.sample_rate``.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` encoder frames and their ``[U]`` valid lengths.
        """
        with self.running(audio.device):
            if self.windows and not self.windows.hold(audio.shape[1]):
                return self.windows.encode(audio, lengths, self._encode_windows)
            return self._encode_whole(audio, lengths)

    def _encode_windows(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return frames ``[W, E, D]`` of windows of equal length."""
        samples = torch.stack(list(pieces))
        return self._encode_whole(samples, torch.full((len(pieces),), samples.shape[1], device=samples.device))[0]

    def _encode_whole(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(audio.device.type, enabled=False):
            features, feature_lengths = self.preprocessor(input_signal=audio.float(), length=lengths)
        features = features.to(next(self.encoder.parameters()).dtype)
        encoded, encoded_lengths = self.encoder(audio_signal=features, length=feature_lengths)  # [U, D, E]
        return encoded.transpose(1, 2), encoded_lengths.long()

    def _check_stages(self) -> None:
        """Compare the counted frames with those of the modules at lengths around every rounding edge."""
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


def _windows_of(shape: EncoderShape, config: EncoderConfig | None) -> Windows | None:
    """Return the windows in which long audio is encoded, if ``config`` wants any.

    Raises:
        ValueError: if ``config`` asks for layers, or windows overlap by too little.
    """
    if config is not None and config.layers:
        raise ValueError(f"{config.SECTION}.layers is for encoders of Hugging Face: leave it out for one of NeMo")
    if config is None or config.window_seconds is None:
        return None
    return Windows(FrameCounter(shape.stages, shape.sample_rate), config, shape.size)


def front_end_stages(preprocessor: nn.Module) -> Iterable[LengthStage]:
    """Yield the short-time Fourier transform as NeMo counts it (``FilterbankFeatures.get_seq_len``).

    Raises:
        ValueError: if the front end is of another kind.
    """
    featurizer: Any = getattr(preprocessor, "featurizer", None)
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
    """Yield the strided convolutions in front of a (Fast)Conformer.

    Raises:
        ValueError: if the encoder has none whose lengths can be counted.
    """
    try:
        for convolution in subsampling_convolutions(encoder):
            yield LengthStage(*convolution)
    except AttributeError as error:
        kind = type(getattr(encoder, "pre_encode", None)).__name__
        raise ValueError(
            f"{type(encoder).__name__} with {kind} has no convolutional subsampling whose "
            "lengths can be counted; use a Conformer or FastConformer encoder"
        ) from error
