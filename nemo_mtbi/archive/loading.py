# SPDX-License-Identifier: Apache-2.0
"""Loading of the frozen parts of a model, from disk or out of a ``.nemo``, and joining them with a new connector."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_mtbi.archive.embedded import (
    LLM_SETTINGS,
    LLM_WEIGHTS,
    TOKENIZERS,
    check_stored_architecture,
    read_encoder,
)
from nemo_mtbi.archive.frozen import FrozenParts, archive_with
from nemo_mtbi.archive.restored import OpenArchive, read_checked, restore_error
from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.config.schema import read_section
from nemo_mtbi.encoders.base import trained_shapes
from nemo_mtbi.encoders.cache import EncoderCache
from nemo_mtbi.encoders.paired import AnyEncoder
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.nemo_tar import WEIGHTS, read_yaml
from nemo_mtbi.llm.directory import WEIGHTS as LLM_FILE
from nemo_mtbi.llm.directory import OwnDirectory
from nemo_mtbi.llm.layers import HAVE_TE
from nemo_mtbi.llm.weights import load_weights
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.model import SpeechLLM
from nemo_mtbi.speech_llm.pretrained import TextLLM, find_text_llm, load_speech_encoder, load_text_llm
from nemo_mtbi.speech_llm.trainable import ModelShape, check_shapes, part_shapes, stored_parts

_FEW_LAYERS = 64  # of a connector, which are built before they are compared
_TEXT_LIMIT = 2**26  # bytes; the largest tokenizers have 20 MB


@dataclass(frozen=True)
class LoadedModel:
    """Frozen parts joined with a new connector.

    Attributes:
        speech_llm: encoder, connector and LLM, or this process's share of them.
        text_llm: the LLM with its chat format.
        shape: of the model; names and shapes of its trained weights follow from it.
        llm_files: settings and tokenizer of the LLM, by their names in an archive.
    """

    speech_llm: SpeechLLM
    text_llm: TextLLM
    shape: ModelShape
    llm_files: dict[str, bytes]


def load_model(config: ModelConfig, frozen: FrozenParts, archive: OpenArchive | None = None) -> LoadedModel:
    """Load the frozen parts and join them with a new connector: this process's share, under the layout in force.

    Args:
        config: of the model.
        frozen: the places of its frozen parts.
        archive: the ``.nemo`` that the model is restored from; ``None``: it is a new model.

    Raises:
        ValueError: if a part is damaged, or the connector is not the one of the archive that is restored; the same
            in all processes of a model replica.
    """
    dtype = getattr(torch, config.frozen_dtype)
    if config.llm_was_trained and "llm" not in frozen.embedded:
        raise ValueError(
            f"model.pretrained_llm={frozen.reference('llm')} is not the LLM of this .nemo, which was itself "
            "trained and is inside: leave pretrained_llm out"
        )
    text = _load_llm(config, frozen, archive, dtype)
    files = {f"llm/{name}": content for name, content in text.texts.items()}
    if archive is not None:
        _check_chat(config, archive, text.chat)
    encoder, failure, cause = None, None, None
    if groups.is_first_stage():
        try:
            encoder = _load_encoder(config, frozen, archive, dtype)
        except (ValueError, RuntimeError, OSError) as error:  # the other stages wait for what comes next
            cause = error
            inside = archive if "asr" in frozen.embedded else None
            failure = restore_error(inside.path, error) if inside else str(error)
    facts = (encoder.shape, trained_shapes(encoder)) if encoder else None
    facts, first_failure = groups.broadcast_object((facts, failure))
    if failure or first_failure:
        raise ValueError(failure or first_failure) from cause
    encoder_shape, encoder_weights = facts
    shape = ModelShape(
        config.connector, encoder_shape, encoder_weights, text.decoder.architecture, config.lora, config.llm
    )
    if archive is not None:
        _check_weights(shape, frozen, archive)
    speech_llm = SpeechLLM(
        encoder,
        config.connector,
        text.chunks,
        shape.encoder,
        config.lora,
        config.llm,
        llm_was_trained=config.llm_was_trained,
        loss=config.loss,
        encoder_cache=_encoder_cache(config, frozen.fingerprints["asr"]) if encoder else None,
    )
    return LoadedModel(speech_llm, text, shape, files)


def _encoder_cache(config: ModelConfig, encoder: str) -> EncoderCache | None:
    """Return the cache of the encoder with a fingerprint; ``None`` if there is to be none."""
    if not config.encoder_cache:
        return None
    if config.encoder is not None:
        encoder = f"sha256:{digest_of([encoder, asdict(config.encoder)])}"
    return EncoderCache(config.encoder_cache, encoder, getattr(torch, config.frozen_dtype))


def _load_encoder(
    config: ModelConfig, frozen: FrozenParts, archive: OpenArchive | None, dtype: torch.dtype
) -> AnyEncoder:
    path = frozen.path("asr")
    if path is not None:
        return load_speech_encoder(path, dtype, frozen.encoder_section)
    return read_encoder(archive_with("asr", archive).file, dtype, config.encoder)


def _load_llm(config: ModelConfig, frozen: FrozenParts, archive: OpenArchive | None, dtype: torch.dtype) -> TextLLM:
    # adapters stand behind norms, which Transformer Engine's layers fuse
    layers: dict[str, Any] = {"transformer_engine": HAVE_TE and config.lora is None, **config.megatron}
    if frozen.llm is not None:
        return load_text_llm(frozen.llm, dtype, chat=config.chat, **layers)
    archive = archive_with("llm", archive)
    file, tensors = archive.file, archive.file.tensors(LLM_WEIGHTS)
    texts = {name: file.read(name, _TEXT_LIMIT) for name in (LLM_SETTINGS, *TOKENIZERS) if name in file}
    check_stored_architecture(texts[LLM_SETTINGS], tensors)
    with tempfile.TemporaryDirectory() as folder:  # tokenizers want a path
        for name, content in texts.items():
            (Path(folder) / Path(name).name).write_bytes(content)
        (Path(folder) / LLM_FILE).touch()  # the weights are read from the archive
        directory = cast(OwnDirectory, find_text_llm(folder))  # files of our own names
        directory.written_with = config.chat  # unless another is asked for
        chat = config.chat if _overrides_chat(config, archive) else None
        text = load_text_llm(directory, dtype, weights=False, chat=chat, **layers)
    read_checked(lambda: load_weights(text.chunks, tensors), file.path)
    text.fingerprint = frozen.fingerprints["llm"]
    return text


def _overrides_chat(config: ModelConfig, archive: OpenArchive) -> bool:
    """Return whether the archive that is restored was trained with another ``model.chat``."""
    stored = OmegaConf.create(archive.stored.get("chat") or {})
    return config.chat != (read_section(ChatConfig, stored, "model.chat") if stored else None)


def _check_chat(config: ModelConfig, archive: OpenArchive, chat: ChatFormat) -> None:
    """Compare the prompts with those that the archive was trained with.

    Raises:
        ValueError: if they differ and ``model.chat`` was not overridden.
    """
    if LLM_SETTINGS not in archive.file:
        return
    then = read_yaml(archive.file.read(LLM_SETTINGS, _TEXT_LIMIT), LLM_SETTINGS).get("chat")
    now: dict[str, Any] = {"turn": list(chat.turn), "end": chat.end}
    if isinstance(then, dict) and "more" in then:  # an archive of before knows single turns
        now["more"] = list(chat.more)
        if chat.single:  # once its template was thought to split into turns: single turns are what they were
            now["more"] = then["more"]
    if "ends" in (then or {}):  # likewise, one end token
        now["ends"] = list(chat.ends)
    if then == now:
        return
    message = f"prompts are put as {now}, but this model was trained with {then}"
    if not _overrides_chat(config, archive):
        raise ValueError(f"{message}: the chat template of the LLM, or the transformers that reads it, is another")
    logging.warning(f"{message}, since model.chat is overridden: expect other answers")


def _check_weights(shape: ModelShape, frozen: FrozenParts, archive: OpenArchive) -> None:
    """Compare the stored weights with those that the configuration asks for, before anything is built or read.

    Raises:
        ValueError: if they differ.
    """
    stored = archive.file.tensors(WEIGHTS).shapes
    if shape.connector.layers > max(len(stored), _FEW_LAYERS):  # each takes time to build, however small it is
        raise ValueError(f"model.connector.layers is {shape.connector.layers}, more than {archive.path} has")
    expected = part_shapes(stored_parts(frozen.embedded), shape)
    check_shapes(expected, stored, archive.strict, f"what is trained in {archive.path}")
