# SPDX-License-Identifier: Apache-2.0
"""Encoder and LLM inside a ``.nemo``: what is stored of them, and how it is checked before anything is built."""

from __future__ import annotations

import torch
import yaml

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.config.schema import read_section
from nemo_mtbi.encoders.base import SpeechEncoder
from nemo_mtbi.encoders.nemo_parts import fill_encoder
from nemo_mtbi.encoders.paired import AnyEncoder
from nemo_mtbi.encoders.registry import ENCODERS, NEMO, name_of
from nemo_mtbi.io.nemo_tar import NemoFile, read_yaml
from nemo_mtbi.io.tensor_file import ArchiveError, StoredTensors
from nemo_mtbi.io.untrusted_yaml import shown
from nemo_mtbi.llm.architecture import DecoderConfig, parameter_count
from nemo_mtbi.llm.directory import SETTINGS, TOKENIZER_FILES
from nemo_mtbi.llm.directory import WEIGHTS as LLM_FILE

# Names in an archive. Unpacked, llm/ is a text LLM directory like any other.
LLM_SETTINGS, LLM_WEIGHTS = f"llm/{SETTINGS}", f"llm/{LLM_FILE}"
TOKENIZERS = tuple(f"llm/{name}" for name in TOKENIZER_FILES)
_KIND = "kind"  # of an encoder, in its settings; NeMo's have none
ENCODER_SETTINGS, ENCODER_WEIGHTS = "encoder/encoder.yaml", "encoder/encoder.safetensors"


def check_stored_architecture(settings: bytes, tensors: StoredTensors) -> None:
    """Compare an LLM's size with that of its weights, before memory is taken for it."""
    values = read_yaml(settings, LLM_SETTINGS)
    architecture = read_section(DecoderConfig, values.get("architecture"), f"{LLM_SETTINGS}: architecture")
    sizes = [value for value in vars(architecture).values() if type(value) is int]
    if min(sizes) < 1:
        raise ArchiveError(f"{LLM_SETTINGS} has sizes below 1")
    if architecture.num_layers > len(tensors.shapes):  # each takes time to build, however small it is
        raise ArchiveError(f"{LLM_SETTINGS} describes {architecture.num_layers} layers, more than {LLM_WEIGHTS} has")
    numbers = sum(torch.Size(shape).numel() for shape in tensors.shapes.values())
    wanted = parameter_count(architecture)
    if numbers != wanted:
        raise ArchiveError(f"{LLM_SETTINGS} describes {wanted} weights, but {LLM_WEIGHTS} has {numbers}")


def encoder_settings(encoder: AnyEncoder | None) -> bytes:
    """Return the values that front end and encoder are built from, as YAML.

    Raises:
        ValueError: for an encoder that a full ``.nemo`` can't hold.
    """
    if not isinstance(encoder, SpeechEncoder):  # two of them
        raise ValueError("a full .nemo holds one encoder of NeMo: save a small one, with full=False")
    settings, name = encoder.settings(), name_of(type(encoder))
    return yaml.safe_dump(settings if name == NEMO else {_KIND: name, **settings}, sort_keys=False).encode()


def read_encoder(file: NemoFile, dtype: torch.dtype, config: EncoderConfig | None = None) -> SpeechEncoder:
    """Return front end (float32) and encoder (``dtype``) inside an archive.

    Args:
        file: the archive.
        dtype: of the encoder's weights.
        config: how it is used.

    Raises:
        ValueError: if they are damaged, or their frames can't be counted.
    """
    settings, tensors = file.settings(ENCODER_SETTINGS), file.tensors(ENCODER_WEIGHTS)
    name = settings.get(_KIND, NEMO)
    if not isinstance(name, str) or name not in ENCODERS:
        raise ArchiveError(f"{ENCODER_SETTINGS} names the encoder kind {shown(name)}: import what registers it first")
    own = {key: value for key, value in settings.items() if key != _KIND}
    encoder = ENCODERS[name].from_settings(own, config, tensors.shapes, ENCODER_SETTINGS, ENCODER_WEIGHTS)
    fill_encoder(encoder, tensors.tensor)
    encoder.set_trainable(dtype, config)
    return encoder
