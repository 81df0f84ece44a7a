# SPDX-License-Identifier: Apache-2.0
"""Text LLMs on disk: directories in our format, and in that of Hugging Face.

Ours holds ``llm.yaml`` (architecture and chat format), the weights, and a tokenizer: SentencePiece's
``tokenizer.model`` or the files of Hugging Face. The weights are ``model.safetensors`` under canonical names, the same
for every layer spec, or ``weights/``, a distributed checkpoint of Megatron. A directory of Hugging Face is read as it
is: the architecture from ``config.json``, the chat format from the tokenizer's template.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.chat.hf_tokenizer import FILES as HF_TOKENIZER
from nemo_mtbi.chat.hf_tokenizer import HFTokenizer, has_vocabulary
from nemo_mtbi.chat.template import chat_format, end_of_text
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.io.file_digests import files_digest, sampled
from nemo_mtbi.io.untrusted_yaml import read_yaml
from nemo_mtbi.llm.architecture import DecoderConfig, check_sizes
from nemo_mtbi.llm.convert.hf import (
    CONFIG,
    SINGLE,
    HFWeights,
    architecture_of,
    read_end_tokens,
    read_hf_config,
    weight_files,
)
from nemo_mtbi.llm.convert.megatron import MegatronWeights
from nemo_mtbi.llm.weights import SafetensorsWeights, WeightSource

SETTINGS, WEIGHTS, SENTENCEPIECE = "llm.yaml", "model.safetensors", "tokenizer.model"
MEGATRON = "weights"  # folder of a distributed checkpoint, in the place of WEIGHTS
FORMAT_VERSION = 1  # of llm.yaml
# Other files that belong to an LLM of Hugging Face.
COMPANIONS = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "*.md")
# Files that may lie beside the settings and define the tokenizer; the class of a tokenizer follows from CONFIG.
TOKENIZER_FILES = (*HF_TOKENIZER, CONFIG)
_OTHER_WEIGHTS = ("pytorch_model*.bin", "consolidated*.pth", "*.gguf")


class TextLLMDirectory(ABC):
    """A text LLM on disk; everything is read on first use.

    Args:
        path: of the directory.
    """

    def __init__(self, path: Path):
        self.path = path

    @abstractmethod
    def missing(self) -> list[str]:
        """Return the names of required files that are not there."""

    @cached_property
    @abstractmethod
    def architecture(self) -> DecoderConfig:
        """Architecture of the decoder.

        Raises:
            ValueError: if it can't be read or expressed.
        """

    @abstractmethod
    def chat(self, config: ChatConfig | None = None) -> ChatFormat:
        """Return the chat format, with the tokenizer.

        Args:
            config: the section ``model.chat``; ``None``: the format that belongs to the LLM.

        Raises:
            ValueError: if tokenizer and LLM do not belong together, or the format does not fit.
        """

    @abstractmethod
    def weights(self) -> WeightSource:
        """Return all weights under canonical names.

        Raises:
            ValueError: if they are damaged, or are not those of the architecture.
        """

    @abstractmethod
    def _files(self) -> list[Path]:
        """Return the files that the fingerprint covers, in order."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of settings, weights and tokenizer."""
        return files_digest(self._files())

    def sampled_files(self) -> list[Path]:
        """Return the files of which the fingerprint covers samples only."""
        return sampled(self._files())

    def texts(self, chat: ChatFormat) -> dict[str, bytes]:
        """Return settings and tokenizer, by the names of files in a directory of our format."""
        settings = settings_yaml(self.architecture, chat.turn, chat.end, chat.more, chat.ends).encode()
        return {SETTINGS: settings, **{path.name: path.read_bytes() for path in self._tokenizer_files()}}

    def companions(self) -> list[Path]:
        """Return the other files of an LLM, beside weights, settings and :data:`TOKENIZER_FILES`: generation, licence.

        Small texts, relative to the directory; a copy of the LLM takes them along.
        """
        names = {path.relative_to(self.path) for pattern in COMPANIONS for path in self.path.glob(pattern)}
        names = {name for name in names if str(name) not in (*TOKENIZER_FILES, SETTINGS)}
        names = {name for name in names if not name.name.endswith(".index.json")}
        return sorted(name for name in names if (self.path / name).is_file())

    def _ends(self) -> tuple[int, ...]:
        """Return the ids at which the LLM ends an answer, by the files that came with it."""
        return tuple(value for value in read_end_tokens(self.path) if value < self.architecture.vocab_size)

    def _has_vocabulary(self) -> bool:
        return has_vocabulary([path.name for path in self._tokenizer_files()])

    def _tokenizer_files(self) -> list[Path]:
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the LLM.

        Raises:
            ValueError: if it can't be read, or has more tokens than the LLM.
        """
        tokenizer = self._read_tokenizer()
        if tokenizer.vocab_size > self.architecture.vocab_size:
            raise ValueError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens, but the LLM embeds "
                f"{self.architecture.vocab_size}: they do not belong together"
            )
        return tokenizer

    def _read_tokenizer(self) -> Any:
        return HFTokenizer(self.path)

    def _checked(self, architecture: DecoderConfig) -> DecoderConfig:
        try:
            check_sizes(architecture)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return architecture


def settings_yaml(
    architecture: DecoderConfig,
    turn: tuple[str, ...],
    end: str,
    more: tuple[str, ...] = (),
    ends: tuple[int, ...] = (),
) -> str:
    """Return the content of ``llm.yaml``."""
    optional = {name: list(value) for name, value in (("more", more), ("ends", ends)) if value}
    settings = {
        "format_version": FORMAT_VERSION,
        "architecture": dataclasses.asdict(architecture),
        "chat": {"turn": list(turn), "end": end, **optional},
    }
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class OwnDirectory(TextLLMDirectory):
    """A directory in our format.

    Attributes:
        written_with: the section ``model.chat`` with which its chat format was written, where that is known.
    """

    written_with: ChatConfig | None = None

    def texts(self, chat: ChatFormat) -> dict[str, bytes]:
        """Return settings and tokenizer, unchanged where the chat format is the directory's own."""
        texts = super().texts(chat)
        if chat == self.chat():
            texts[SETTINGS] = (self.path / SETTINGS).read_bytes()  # so that the copy has the same fingerprint
        return texts

    def missing(self) -> list[str]:
        """Return the names of required files that are not there."""
        names = [name for name in (SETTINGS, WEIGHTS) if not (self.path / name).is_file()]
        if (self.path / MEGATRON).is_dir():
            names = [name for name in names if name != WEIGHTS]
        if self._has_vocabulary():
            return names
        has_files = any((self.path / name).is_file() for name in HF_TOKENIZER)
        return [*names, HF_TOKENIZER[0] if has_files else SENTENCEPIECE]

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        file = self.path / SETTINGS
        try:
            content = file.read_bytes()
            settings = read_yaml(content, SETTINGS) if content.strip() else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} can't be read: {error}") from error
        version = settings.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{file} has format_version {version}; this version reads {FORMAT_VERSION}")
        return settings

    @cached_property
    def architecture(self) -> DecoderConfig:
        """Architecture of the decoder, from ``llm.yaml``."""
        try:
            architecture = DecoderConfig(**self._settings["architecture"])
        except (KeyError, TypeError) as error:
            raise self._settings_error(error) from error
        return self._checked(architecture)

    def _settings_error(self, error: Exception) -> ValueError:
        """Return the error for an ``llm.yaml`` with missing or unknown keys."""
        return ValueError(f"{self.path / SETTINGS} lacks a key, or has one too many: {error}")

    def chat(self, config: ChatConfig | None = None) -> ChatFormat:
        """Return the chat format, from ``llm.yaml`` or the tokenizer's template."""
        if config is not None:
            return chat_format(self.tokenizer, config, self._ends())
        try:
            own = self._settings["chat"]
            turn, end, more = tuple(own["turn"]), own["end"], tuple(own.get("more", ()))
            # before they were written down: what the files say
            ends = own["ends"] if "ends" in own else (*self._ends(), *end_of_text(self.tokenizer))
        except (KeyError, TypeError) as error:
            raise self._settings_error(error) from error
        size = self.architecture.vocab_size
        if not isinstance(ends, (list, tuple)) or not all(type(i) is int and 0 <= i < size for i in ends):
            raise ValueError(f"{self.path / SETTINGS}: chat.ends is {ends!r}; it must be a list of ids below {size}")
        return self._with_known_turns(ChatFormat(turn, end, self.tokenizer, more, tuple(ends)))

    def _with_known_turns(self, form: ChatFormat) -> ChatFormat:
        """Return a chat format without further turns that its template can't give; older settings have them."""
        if not form.more or not isinstance(self.tokenizer, HFTokenizer):
            return form
        try:
            fresh = chat_format(self.tokenizer, self.written_with or ChatConfig(), form.ends)
        except ValueError:  # the format was not made from this template
            return form
        same = (fresh.turn, fresh.end) == (form.turn, form.end)
        return dataclasses.replace(form, more=(), single=fresh.single) if same and fresh.single else form

    def _read_tokenizer(self) -> Any:
        if any((self.path / name).is_file() for name in HF_TOKENIZER if name != SENTENCEPIECE):
            return HFTokenizer(self.path)
        from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(str(self.path / SENTENCEPIECE))

    def weights(self) -> WeightSource:
        """Return all weights under canonical names."""
        if (self.path / WEIGHTS).is_file():
            return SafetensorsWeights(self.path / WEIGHTS)
        return MegatronWeights(self.path / MEGATRON, self.architecture.vocab_size)

    def _files(self) -> list[Path]:
        weights = [self.path / WEIGHTS]
        if not weights[0].is_file():
            weights = sorted((self.path / MEGATRON).glob("*.distcp"))
        return [self.path / SETTINGS, *weights, *self._tokenizer_files()]

    def sampled_files(self) -> list[Path]:
        """Return also the metadata of Megatron's checkpoint, which the fingerprint leaves out."""
        metadata = self.path / MEGATRON / ".metadata"
        return super().sampled_files() + ([] if (self.path / WEIGHTS).is_file() else [metadata])


