# SPDX-License-Identifier: Apache-2.0
"""The frozen parts, by path or by the name ``demo``.

Text LLMs are directories (:mod:`nemo_mtbi.llm.directory`), speech encoders are the ``.nemo`` of any NeMo ASR model.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderConfig, SecondEncoder
from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.encoders.base import SpeechEncoder
from nemo_mtbi.encoders.paired import AnyEncoder, PairedEncoder
from nemo_mtbi.encoders.registry import kind_of
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.llm.decoder import GPTDecoder, build_decoder
from nemo_mtbi.llm.directory import (
    SENTENCEPIECE,
    SETTINGS,
    WEIGHTS,
    TextLLMDirectory,
    open_text_llm,
    settings_yaml,
)
from nemo_mtbi.llm.layers import HAVE_TE
from nemo_mtbi.llm.weights import canonical_name, check_weights, load_weights
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.model import SpeechLLM

ASR_KEY = "model.pretrained_asr"
DEMO = Path(__file__).parent.parent / "assets" / "demo"


@dataclass
class TextLLM:
    """A frozen text LLM with what belongs to it.

    Attributes:
        chunks: the Megatron GPT, or this process's runs of its layers under the layout in force.
        chat: its chat format, with the tokenizer.
        fingerprint: hash of architecture, weights and tokenizer: who made a target.
        texts: its settings and tokenizer, by the names of files.
    """

    chunks: list[GPTDecoder]
    chat: ChatFormat
    fingerprint: str
    texts: dict[str, bytes]

    @property
    def decoder(self) -> GPTDecoder:
        """The first of ``chunks``: the whole LLM in a single process."""
        return self.chunks[0]


def resolve(name: str | Path, key: str, demo: str) -> Path:
    """Return path of a pretrained part; ``demo`` means the small one inside this package.

    Raises:
        ValueError: if nothing is there; names the config ``key``.
    """
    path = DEMO / demo if str(name) == "demo" else Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{key}={name}: {path} does not exist; give a path or 'demo' for the small model shipped with us"
        )
    return path


def find_text_llm(name: str | Path, key: str = "model.pretrained_llm") -> TextLLMDirectory:
    """Return the text LLM directory of a name or path.

    Raises:
        ValueError: if there is none, or it is not whole; names the config ``key``.
    """
    directory = open_text_llm(resolve(name, key, "llm"))
    missing = directory.missing()
    if missing:
        raise ValueError(
            f"{key}={name}: {directory.path} lacks {', '.join(missing)}; it is not a text LLM directory, neither "
            "one of ours nor of Hugging Face"
        )
    return directory


def save_text_llm(
    path: str | Path,
    architecture: DecoderConfig,
    weights: Mapping[str, Tensor],
    tokenizer_model: bytes,
    turn: Sequence[str],
    end: str,
) -> None:
    """Write a text LLM directory; ``weights`` by the decoder's own names, stored as float16."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / SETTINGS).write_text(settings_yaml(architecture, tuple(turn), end))
    (path / SENTENCEPIECE).write_bytes(tokenizer_model)
    stored = {canonical_name(name): value.detach().half().contiguous() for name, value in weights.items()}
    save_file(stored, path / WEIGHTS)


def load_text_llm(
    name: str | Path | TextLLMDirectory,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    chat: ChatConfig | None = None,
    transformer_engine: bool = HAVE_TE,
    **overrides: Any,
) -> TextLLM:
    """Load a text LLM, or this process's share of it under the layout in force.

    Args:
        name: directory of ours or of Hugging Face, or ``demo``.
        dtype: of the decoder's weights.
        weights: ``False`` leaves them unset, for a model whose weights come from a checkpoint.
        chat: how prompt and speech are put; ``None``: as the LLM says.
        transformer_engine: whether its layers are used.
        **overrides: keys of Megatron's ``TransformerConfig``.

    Raises:
        ValueError: if the directory is incomplete or its parts do not fit.
    """
    directory = name if isinstance(name, TextLLMDirectory) else find_text_llm(name)
    form, source = directory.chat(chat), directory.weights() if weights else None
    if source is not None:
        check_weights(directory.architecture, source)
    chunks = build_decoder(directory.architecture, dtype, transformer_engine, **overrides)
    if source is not None:
        load_weights(chunks, source)
    return TextLLM(chunks, form, directory.fingerprint, directory.texts(form))


