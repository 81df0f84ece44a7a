# SPDX-License-Identifier: Apache-2.0
"""The frozen parts on disk: text LLMs and speech encoders, by path or by the name ``demo``.

A text LLM is a directory: ``llm.yaml`` (architecture and chat format), ``model.safetensors`` (weights under canonical
names, the same for every layer spec) and ``tokenizer.model`` (SentencePiece). A speech encoder is the ``.nemo`` of any
NeMo ASR model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from nemo_mtbi.data.chat import ChatFormat
from nemo_mtbi.modules.connector import ConnectorConfig
from nemo_mtbi.modules.decoder import DecoderConfig, GPTDecoder, build_decoder
from nemo_mtbi.modules.speech_encoder import SpeechEncoder
from nemo_mtbi.modules.speech_llm import SpeechLLM
from nemo_mtbi.modules.weights import SafetensorsWeights, canonical_name, load_weights
from nemo_mtbi.parallel import groups

DEMO = Path(__file__).parent.parent / "assets" / "demo"
_FILES = ("llm.yaml", "model.safetensors", "tokenizer.model")


@dataclass
class TextLLM:
    """A frozen text LLM with what belongs to it.

    Attributes:
        chunks: the Megatron GPT, or this process's runs of its layers under the layout in force.
        chat: its chat format, with the tokenizer.
        fingerprint: hash of architecture, weights, tokenizer and chat format: who made a target.
    """

    chunks: list[GPTDecoder]
    chat: ChatFormat
    fingerprint: str

    @property
    def decoder(self) -> GPTDecoder:
        """The first of ``chunks``: the whole LLM in a single process."""
        return self.chunks[0]


def resolve(name: str | Path, key: str, demo: str) -> Path:
    """Path of a pretrained part; ``demo`` means the small one inside this package.

    Raises:
        ValueError: if nothing is there; names the config ``key``.
    """
    path = DEMO / demo if str(name) == "demo" else Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{key}={name}: {path} does not exist; give a path or 'demo' for the small model shipped with us"
        )
    return path


def llm_fingerprint(path: str | Path) -> str:
    """Hash of the files of a text LLM."""
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(hashlib.sha256((Path(path) / name).read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def save_text_llm(
    path: str | Path,
    architecture: DecoderConfig,
    weights: Mapping[str, Tensor],
    tokenizer_model: bytes,
    turn: Sequence[str],
    end: str,
) -> None:
    """Writes a text LLM directory; ``weights`` by the decoder's own names, stored as float16."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    chat = {"turn": list(turn), "end": end}
    settings = {"format_version": 1, "architecture": dataclasses.asdict(architecture), "chat": chat}
    (path / "llm.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (path / "tokenizer.model").write_bytes(tokenizer_model)
    stored = {canonical_name(name): value.detach().half().contiguous() for name, value in weights.items()}
    save_file(stored, path / "model.safetensors")


def load_text_llm(
    name: str | Path, dtype: torch.dtype = torch.float32, weights: bool = True, **overrides: Any
) -> TextLLM:
    """Loads a text LLM, or this process's share of it under the layout in force.

    Args:
        name: directory, or ``demo``.
        dtype: of the decoder's weights.
        weights: ``False`` leaves them unset, for a model whose weights come from a checkpoint.
        **overrides: keys of Megatron's ``TransformerConfig``.

    Raises:
        ValueError: if the directory is incomplete or its parts do not fit.
    """
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    path = resolve(name, "model.pretrained_llm", "llm")
    missing = [file for file in _FILES if not (path / file).is_file()]
    if missing:
        raise ValueError(
            f"model.pretrained_llm={name}: {path} lacks {', '.join(missing)}; it is no text LLM directory"
        )
    settings = yaml.safe_load((path / "llm.yaml").read_text())
    version = settings.get("format_version") if isinstance(settings, dict) else None
    if version != 1:
        raise ValueError(f"{path / 'llm.yaml'} has format_version {version}; this version reads 1")
    try:
        turn, end = tuple(settings["chat"]["turn"]), settings["chat"]["end"]
        architecture = DecoderConfig(**settings["architecture"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / 'llm.yaml'} lacks a key, or has one too many: {error}") from error
    tokenizer = SentencePieceTokenizer(str(path / "tokenizer.model"))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the LLM embeds {architecture.vocab_size}: "
            "they do not belong together"
        )
    chunks = build_decoder(architecture, dtype, **overrides)
    if weights:
        load_weights(chunks, SafetensorsWeights(path / "model.safetensors"))
    return TextLLM(chunks, ChatFormat(turn, end, tokenizer), llm_fingerprint(path))


def load_asr_model(name: str | Path):
    """Restores a NeMo ASR model on the CPU; our own safetensors archives too."""
    from nemo.collections.asr.models import ASRModel

    from nemo_mtbi.modules.archive import TensorArchive

    path = resolve(name, "model.pretrained_asr", "encoder.nemo")
    try:
        return ASRModel.restore_from(str(path), map_location="cpu", save_restore_connector=TensorArchive())
    except (OSError, KeyError, tarfile.TarError) as error:
        raise ValueError(f"model.pretrained_asr={name}: {path} is no NeMo ASR checkpoint ({error})") from error


def load_speech_encoder(name: str | Path, dtype: torch.dtype = torch.float32) -> SpeechEncoder:
    """Front end (float32) and encoder (``dtype``) of a NeMo ASR ``.nemo``, or of ``demo``."""
    encoder = SpeechEncoder(load_asr_model(name))
    encoder.encoder.to(dtype)
    return encoder


def load_speech_llm(
    pretrained_asr: str | Path,
    pretrained_llm: str | Path,
    connector: ConnectorConfig,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> tuple[SpeechLLM, TextLLM]:
    """Joins frozen parts and a new connector: this process's share of them under the layout in force.

    Args:
        pretrained_asr: NeMo ASR ``.nemo``, read on the first stage only.
        pretrained_llm: text LLM directory.
        connector: the trainable part.
        dtype: of the frozen weights; the front end and the connector are float32.
        **overrides: keys of Megatron's ``TransformerConfig``.
    """
    text = load_text_llm(pretrained_llm, dtype, **overrides)
    encoder = load_speech_encoder(pretrained_asr, dtype) if groups.is_first_stage() else None
    shape = groups.broadcast_object(encoder.shape if encoder else None)
    return SpeechLLM(encoder, connector, text.chunks, shape), text
