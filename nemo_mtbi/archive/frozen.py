# SPDX-License-Identifier: Apache-2.0
"""The frozen parts of a model: on disk, where the configuration says, or inside the ``.nemo`` that is restored."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_mtbi.archive import restored
from nemo_mtbi.archive.embedded import (
    LLM_SETTINGS,
    LLM_WEIGHTS,
    TOKENIZERS,
    check_architecture,
    read_encoder,
)
from nemo_mtbi.archive.large_files import check_files, hash_together
from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.encoder import EncoderSection
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.config.schema import read_section
from nemo_mtbi.encoders.base import EncoderShape, trained_shapes
from nemo_mtbi.encoders.paired import AnyEncoder
from nemo_mtbi.encoders.registry import kind_of
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.nemo_tar import WEIGHTS, NemoFile, read_yaml
from nemo_mtbi.io.tensor_file import misfits
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.directory import WEIGHTS as LLM_FILE
from nemo_mtbi.llm.directory import sampled
from nemo_mtbi.llm.full_finetune import trained_names
from nemo_mtbi.llm.layers import HAVE_TE
from nemo_mtbi.llm.lora import adapter_shapes
from nemo_mtbi.llm.weights import load_weights
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.connector import build_connector
from nemo_mtbi.speech_llm.model import SpeechLLM
from nemo_mtbi.speech_llm.pretrained import TextLLM, find_text_llm, load_speech_encoder, load_text_llm, resolve

# Prefixes of the weights that are trained and saved.
TRAINED, ADAPTERS, ENCODER = "speech_llm.connector.", "speech_llm.adapters.", "speech_llm.encoder."
LLM = "speech_llm.llm."  # weights of the LLM that train; a full .nemo has them among those of its LLM
INSIDE = {"asr": "nemo:encoder", "llm": "nemo:llm"}  # references to parts of the archive itself
DEMO_NAMES = {"asr": "encoder.nemo", "llm": "llm"}
_BESIDE = "{'encoder': {'beside': {'path': its path}}}"
_FEW_LAYERS = 64  # of a connector, which are built before they are compared
_TEXT_LIMIT = 2**26  # bytes; the largest tokenizers have 20 MB


class FrozenParts:
    """Encoder and LLM of a model, found and compared with what the model was trained with, and not yet loaded.

    Attributes:
        fingerprints: hash of each part.
        file_digests: SHA-256 of each file of a part of which the fingerprint covers samples only.
        embedded: parts that come from inside a ``.nemo``, and have no place of their own on this machine.
        texts: settings and tokenizer of the LLM, by their names in an archive; there after :meth:`load`.

    Raises:
        ValueError: if a part is not where the configuration says, or not the one that the model was trained with.
    """

    def __init__(self, config: ModelConfig):
        self._config, self._restored = config, restored.current()
        self.embedded = {part for part, inside in INSIDE.items() if self._reference(part) == inside}
        self._paths = {part: self._locate(part) for part in INSIDE if part not in self.embedded}
        self._encoder = self._located_encoder()
        self._check_full()
        self._llm = None if "llm" in self.embedded else find_text_llm(self._paths["llm"])
        self.fingerprints = {part: self._fingerprint(part) for part in INSIDE}
        large = self._sampled_files()
        self.file_digests = hash_together(large)
        check_files(large, self.file_digests, config.file_digests)
        self.texts: dict[str, bytes] = {}

    @property
    def paths(self) -> dict[str, list[Path]]:
        """Files and folders that a small ``.nemo`` refers to, by the keys of the configuration."""
        found = {f"pretrained_{part}": [Path(path)] for part, path in self._paths.items()}
        beside = getattr(self._encoder, "beside", None)
        return found | {"encoder.beside.path": [Path(beside.path)] if beside else []}

    def path(self, part: str) -> Path | None:
        """Where a part was found; ``None`` if it is inside the archive."""
        return self._paths.get(part)

    def _located_encoder(self) -> EncoderSection | None:
        """How the encoder is used; a second one with the path at which it was found."""
        config = self._config.encoder
        if config is None or config.beside is None:
            return config
        path = self._find(config.beside.path, "model.encoder.beside.path", DEMO_NAMES["asr"], _BESIDE)
        return replace(config, beside=replace(config.beside, path=str(path)))

    def _check_full(self) -> None:
        """Refuses encoders that a full ``.nemo`` can't hold."""
        if self._config.nemo_content != "full" and not self.embedded:
            return
        encoder = self._paths.get("asr")
        foreign = f"{encoder} is of another kind" if encoder is not None and not kind_of(encoder).embeds else None
        foreign = "model.encoder.beside is a second one" if self._encoder and self._encoder.beside else foreign
        if foreign:
            raise ValueError(
                f"a full .nemo holds one encoder of NeMo, and {foreign}: set model.nemo_content=small, and restore "
                "what came out of a full one with pretrained_llm too"
            )

    def load(self) -> tuple[SpeechLLM, TextLLM]:
        """Joins the frozen parts and a new connector: this process's share of them under the layout in force.

        Raises:
            ValueError: if a part is damaged, or the connector is not the one of the archive that is restored; the same
                in all processes of a model replica.
        """
        config, dtype = self._config, getattr(torch, self._config.frozen_dtype)
        if config.llm_was_trained and "llm" not in self.embedded:
            raise ValueError(
                f"model.pretrained_llm={self._reference('llm')} is not the LLM of this .nemo, which was itself "
                "trained and is inside: leave pretrained_llm out"
            )
        text = self._load_llm(dtype)
        for chunk in text.chunks:
            chunk.was_trained = config.llm_was_trained
        self.texts = {f"llm/{name}": content for name, content in text.texts.items()}
        self._check_chat(text.chat)
        encoder, failure, cause = None, None, None
        if groups.is_first_stage():
            try:
                encoder = self._load_encoder(dtype)
            except (ValueError, RuntimeError, OSError) as error:  # the other stages wait for what comes next
                cause = error
                failure = restored.refusal(self._restored.file.path, error) if "asr" in self.embedded else str(error)
        facts = (encoder.shape, trained_shapes(encoder)) if encoder else None
        facts, first_failure = groups.broadcast_object((facts, failure))
        if failure or first_failure:
            raise ValueError(failure or first_failure) from cause
        shape, heard = facts
        self._check_trained(shape, heard, text.decoder.architecture)
        self._restored = None  # its file will be closed
        return SpeechLLM(encoder, config.connector, text.chunks, shape, config.lora, config.llm), text

    def _reference(self, part: str) -> str:
        return str(getattr(self._config, f"pretrained_{part}"))

    def _archive(self, part: str) -> NemoFile:
        """The archive that holds a part."""
        if self._restored is None or self._restored.stored[f"pretrained_{part}"] != INSIDE[part]:
            raise ValueError(
                f"model.pretrained_{part}={INSIDE[part]} means a part inside a .nemo that is restored, but there is "
                "none: give a path"
            )
        return self._restored.file

    def _locate(self, part: str) -> Path:
        """Path of a part."""
        key = f"model.pretrained_{part}"
        return self._find(self._reference(part), key, DEMO_NAMES[part], f"{{'pretrained_{part}': its path}}")

    def _find(self, reference: str, key: str, demo: str, override: str) -> Path:
        """A path. What is not where it was trained may lie beside the archive."""
        if self._restored is not None and not Path(reference).expanduser().exists():
            beside = self._restored.file.path.parent / reference
            reference = str(beside) if beside.exists() else reference
        try:
            path = resolve(reference, key, demo)
        except ValueError as error:
            if self._restored is None:
                raise
            raise ValueError(f"{error}. If it has moved, restore with override_config_path={override}") from error
        llm = demo == DEMO_NAMES["llm"]
        if not (path.is_dir() if llm else kind_of(path).recognizes(path)):
            raise ValueError(f"{key}={reference}: {path} must be a {'directory' if llm else 'file'}")
        return path

    def _fingerprint(self, part: str) -> str:
        """The hash of a part, compared with that of the part trained with."""
        wanted = self._config.fingerprints.get(part)
        if part in self.embedded:
            self._archive(part)
            return wanted
        path = self._paths[part]
        try:
            found = self._digest_of_encoders(path) if part == "asr" else self._llm.fingerprint
        except OSError as error:
            raise ValueError(f"model.pretrained_{part}={path} can't be read: {error}") from error
        if wanted not in (None, found):
            reference = self._reference(part)
            then = self._restored.stored[f"pretrained_{part}"] if self._restored else reference
            raise ValueError(
                f"model.pretrained_{part} is {reference} with hash {found}, but this model was trained with {wanted}"
                f"{'' if then == reference else f' ({then})'}: give the path of that one"
            )
        return found

    def _digest_of_encoders(self, path: Path) -> str:
        found = kind_of(path).fingerprint(path)
        if self._encoder is None or self._encoder.beside is None:
            return found
        beside = Path(self._encoder.beside.path)
        return f"sha256:{digest_of([found, kind_of(beside).fingerprint(beside)])}"

    def _sampled_files(self) -> dict[str, list[Path]]:
        """Files of each part of which the fingerprint covers samples only."""
        beside = self._encoder.beside if self._encoder else None
        encoders = [self._paths.get("asr"), Path(beside.path) if beside else None]
        files = [path for folder in encoders if folder and folder.is_dir() for path in kind_of(folder).files(folder)]
        return {"asr": sampled(files), "llm": self._llm.sampled_files() if self._llm else []}

    def _load_llm(self, dtype: torch.dtype) -> TextLLM:
        chat = self._config.chat
        if self._llm is not None:
            return load_text_llm(self._llm, dtype, chat=chat, **self._layers)
        file, tensors = self._archive("llm"), self._archive("llm").tensors(LLM_WEIGHTS)
        texts = {name: file.read(name, _TEXT_LIMIT) for name in (LLM_SETTINGS, *TOKENIZERS) if name in file}
        check_architecture(texts[LLM_SETTINGS], tensors)
        with tempfile.TemporaryDirectory() as folder:  # tokenizers want a path
            for name, content in texts.items():
                (Path(folder) / Path(name).name).write_bytes(content)
            (Path(folder) / LLM_FILE).touch()  # the weights are read from the archive
            found = find_text_llm(folder)
            found.written_with = chat  # unless another is asked for
            chat = chat if self._asks_for_another_chat() else None
            text = load_text_llm(found, dtype, weights=False, chat=chat, **self._layers)
        restored.read_checked(lambda: load_weights(text.chunks, tensors), file.path)
        text.fingerprint = self.fingerprints["llm"]
        return text

    @property
    def _layers(self) -> dict[str, Any]:
        """How the LLM's layers are built. Adapters stand behind norms, which Transformer Engine's layers fuse."""
        return {"transformer_engine": HAVE_TE and self._config.lora is None, **self._config.megatron}

    def _asks_for_another_chat(self) -> bool:
        """Whether the archive that is restored was trained with another ``model.chat``."""
        stored = OmegaConf.create(self._restored.stored.get("chat") or {})
        return self._config.chat != (read_section(ChatConfig, stored, "model.chat") if stored else None)

    def _check_chat(self, chat: ChatFormat) -> None:
        """Compares the prompts with those that the archive was trained with."""
        if self._restored is None or LLM_SETTINGS not in self._restored.file:
            return
        then = read_yaml(self._restored.file.read(LLM_SETTINGS, _TEXT_LIMIT), LLM_SETTINGS).get("chat")
        now = {"turn": list(chat.turn), "end": chat.end}
        if isinstance(then, dict) and "more" in then:  # an archive of before knows single turns
            now["more"] = list(chat.more)
            if chat.single:  # once its template was thought to split into turns: single turns are what they were
                now["more"] = then["more"]
        if "ends" in (then or {}):  # likewise, one end token
            now["ends"] = list(chat.ends)
        if then == now:
            return
        message = f"prompts are put as {now}, but this model was trained with {then}"
        if not self._asks_for_another_chat():
            raise ValueError(f"{message}: the chat template of the LLM, or the transformers that reads it, is another")
        logging.warning(f"{message}, since model.chat is overridden: expect other answers")

    def _load_encoder(self, dtype: torch.dtype) -> AnyEncoder:
        if "asr" not in self.embedded:
            return load_speech_encoder(self._paths["asr"], dtype, self._encoder)
        return read_encoder(self._archive("asr"), dtype, self._config.encoder)

    def _check_trained(
        self, shape: EncoderShape, heard: Mapping[str, tuple[int, ...]], architecture: DecoderConfig
    ) -> None:
        """Compares the stored weights with those that the configuration asks for, before anything is built or read."""
        if self._restored is None:
            return
        found = self._restored.file.tensors(WEIGHTS).shapes
        if self._config.connector.layers > max(
            len(found), _FEW_LAYERS
        ):  # each takes time to build, however small it is
            raise ValueError(
                f"model.connector.layers is {self._config.connector.layers}, more than {self._restored.file.path} has"
            )
        try:
            with torch.device("meta"):
                connector = build_connector(
                    self._config.connector, shape.size, architecture.hidden_size, shape.frame_rate
                )
        except (
            RuntimeError,
            TypeError,
            ZeroDivisionError,
            OverflowError,
        ) as error:  # more numbers than can be counted
            raise ValueError(f"model.connector can't be built: {error}") from error
        expected = {TRAINED + name: tuple(value.shape) for name, value in connector.state_dict().items()}
        expected |= {ENCODER + name: size for name, size in heard.items()}
        expected |= llm_shapes(architecture, self._config, inside="llm" in self.embedded)
        check_trained(expected, found, self._restored.strict, f"what is trained in {self._restored.file.path}")