def load_asr_model(name: str | Path) -> Any:
    """Restore a CTC model of NeMo on the CPU, or the CTC part of a hybrid one; our own safetensors archives too.

    Raises:
        ValueError: if there is none, or the archive holds what no such model has.
    """
    from nemo.collections.asr.models import ASRModel

    from nemo_mtbi.encoders.asr_archive import TensorArchive

    path = resolve(name, ASR_KEY, "encoder.nemo")
    with refusing_asr(name, path):
        return ASRModel.restore_from(str(path), map_location="cpu", save_restore_connector=TensorArchive())


@contextmanager
def refusing_asr(
    name: str | Path, path: Path, key: str = ASR_KEY, title: str = "NeMo ASR checkpoint"
) -> Iterator[None]:
    """Say of errors in the body that a file is not a NeMo ASR checkpoint, or not an encoder of another kind.

    Args:
        name: as it was given.
        path: of the file.
        key: of the configuration that names it.
        title: of the kind.

    Raises:
        ValueError: names file and reason.
    """
    try:
        yield
    except (ArchiveError, OSError, KeyError, tarfile.TarError) as error:
        raise ValueError(f"{key}={name}: {path} is not a readable {title} ({error})") from error


def load_speech_encoder(
    name: str | Path, dtype: torch.dtype = torch.float32, config: EncoderConfig | None = None
) -> AnyEncoder:
    """Load front end (float32) and encoder (``dtype``), or two of them.

    Args:
        name: path that a kind of encoder recognizes (:mod:`nemo_mtbi.encoders.registry`), or ``demo``.
        dtype: of the encoder's weights; those that train are float32 and compute in it.
        config: how it is used; ``None``: Hugging Face's by the defaults, NeMo's on whole utterances.

    Raises:
        ValueError: if it can't be read, or ``config`` asks for what it does not have.
    """
    encoder = open_encoder(name, config)
    encoder.set_trainable(dtype, config)
    second: SecondEncoder | None = getattr(config, "beside", None)
    if second is None:
        return encoder
    beside = open_encoder(second.path, second)
    beside.set_trainable(dtype, second)
    return PairedEncoder(encoder, beside)


def open_encoder(name: str | Path, config: EncoderConfig | None, weights: bool = True) -> SpeechEncoder:
    """Read one encoder by the class of its kind, in the dtype of its file.

    Args:
        name: path of the encoder, or ``demo``.
        config: how it is used; of a second encoder: :class:`SecondEncoder`.
        weights: ``False`` gives tensors that have shapes and hold nothing.

    Raises:
        ValueError: as :func:`load_speech_encoder`.
    """
    key = "model.encoder.beside.path" if isinstance(config, SecondEncoder) else ASR_KEY
    path = resolve(name, key, "encoder.nemo")
    kind = kind_of(path)
    with refusing_asr(name, path, key, kind.title):
        return kind.load(path, config) if weights else kind.empty(path, config)


def load_speech_llm(
    pretrained_asr: str | Path,
    pretrained_llm: str | Path,
    connector: ConnectorConfig,
    dtype: torch.dtype = torch.float32,
    lora: LoraConfig | None = None,
    llm: LlmConfig | None = None,
    encoder_config: EncoderConfig | None = None,
    loss: LossConfig | None = None,
    **overrides: Any,
) -> tuple[SpeechLLM, TextLLM]:
    """Join frozen parts and a new connector: this process's share of them under the layout in force.

    Args:
        pretrained_asr: NeMo ASR ``.nemo``, read on the first stage only.
        pretrained_llm: text LLM directory.
        connector: the trainable part.
        dtype: of the frozen weights; the front end, the connector and adapters are float32.
        lora: adapters in the LLM; ``None``: none.
        llm: what trains of the LLM itself; ``None``: nothing.
        encoder_config: how the encoder is used, and what of it trains.
        loss: what is minimized; ``None``: the default.
        **overrides: keys of Megatron's ``TransformerConfig``.
    """
    text = load_text_llm(pretrained_llm, dtype, transformer_engine=HAVE_TE and lora is None, **overrides)
    encoder = load_speech_encoder(pretrained_asr, dtype, encoder_config) if groups.is_first_stage() else None
    shape = groups.broadcast_object(encoder.shape if encoder else None)
    return SpeechLLM(encoder, connector, text.chunks, shape, lora, llm, loss=loss), text
