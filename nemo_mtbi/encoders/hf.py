# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of Hugging Face: Whisper's, and those on raw audio (WavLM, HuBERT, wav2vec 2.0)."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.compat.torch import fake_tensors
from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.base import EncoderShape, SpeechEncoder
from nemo_mtbi.encoders.hf_files import build_empty, load_weights, read_extractor
from nemo_mtbi.encoders.windows import Windows
from nemo_mtbi.io.text import read_json_object
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

CONFIG = "config.json"
FILES = (CONFIG, "preprocessor_config.json")
# Whisper: 80 or 128 mel channels each 10 ms, then convolutions of stride 1 and 2.
_SHORTEST = 400  # samples that its short-time Fourier transform takes at least
_WHISPER_STAGES = (LengthStage(160, 160), LengthStage(3, 1, 2), LengthStage(3, 2, 2))


def read_hf_config(path: Path) -> Mapping[str, Any]:
    """Return the ``config.json`` of an encoder.

    Raises:
        ValueError: if it can't be read, or is of another kind.
    """
    config = read_json_object(path / CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path}: model_type is {kind!r}; encoders are read of {', '.join(KINDS)}")
    return config


class HFSpeechEncoder(SpeechEncoder):
    """Front end (float32) and encoder of a Hugging Face model, always in ``eval()``.

    Args:
        model: the encoder.
        extractor: the feature extractor that belongs to it.
        config: how it is used.
        size: width of a hidden state.
        num_layers: of the encoder.
        stages: from samples to frames.

    Attributes:
        first_channels: of the first convolution.

    Raises:
        ValueError: if a layer is not there, or windows overlap by less than what frames at their ends need.
    """

    first_channels: int

    def __init__(
        self,
        model: Any,
        extractor: Any,
        config: EncoderConfig,
        size: int,
        num_layers: int,
        stages: tuple[LengthStage, ...],
    ):
        super().__init__()
        self.encoder, self._extractor = model, extractor
        wrong = [layer for layer in config.layers if not -num_layers - 1 <= layer <= num_layers]
        if wrong:
            raise ValueError(f"{config.SECTION}.layers has {wrong[0]}, but the encoder has layers 0 to {num_layers}")
        self._layers = [layer % (num_layers + 1) for layer in config.layers or (num_layers,)]
        self.shape = EncoderShape(size * max(len(config.layers), 1), int(extractor.sampling_rate), stages)
        self._windows = self.windows = Windows(FrameCounter(stages, self.shape.sample_rate), config, self.shape.size)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """Return whether a path is a directory with a configuration of Hugging Face."""
        return path.is_dir() and (path / CONFIG).is_file()

    @classmethod
    def load(cls, path: Path, config: EncoderConfig | None) -> HFSpeechEncoder:
        """Return the encoder of a directory of Hugging Face: see :func:`load_hf_encoder`."""
        return load_hf_encoder(path, config)

    @classmethod
    def empty(cls, path: Path, config: EncoderConfig | None) -> HFSpeechEncoder:
        """Return the encoder of a directory of Hugging Face without its weights.

        Raises:
            ValueError: as :func:`load_hf_encoder`, as far as it shows without weights.
        """
        with fake_tensors():
            return _assemble(path, config, build_empty)

    @classmethod
    def files(cls, path: Path) -> list[Path]:
        """Return configuration, front end and weights."""
        weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return [path / name for name in FILES if (path / name).is_file()] + weights

    @abstractmethod
    def encode(self, samples: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Return hidden states ``[W, E, D]`` of windows of equal length.

        Args:
            samples: ``[W, N]``.
            wanted: numbers of layers: 0 is the input of the first one; a norm behind the last is part of it.

        Returns:
            One for each of ``wanted``; ``E`` may be larger than the windows' count.
        """

    def padded_samples(self, samples: int) -> int:
        """Return the length to which a window of ``samples`` is filled up."""
        return samples

    def first_convolution(self) -> int:
        """Return numbers for two steps of the first stage, each of which gives all channels."""
        return 2 * self.first_channels

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances in windows.

        Args:
            audio: ``[U, N]`` samples at ``shape.sample_rate``.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` encoder frames and their ``[U]`` valid lengths.
        """
        with self.running(audio.device):
            return self._windows.encode(audio, lengths, self._encode, self.padded_samples)

    def _encode(self, pieces: Sequence[Tensor]) -> Tensor:
        samples = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        return torch.cat(self.encode(samples, self._layers), -1)  # [W, E, D]


class WhisperEncoder(HFSpeechEncoder):
    """Whisper's encoder (arXiv 2212.04356)."""

    def __init__(self, model: Any, extractor: Any, config: EncoderConfig):
        if config.window > extractor.chunk_length:
            raise ValueError(
                f"{config.SECTION}.window_seconds is {config.window:g}; Whisper takes {extractor.chunk_length} s "
                "at most"
            )
        sizes = model.config
        super().__init__(model, extractor, config, sizes.d_model, sizes.encoder_layers, _WHISPER_STAGES)
        self.first_channels = sizes.d_model
        self.padded = config.pad
        # transformers before 5 require these
        parameters = inspect.signature(type(model.layers[0]).forward).parameters
        self._masks = {name: None for name in ("attention_mask", "layer_head_mask") if name in parameters}

    def padded_samples(self, samples: int) -> int:
        """Return the length of Whisper's own windows, if the configuration wants them."""
        return self._extractor.n_samples if self.padded else samples

    def encode(self, samples: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Return hidden states, layer by layer, since the model's own forward takes 30 s only."""
        encoder: Any = self.encoder
        device = samples.device
        samples = nn.functional.pad(samples, (0, max(_SHORTEST - samples.shape[1], 0)))
        padding = {"padding": "max_length"} if self.padded else {"padding": "longest", "truncation": False}
        with torch.autocast(device.type, enabled=False):  # the front end is float32
            features = self._extractor(
                list(samples.cpu().numpy()),
                sampling_rate=self.shape.sample_rate,
                return_tensors="pt",
                device=str(device),
                **padding,
            ).input_features.to(device, next(encoder.parameters()).dtype)  # [W, mels, T]
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

    def __init__(self, model: Any, extractor: Any, config: EncoderConfig):
        sizes = model.config
        stages = tuple(map(LengthStage, sizes.conv_kernel, sizes.conv_stride))
        super().__init__(model, extractor, config, sizes.hidden_size, sizes.num_hidden_layers, stages)
        self.first_channels = sizes.conv_dim[0]

    def encode(self, samples: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Return hidden states of the model's own forward."""
        encoder: Any = self.encoder
        if self._extractor.do_normalize:
            # that of the extractor, on the device
            mean, variance = samples.mean(1, keepdim=True), samples.var(1, unbiased=False, keepdim=True)
            samples = (samples - mean) / (variance + 1e-7).sqrt()
        dtype = next(encoder.parameters()).dtype
        last = encoder.config.num_hidden_layers
        output = encoder(samples.to(dtype), output_hidden_states=set(wanted) != {last})
        # of the last one transformers 5 gives the state without the norm behind it
        return [output.last_hidden_state if n == last else output.hidden_states[n] for n in wanted]


KINDS: dict[str, type[WhisperEncoder] | type[WaveEncoder]] = {
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


def _assemble(
    path: Path, config: EncoderConfig | None, build: Callable[[Path, Mapping[str, Any]], nn.Module]
) -> HFSpeechEncoder:
    """Return an encoder around the module that ``build`` makes of the directory and its ``config.json``."""
    settings = read_hf_config(path)
    kind = settings["model_type"]
    try:
        model, extractor = build(path, settings), read_extractor(path, kind)
    except Exception as error:  # damaged files raise errors of many libraries
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the encoder in {path} can't be read: {reason}") from error
    return KINDS[kind](model, extractor, config or EncoderConfig())
