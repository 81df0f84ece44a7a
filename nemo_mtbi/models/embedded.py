# SPDX-License-Identifier: Apache-2.0
"""Encoder and LLM inside a ``.nemo``: what is stored of them, and how it is checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_mtbi.modules.architecture import DecoderConfig
from nemo_mtbi.modules.archive import NemoFile, read_yaml
from nemo_mtbi.modules.speech_encoder import SpeechEncoder
from nemo_mtbi.modules.tensor_file import ArchiveError, StoredTensors, misfits
from nemo_mtbi.modules.text_llm import SETTINGS, TOKENIZER_FILES
from nemo_mtbi.modules.text_llm import WEIGHTS as LLM_FILE
from nemo_mtbi.modules.windows import EncoderConfig
from nemo_mtbi.parallel.groups import ParallelConfig
from nemo_mtbi.parallel.memory import decoder_parameters
from nemo_mtbi.schema import read_section

# Names in an archive. Unpacked, llm/ is a text LLM directory like any other.
LLM_SETTINGS, LLM_WEIGHTS = f"llm/{SETTINGS}", f"llm/{LLM_FILE}"
TOKENIZERS = tuple(f"llm/{name}" for name in TOKENIZER_FILES)
ENCODER_SETTINGS, ENCODER_WEIGHTS = "encoder/encoder.yaml", "encoder/encoder.safetensors"
_ENCODER_CLASS = re.compile(r"nemo\.collections\.asr\.modules(\.\w+)?\.\w+")


def check_architecture(settings: bytes, tensors: StoredTensors) -> None:
    """Compares an LLM's size with that of its weights, before memory is taken for it."""
    values = read_yaml(settings, LLM_SETTINGS)
    architecture = read_section(DecoderConfig, values.get("architecture"), f"{LLM_SETTINGS}: architecture")
    sizes = [value for value in vars(architecture).values() if type(value) is int]
    if min(sizes) < 1:
        raise ArchiveError(f"{LLM_SETTINGS} has sizes below 1")
    if architecture.num_layers > len(tensors.shapes):  # each takes time to build, however small it is
        raise ArchiveError(f"{LLM_SETTINGS} describes {architecture.num_layers} layers, more than {LLM_WEIGHTS} has")
    numbers = sum(torch.Size(shape).numel() for shape in tensors.shapes.values())
    wanted = decoder_parameters(architecture, ParallelConfig(), 0)
    if numbers != wanted:
        raise ArchiveError(f"{LLM_SETTINGS} describes {wanted} weights, but {LLM_WEIGHTS} has {numbers}")


def encoder_settings(encoder: SpeechEncoder) -> bytes:
    """What it takes to build front end and encoder, as YAML.

    Raises:
        ValueError: for an encoder that is none of NeMo.
    """
    if not isinstance(encoder, SpeechEncoder):
        raise ValueError("a full .nemo holds one encoder of NeMo: save a small one, with full=False")
    parts = {name: getattr(encoder, name)._cfg for name in ("preprocessor", "encoder")}
    parts = {name: OmegaConf.to_container(OmegaConf.create(part), resolve=True) for name, part in parts.items()}
    return yaml.safe_dump({"sample_rate": encoder.shape.sample_rate, **parts}, sort_keys=False).encode()


def read_encoder(file: NemoFile, dtype: torch.dtype, config: EncoderConfig | None = None) -> SpeechEncoder:
    """Front end (float32) and encoder (``dtype``) inside an archive.

    Args:
        file: the archive.
        dtype: of the encoder's weights.
        config: how it is used.

    Raises:
        ValueError: if they are damaged, or their frames can't be counted.
    """
    settings, tensors = file.settings(ENCODER_SETTINGS), file.tensors(ENCODER_WEIGHTS)
    classes = {name: _check_class(settings, name) for name in ("preprocessor", "encoder")}
    if classes.keys() | {"sample_rate"} != settings.keys() or type(settings["sample_rate"]) is not int:
        raise ArchiveError(f"{ENCODER_SETTINGS} must hold preprocessor, encoder and sample_rate, and no more")
    layers = settings["encoder"].get("n_layers", 0)
    if type(layers) is not int or layers > len(tensors.shapes):
        raise ArchiveError(f"{ENCODER_SETTINGS} describes {layers} layers, more than {ENCODER_WEIGHTS} has")
    with FakeTensorMode():  # has shapes and takes no memory
        probe = _build(settings)
        expected = {
            f"{name}.{key}": tuple(value.shape)
            for name in classes
            for key, value in getattr(probe, name).state_dict().items()
        }
    wrong = misfits(expected, tensors.shapes)
    if wrong:
        raise ArchiveError(f"the encoder's weights do not fit its settings: {'; '.join(wrong[:5])}")
    encoder = SpeechEncoder(_build(settings), config)
    for name, value in encoder.state_dict().items():
        value.copy_(tensors.tensor(name))
    encoder.settle(dtype, config)
    return encoder


def _check_class(settings: Mapping[str, Any], name: str) -> type:
    """The class of a part, which must be one of NeMo's modules for speech; nothing else is imported or called."""
    section = settings.get(name)
    target = str(section.get("_target_")) if isinstance(section, dict) else "nothing"
    if not _ENCODER_CLASS.fullmatch(target):
        raise ArchiveError(f"its {name} is {target}, no module of nemo.collections.asr")
    for key in _keys({key: value for key, value in section.items() if key != "_target_"}):
        if str(key).startswith("_") or key in ("target", "cls"):
            raise ArchiveError(f"its {name} has {key}, which could call other code")
    try:
        found = get_class(target)
    except (ImportError, AttributeError, ValueError, InstantiationException) as error:
        raise ArchiveError(f"its {name} is {target}, which this NeMo does not have") from error
    if not issubclass(found, nn.Module) or not found.__module__.startswith("nemo.collections.asr.modules"):
        raise ArchiveError(f"its {name} is {target}, no module of nemo.collections.asr")
    return found


def _keys(value: Any) -> Iterator[Any]:
    """All keys of settings within settings."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(inner)


def _build(settings: Mapping[str, Any]) -> SimpleNamespace:
    """Front end and encoder, as an ASR model has them."""
    from nemo.core.classes.common import Serialization

    try:
        parts = {
            name: Serialization.from_config_dict(OmegaConf.create(settings[name]))
            for name in ("preprocessor", "encoder")
        }
    except InstantiationException as error:
        raise ArchiveError(f"{ENCODER_SETTINGS} describes no encoder ({str(error).splitlines()[0]})") from error
    return SimpleNamespace(**parts, cfg=SimpleNamespace(sample_rate=settings["sample_rate"]))