def llm_shapes(architecture: DecoderConfig, config: ModelConfig, inside: bool) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of what is stored of the LLM: adapters, or weights that train.

    Args:
        architecture: of the LLM.
        config: of the model.
        inside: whether the whole LLM is in the archive, with what it has learned.
    """
    shapes = adapter_shapes(architecture, config.lora) if config.lora else {}
    found = {ADAPTERS + name: shape for name, shape in shapes.items()}
    if inside:
        return found
    whole = weight_shapes(architecture)
    return found | {LLM + name: whole[name] for name in sorted(trained_names(architecture, config.llm))}


def check_trained(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], strict: bool, what: str
) -> None:
    """Compares the shapes of stored weights with those of the model.

    Args:
        expected: of connector, adapters and what trains of encoder and LLM.
        found: of the stored weights.
        strict: whether names must be the same too.
        what: what holds them, for the message.

    Raises:
        ValueError: names what differs.
    """
    if not strict:
        common = expected.keys() & found.keys()
        expected, found = ({name: shapes[name] for name in common} for shapes in (expected, found))
    wrong = misfits(expected, found)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        keys = {ADAPTERS: "model.lora", ENCODER: "model.encoder.freeze", LLM: "model.llm.freeze"}
        blamed = {next((key for part, key in keys.items() if part in name), "model.connector") for name in wrong}
        key = blamed.pop() if len(blamed) == 1 else "model.connector"
        raise ValueError(
            f"{what} does not fit {key}; missing or unknown: {'; '.join(wrong[:5])}{more}. Give the {key} that it was "
            "trained with"
        )
