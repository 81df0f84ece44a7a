# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of Hugging Face: Whisper's, and those on the raw wave (WavLM, HuBERT, wav2vec 2.0)."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.base import Hearing
from nemo_mtbi.encoders.hf_files import build_empty, load_weights, read_extractor
from nemo_mtbi.encoders.nemo import EncoderShape
from nemo_mtbi.encoders.windows import Windows
from nemo_mtbi.io.text import read_json_object
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

CONFIG = "config.json"
FILES = (CONFIG, "preprocessor_config.json")
# Whisper: 80 or 128 mel channels each 10 ms, then convolutions of stride 1 and 2.
_SHORTEST = 400  # samples that its short-time Fourier transform takes at least
_WHISPER_STAGES = (LengthStage(160, 160), LengthStage(3, 1, 2), LengthStage(3, 2, 2))


def is_hf_encoder(path: Path) -> bool:
    """Whether a path is a directory of Hugging Face."""
    return path.is_dir() and (path / CONFIG).is_file()


def read_hf_config(path: Path) -> Mapping[str, Any]:
    """The ``config.json`` of an encoder.

    Raises:
        ValueError: if it can't be read, or is of another kind.
    """
    config = read_json_object(path / CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path}: model_type is {kind!r}; encoders are read of {', '.join(KINDS)}")
    return config


