# SPDX-License-Identifier: Apache-2.0
"""Files of Hugging Face's speech encoders, read with care: others have made them.

Classes are named here and not by the files, weights are safetensors and never pickles, and a configuration is compared
with the weights that are there before memory is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_mtbi.compat.transformers import build_from_config
from nemo_mtbi.io.tensor_file import StoredTensors
from nemo_mtbi.llm.convert.hf import weight_files

# By model_type: the prefixes that names of weights may have, and the module, model, configuration and front end.
_WHISPER = ("model.encoder.", "encoder.")
_WAVE_FRONT_END = ("wav2vec2.feature_extraction_wav2vec2", "Wav2Vec2FeatureExtractor")
_CLASSES: dict[str, tuple[tuple[str, ...], str, str, str, tuple[str, str]]] = {
    "whisper": (
        _WHISPER,
        "whisper.modeling_whisper",
        "WhisperEncoder",
        "WhisperConfig",
        ("whisper.feature_extraction_whisper", "WhisperFeatureExtractor"),
    ),
    "wav2vec2": (("wav2vec2.",), "wav2vec2.modeling_wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", _WAVE_FRONT_END),
    "hubert": (("hubert.",), "hubert.modeling_hubert", "HubertModel", "HubertConfig", _WAVE_FRONT_END),
    "wavlm": (("wavlm.",), "wavlm.modeling_wavlm", "WavLMModel", "WavLMConfig", _WAVE_FRONT_END),
}
# Keys by which files ask for other code, other kernels or other files.
_DROPPED = ("auto_map", "attn_implementation", "name_or_path", "transformers_version")
_LAYERS = ("encoder_layers", "num_hidden_layers")
_LARGEST = 2**31  # of any number in a configuration
_LONGEST = 64  # of any list of sizes
# Largest numbers of a front end: channels, hertz, samples, seconds.
_FRONT_END = {"feature_size": 1024, "sampling_rate": 2**18, "hop_length": 2**15, "n_fft": 2**15, "chunk_length": 600}
_LARGEST_WINDOW = 2**24  # samples
_UNTRAINED = ("masked_spec_embed",)  # of training only


def _named(module: str, name: str) -> Any:
    """Return a class of transformers."""
    from importlib import import_module

    return getattr(import_module(f"transformers.models.{module}"), name)


def _config_of(path: Path, given: Mapping[str, Any]) -> Any:
    """Return a configuration of transformers, without keys that name other code or files.

    Raises:
        ValueError: if its numbers are not those of an encoder.
    """
    if given.get("quantization_config"):
        raise ValueError("its weights are quantized: give those in 16 or 32 bits")
    kept = {key: value for key, value in given.items() if key not in _DROPPED and not key.startswith("_")}
    for key, value in kept.items():
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, list) and len(value) > _LONGEST and key.startswith("conv_"):
            raise ValueError(f"config.json has {len(value)} numbers in {key}")
        for number in numbers:
            if isinstance(number, (int, float)) and not -_LARGEST < number < _LARGEST:
                raise ValueError(f"config.json has {number} in {key}")
            if key.startswith("conv_") and isinstance(number, int) and number < 1 and not isinstance(number, bool):
                raise ValueError(f"config.json has {number} in {key}")
    _, module, _, name, _ = _CLASSES[given["model_type"]]
    return _named(module.replace("modeling", "configuration"), name).from_dict(kept)


def _class_of(kind: str) -> Any:
    """Return the class of an encoder, a ``PreTrainedModel``."""
    _, module, name, _, _ = _CLASSES[kind]
    return _named(module, name)


def build_empty(path: Path, given: Mapping[str, Any]) -> nn.Module:
    """Build an encoder with random weights.

    Args:
        path: of the directory.
        given: content of its ``config.json``.
    """
    return build_from_config(_class_of(given["model_type"]), _config_of(path, given))


def load_weights(path: Path, given: Mapping[str, Any]) -> nn.Module:
    """Build an encoder with the weights of a directory.

    Args:
        path: of the directory.
        given: content of its ``config.json``.

    Raises:
        ValueError: if weights are missing, or do not fit the configuration.
    """
    kind, config = given["model_type"], _config_of(path, given)
    missing = [file.name for file in weight_files(path) if not file.is_file()]
    if missing:
        pickled = " (it has weights as a pickle, which could run code)" if any(path.glob("*.bin")) else ""
        raise ValueError(
            f"it lacks {', '.join(missing)}{pickled}: load the model with transformers and save it with "
            "save_pretrained, which writes safetensors"
        )
    with _Stored(path, _CLASSES[kind][0]) as stored:
        _check_sizes(kind, config, stored)
        state = {name: stored.tensor(name) for name in stored.shapes}
    model, report = _class_of(kind).from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    # transformers draws what is missing
    lacking = sorted(name for name in report["missing_keys"] if not name.startswith(_UNTRAINED))
    if lacking:
        raise ValueError(f"the weights lack {', '.join(lacking[:5])}")
    return model


class _Stored:
    """The tensors of an encoder in one or several files, by names without their prefix."""

    def __init__(self, path: Path, prefixes: tuple[str, ...]):
        self._streams = [open(file, "rb") for file in weight_files(path)]  # noqa: SIM115
        self._prefixes = prefixes
        self._places: dict[str, tuple[StoredTensors, str]] = {}

    def __enter__(self) -> _Stored:
        try:
            self._places = dict(self._find())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        for stream in self._streams:
            stream.close()

    def _find(self) -> Iterator[tuple[str, tuple[StoredTensors, str]]]:
        places: dict[str, tuple[StoredTensors, str]] = {}
        for stream in self._streams:
            file = StoredTensors(stream, Path(stream.name).name, 0, Path(stream.name).stat().st_size)
            places |= {name: (file, name) for name in file.names()}
        prefix = next((p for p in self._prefixes if any(name.startswith(p) for name in places)), None)
        for name, place in places.items():
            if prefix is None or name.startswith(prefix):
                yield name.removeprefix(prefix or ""), place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors."""
        return {name: file.shape(stored) for name, (file, stored) in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor."""
        file, stored = self._places[name]
        return file.tensor(stored)


def _check_sizes(kind: str, config: Any, stored: _Stored) -> None:
    """Compare a configuration with the weights that are there, before memory is taken for it."""
    for key in _LAYERS:
        layers = getattr(config, key, 0)
        if type(layers) is not int or layers > len(stored.shapes):
            raise ValueError(f"config.json describes {layers} layers, more than the weights have")
    with torch.device("meta"):
        probe = build_from_config(_class_of(kind), config)
    wanted = sum(value.numel() for name, value in probe.named_parameters() if not name.startswith(_UNTRAINED))
    stored_count = sum(math.prod(shape) for shape in stored.shapes.values())
    if wanted > stored_count:
        raise ValueError(f"config.json describes {wanted} weights, but there are {stored_count}")


def read_extractor(path: Path, kind: str) -> Any:
    """Read the front end of an encoder, by the class that belongs to its kind.

    Args:
        path: of the directory.
        kind: ``model_type``.

    Raises:
        ValueError: if its numbers are not those of a front end.
    """
    cls = _named(*_CLASSES[kind][4])
    given, _ = cls.get_feature_extractor_dict(str(path), local_files_only=True)
    given = {key: value for key, value in given.items() if key not in _DROPPED and not key.startswith("_")}
    for key, most in _FRONT_END.items():
        value = given.get(key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"preprocessor_config.json has {value!r} in {key}")
    if given.get("chunk_length", 1) * given.get("sampling_rate", 1) > _LARGEST_WINDOW:
        raise ValueError("preprocessor_config.json has windows of more samples than fit")
    return cls.from_dict(given)