class HFDirectory(TextLLMDirectory):
    """A directory that Hugging Face's ``save_pretrained`` has written, or that was downloaded from the hub."""

    def missing(self) -> list[str]:
        """Return the names of required files that are not there."""
        files = [self.path / CONFIG, *weight_files(self.path)]
        names = [path.name for path in files if not path.is_file()]
        other = sorted(path.name for pattern in _OTHER_WEIGHTS for path in self.path.glob(pattern))
        if other and names == [SINGLE]:
            names = [
                f"{SINGLE} (there is {other[0]}, which is not read: convert it, by save_pretrained of transformers)"
            ]
        return names if self._has_vocabulary() else [*names, HF_TOKENIZER[0]]

    @cached_property
    def architecture(self) -> DecoderConfig:
        """Architecture of the decoder, from ``config.json``."""
        return self._checked(architecture_of(read_hf_config(self.path)))

    def chat(self, config: ChatConfig | None = None) -> ChatFormat:
        """Return the chat format, from the tokenizer's template."""
        try:
            return chat_format(self.tokenizer, config or ChatConfig(), self._ends())
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def weights(self) -> WeightSource:
        """Return all weights under canonical names."""
        return HFWeights(self.path)

    def _files(self) -> list[Path]:
        return [*self._tokenizer_files(), *weight_files(self.path)]


def open_text_llm(path: str | Path) -> TextLLMDirectory:
    """Return the text LLM in a directory; an unrecognized one is an ``OwnDirectory``, whose files are all missing."""
    path = Path(path)
    if (path / CONFIG).is_file() and not (path / SETTINGS).is_file():
        return HFDirectory(path)
    return OwnDirectory(path)
