# SPDX-License-Identifier: Apache-2.0
"""Systems of a configuration: who each is, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nemo_mtbi.data.corpus import digest_of
from nemo_mtbi.data.frames import FrameCounter
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.evaluation.systems import CascadeSystem, SpeechSystem, TextSystem, with_limits
from nemo_mtbi.inference.generate import GenerationConfig
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.inference.transcribe import pick_device
from nemo_mtbi.modules.pretrained import find_text_llm, load_asr_model, load_text_llm, resolve
from nemo_mtbi.modules.speech_encoder import SpeechEncoder
from nemo_mtbi.modules.speech_llm import LayoutDecoder


@dataclass(frozen=True)
class Backends:
    """What this package does not import: the models stand above it.

    Attributes:
        restore: ``MTBIModel.restore_from``.
        transcribe: ``models.ctc.transcribe_ctc``.
        digest: Hash of a file, ``modules.text_llm.file_digest``.
    """

    restore: Callable[..., Any]
    transcribe: Callable[..., list[str]]
    digest: Callable[[Path], str]


class Loader:
    """Knows the systems of a configuration; keeps the last ``.nemo`` that it has restored.

    Args:
        config: What was asked for.
        backends: See :class:`Backends`.
    """

    def __init__(self, config: EvalConfig, backends: Backends):
        self._config, self._backends = config, backends
        self._device = pick_device(config.cuda)
        self._restored: tuple[str, Any] | None = None
        self._llm = lru_cache(maxsize=None)(find_text_llm)
        self._digest = lru_cache(maxsize=None)(lambda path: backends.digest(Path(path).expanduser()))

    def seeds(self, name: str) -> int:
        """How many seeds a system has."""
        return self._config.seeds(name)

    def identity(self, name: str, seed: int) -> str:
        """Hash of all that decides the answers of a system."""
        system = self._config.systems[name]
        parts: list[Any] = [system.kind, self._config.max_new_tokens, *(["adapted"] if system.adapted else [])]
        if system.llm:
            parts.append(self._llm(system.llm, f"systems.{name}.llm").fingerprint)
            parts += [asdict(system.chat)] if system.chat else []
            parts += [system.frozen_dtype] if system.frozen_dtype != "float32" else []
        if system.asr:
            parts.append(self._digest(str(resolve(system.asr, f"systems.{name}.asr", "encoder.nemo"))))
        nemo = self._nemo(name, seed)
        return digest_of([*parts, nemo and self._digest(nemo)])

    def load(self, name: str, seed: int) -> TextSystem:
        """The system, ready to be asked.

        Raises:
            ValueError: a part is missing, damaged or of the wrong kind, or an LLM that was trained stands for what it
                was before.
        """
        system = self._config.systems[name]
        nemo = self._nemo(name, seed)
        model = self._restore(nemo) if nemo else None
        responder = model.responder() if system.llm is None else self._text_llm(name, system.llm)
        responder = with_limits(responder, self._config.max_new_tokens, self._config.batch_tokens)
        responder = replace(responder, adapted=system.adapted or system.kind == "speech")
        if not responder.adapted and not responder.model.decoder.is_original:
            raise ValueError(
                f"systems.{name}: the LLM in {nemo} was itself trained, and is not what it was: set "
                f"systems.{name}.llm to the path of the LLM that it was"
            )
        if system.kind == "text":
            return TextSystem(responder)
        return SpeechSystem(responder) if system.kind == "speech" else self._cascade(name, responder, model)

    def _nemo(self, name: str, seed: int) -> str | None:
        return next(iter(self._config.models(name)[seed:]), None)

    def _restore(self, path: str) -> Any:
        if self._restored is None or self._restored[0] != path:
            self._restored = None  # before the next one takes memory
            self._restored = path, self._backends.restore(path, map_location=self._device).eval()
        return self._restored[1]

    def _text_llm(self, name: str, llm: str) -> Responder:
        system = self._config.systems[name]
        directory, dtype = self._llm(llm, f"systems.{name}.llm"), getattr(torch, system.frozen_dtype)
        found = load_text_llm(directory, dtype, chat=system.chat)
        for chunk in found.chunks:
            chunk.to(self._device)
        limits = {"max_new_tokens": self._config.max_new_tokens, "batch_tokens": self._config.batch_tokens}
        given = GenerationConfig(**{key: value for key, value in limits.items() if value is not None})
        return Responder(LayoutDecoder(found.chunks), found.chat, given)

    def _cascade(self, name: str, responder: Responder, model: Any) -> CascadeSystem:
        asr = self._config.systems[name].asr
        try:
            ctc = load_asr_model(asr or model.config.pretrained_asr).to(self._device)
        except ValueError as error:
            raise ValueError(f"systems.{name}: {error}; set systems.{name}.asr to the encoder's NeMo file") from error
        if not hasattr(getattr(ctc, "decoding", None), "ctc_decoder_predictions_tensor"):
            raise ValueError(f"systems.{name}: {type(ctc).__name__} is no CTC model: set systems.{name}.asr to one")
        shape = SpeechEncoder(ctc).shape
        return CascadeSystem(responder, ctc, FrameCounter(shape.stages, shape.sample_rate), self._backends.transcribe)