class HFSpeechEncoder(Hearing, ABC):
    """Front end (float32) and encoder of a Hugging Face model, always in ``eval()``.

    Args:
        model: the encoder.
        extractor: the feature extractor that belongs to it.
        config: how it is used.
        size: width of a hidden state.
        num_layers: of the encoder.
        stages: from samples to frames.

    Attributes:
        first_channels: of the first convolution, whose output is the largest.

    Raises:
        ValueError: if a layer is not there, or windows overlap by less than what frames at their ends need.
    """

    first_channels: int

    def __init__(
        self,
        model: nn.Module,
        extractor: Any,
        config: EncoderConfig,
        size: int,
        num_layers: int,
        stages: tuple[LengthStage, ...],
    ):
        super().__init__()
        self.encoder, self._extractor, self._config = model, extractor, config
        wrong = [layer for layer in config.layers if not -num_layers - 1 <= layer <= num_layers]
        if wrong:
            raise ValueError(f"{config.SECTION}.layers has {wrong[0]}, but the encoder has layers 0 to {num_layers}")
        self._layers = [layer % (num_layers + 1) for layer in config.layers or (num_layers,)]
        self.shape = EncoderShape(size * max(len(config.layers), 1), int(extractor.sampling_rate), stages)
        self._windows = Windows(FrameCounter(stages, self.shape.sample_rate), config, self.shape.size)
        self.requires_grad_(False)
        self.eval()

    @abstractmethod
    def encode(self, samples: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Hidden states ``[W, E, D]`` of windows of equal length ``[W, N]``.

        Args:
            samples: of the windows.
            wanted: numbers of layers: 0 is what enters the first one; a norm behind the last is part of it.

        Returns:
            One for each of ``wanted``; ``E`` may be larger than the windows' count.
        """

    def heard(self, samples: int) -> int:
        """Samples that the encoder hears of a window: more than it has where it is padded."""
        return samples

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            audio: ``[U, N]`` samples at ``sample_rate``.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` encoder frames and their ``[U]`` valid lengths.
        """
        with self.running(audio.device):
            return self._windows.encode(audio, lengths, self._encode, self.heard)

    def _encode(self, pieces: Sequence[Tensor]) -> Tensor:
        samples = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        return torch.cat(self.encode(samples, self._layers), -1)  # [W, E, D]


class WhisperEncoder(HFSpeechEncoder):
    """Whisper's encoder (arXiv 2212.04356)."""

    def __init__(self, model: nn.Module, extractor: Any, config: EncoderConfig):
        if config.window > extractor.chunk_length:
            raise ValueError(
                f"{config.SECTION}.window_seconds is {config.window:g}; Whisper hears {extractor.chunk_length} s"
            )
        sizes = model.config
        super().__init__(model, extractor, config, sizes.d_model, sizes.encoder_layers, _WHISPER_STAGES)
        self.first_channels = sizes.d_model
        # transformers before 5 ask for it
        asked = inspect.signature(type(model.layers[0]).forward).parameters
        self._masks = {name: None for name in ("attention_mask", "layer_head_mask") if name in asked}

    def heard(self, samples: int) -> int:
        return self._extractor.n_samples if self._config.pad else samples

    def encode(self, samples: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        encoder, device = self.encoder, samples.device
        samples = nn.functional.pad(samples, (0, max(_SHORTEST - samples.shape[1], 0)))
        padding = {"padding": "max_length"} if self._config.pad else {"padding": "longest", "truncation": False}
        with torch.autocast(device.type, enabled=False):  # the front end is float32
            features = self._extractor(
                list(samples.cpu().numpy()),
                sampling_rate=self.shape.sample_rate,
                return_tensors="pt",
                device=str(device),
                **padding,
            ).input_features.to(device, next(encoder.parameters()).dtype)  # [W, mels, T]
        # The model's own forward takes 30 s only.
        x = nn.functional.gelu(encoder.conv1(features))
        x = nn.functional.gelu(encoder.conv2(x)).transpose(1, 2)  # [W, E, D]
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        kept = {0: x}
        for number, layer in enumerate(encoder.layers, 1):
            output = layer(x, **self._masks)
            x = output[0] if isinstance(output, tuple) else output
            if number in wanted:
                kept[number] = x
        kept[len(encoder.layers)] = encoder.layer_norm(x)
        return [kept[number] for number in wanted]


class WaveEncoder(HFSpeechEncoder):
    """Encoders on the raw wave: wav2vec 2.0 (arXiv 2006.11477), HuBERT (2106.07447) and WavLM (2110.13900)."""

    def __init__(self, model: nn.Module, extractor: Any, config: EncoderConfig):
        sizes = model.config
        stages = tuple(map(LengthStage, sizes.conv_kernel, sizes.conv_stride))
        super().__init__(model, extractor, config, sizes.hidden_size, sizes.num_hidden_layers, stages)
        self.first_channels = sizes.conv_dim[0]

    def encode(self, samples: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        if self._extractor.do_normalize:
            # that of the extractor, on the device
            mean, variance = samples.mean(1, keepdim=True), samples.var(1, unbiased=False, keepdim=True)
            samples = (samples - mean) / (variance + 1e-7).sqrt()
        dtype = next(self.encoder.parameters()).dtype
        last = self.encoder.config.num_hidden_layers
        found = self.encoder(samples.to(dtype), output_hidden_states=set(wanted) != {last})
        # of the last one transformers 5 gives the state without the norm behind it
        return [found.last_hidden_state if n == last else found.hidden_states[n] for n in wanted]


KINDS: dict[str, type[HFSpeechEncoder]] = {
    "whisper": WhisperEncoder,
    "wav2vec2": WaveEncoder,
    "hubert": WaveEncoder,
    "wavlm": WaveEncoder,
}


def load_hf_encoder(path: Path, config: EncoderConfig | None = None) -> HFSpeechEncoder:
    """Load front end and encoder from a Hugging Face directory.

    Args:
        path: directory with ``config.json``, ``preprocessor_config.json`` and weights as safetensors.
        config: how it is used.

    Raises:
        ValueError: if something is missing, damaged, of another kind, or larger than the weights are.
    """
    return _assemble(path, config, load_weights)


def empty_hf_encoder(path: Path, config: EncoderConfig | None = None) -> HFSpeechEncoder:
    """The same with the weights that it is built with."""
    return _assemble(path, config, build_empty)


def _assemble(
    path: Path, config: EncoderConfig | None, build: Callable[[Path, Mapping[str, Any]], nn.Module]
) -> HFSpeechEncoder:
    found = read_hf_config(path)
    try:
        model, extractor = build(path, found), read_extractor(path, found["model_type"])
    except Exception as error:  # damaged files raise what the libraries below happen to raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the encoder in {path} can't be read: {reason}") from error
    return KINDS[found["model_type"]](model, extractor, config or EncoderConfig())
