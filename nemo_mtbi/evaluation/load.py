# SPDX-License-Identifier: Apache-2.0
"""Systems of a configuration: their identity, checks before the work, and loading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.evaluation.hypotheses import read_hypotheses
from nemo_mtbi.evaluation.inspection import NemoFacts, inspect_nemo
from nemo_mtbi.evaluation.items import EvalSet
from nemo_mtbi.evaluation.recognizers import find_recognizer, load_recognizer
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.evaluation.systems import CascadeSystem, HypothesesSystem, SpeechSystem, TextSystem, with_limits
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.file_digests import file_digest
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel.device import pick_device
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import find_text_llm, load_text_llm, resolve


class Loader:
    """Identifies, checks and loads the systems of a configuration; keeps the last ``.nemo`` that it has restored.

    Args:
        config: The checked configuration.
    """

    def __init__(self, config: EvalConfig):
        self._config = config
        self._device = pick_device(config.cuda)
        self._restored: tuple[str, MTBIModel] | None = None
        self._llm = lru_cache(maxsize=None)(find_text_llm)
        self._digest = lru_cache(maxsize=None)(lambda path: digest_of_path(Path(path).expanduser()))
        self._facts = lru_cache(maxsize=None)(inspect_nemo)
        self._hypotheses = lru_cache(maxsize=None)(read_hypotheses)

    def seeds(self, name: str) -> int:
        """Return the number of seeds of a system."""
        return self._config.seeds(name)

    def identity(self, name: str, seed: int) -> str:
        """Return a hash of everything that decides the answers of a system."""
        system = self._config.systems[name]
        parts: list[Any] = [system.kind, self._config.max_new_tokens, *(["adapted"] if system.adapted else [])]
        if system.llm:
            parts.append(self._llm(system.llm, f"systems.{name}.llm").fingerprint)
            parts += [asdict(system.chat)] if system.chat else []
            parts += [system.frozen_dtype] if system.frozen_dtype != "float32" else []
        if system.asr:
            parts.append(self._digest(str(resolve(system.asr, f"systems.{name}.asr", "encoder.nemo"))))
        if system.hypotheses:
            parts.append(self._digest(system.hypotheses))
        nemo = self._nemo(name, seed)
        return digest_of([*parts, nemo and self._digest(nemo)])

    def check(self, names: Iterable[str], sets: Sequence[EvalSet]) -> None:
        """Raise ValueError unless systems can be loaded and can answer; no weights are loaded.

        Args:
            names: Of the systems.
            sets: The sets that they answer.

        Raises:
            ValueError: a part is missing, of the wrong kind or another one than was trained with, a cascade can't
                transcribe, or an LLM that was trained stands for what it was before.
        """
        for name in names:
            system, where = self._config.systems[name], f"systems.{name}"
            nemos = [nemo for seed in range(self.seeds(name)) if (nemo := self._nemo(name, seed))]
            facts = [self._known(name, nemo) for nemo in nemos]
            if system.llm:
                self._llm(system.llm, f"{where}.llm").chat(system.chat)
            elif system.kind != "speech" and not system.adapted:
                for nemo in (nemo for nemo, fact in zip(nemos, facts, strict=True) if fact.llm_trained):
                    self._refuse_trained(name, nemo)
            if system.hypotheses:
                self._hypotheses(system.hypotheses, f"{where}.hypotheses").check(sets)
            elif system.kind == "cascade":
                find_recognizer(where, system.asr, facts[0].encoder if facts else None)

    def load(self, name: str, seed: int) -> TextSystem:
        """Return the system with its weights.

        Raises:
            ValueError: as :meth:`check`, or a part is damaged.
        """
        system = self._config.systems[name]
        nemo = self._nemo(name, seed)
        if system.llm is not None:
            responder = self._text_llm(name, system.llm)
        elif nemo is not None:
            responder = self._restore(nemo).responder()
        else:
            raise ValueError(f"systems.{name}: set nemo, of or llm, so that there is an LLM to answer")
        responder = with_limits(responder, self._config.max_new_tokens, self._config.batch_tokens)
        responder = replace(responder, adapted=system.adapted or system.kind == "speech")
        if not responder.adapted and not responder.model.llm_state.has_original_weights:
            self._refuse_trained(name, nemo)
        if system.kind == "text":
            return TextSystem(responder)
        return SpeechSystem(responder) if system.kind == "speech" else self._cascade(name, responder, nemo)

    def _known(self, name: str, nemo: str) -> NemoFacts:
        try:
            return self._facts(nemo)
        except ValueError as error:
            owner = name if self._config.systems[name].kind == "speech" else self._config.systems[name].of
            raise ValueError(
                f"systems.{owner}.nemo: {error}. A speech system is a model of ours; a NeMo ASR model belongs to a "
                f"cascade, by its key asr"
            ) from error

    def _refuse_trained(self, name: str, nemo: str | None) -> NoReturn:
        raise ValueError(
            f"systems.{name}: the LLM in {nemo} was itself trained, and is not what it was: set "
            f"systems.{name}.llm to the path of the LLM that it was"
        )

    def _nemo(self, name: str, seed: int) -> str | None:
        return next(iter(self._config.models(name)[seed:]), None)

    def _restore(self, path: str) -> MTBIModel:
        if self._restored is None or self._restored[0] != path:
            self._restored = None  # before the next one takes memory
            self._restored = path, MTBIModel.restore_from(path, map_location=self._device).eval()
        return self._restored[1]

    def _text_llm(self, name: str, llm: str) -> Responder:
        system = self._config.systems[name]
        directory, dtype = self._llm(llm, f"systems.{name}.llm"), getattr(torch, system.frozen_dtype)
        text_llm = load_text_llm(directory, dtype, chat=system.chat)
        for chunk in text_llm.chunks:
            chunk.to(self._device)
        limits = {"max_new_tokens": self._config.max_new_tokens, "batch_tokens": self._config.batch_tokens}
        given = GenerationConfig(**{key: value for key, value in limits.items() if value is not None})
        return Responder(LayoutDecoder(text_llm.chunks), text_llm.chat, given)

    def _cascade(self, name: str, responder: Responder, nemo: str | None) -> TextSystem:
        system, where = self._config.systems[name], f"systems.{name}"
        if system.hypotheses:
            return HypothesesSystem(responder, self._hypotheses(system.hypotheses, f"{where}.hypotheses"))
        path = find_recognizer(where, system.asr, self._encoder_of(nemo))
        return CascadeSystem(responder, load_recognizer(where, path, self._device))

    def _encoder_of(self, nemo: str | None) -> Path | None:
        return self._facts(nemo).encoder if nemo else None


def digest_of_path(path: Path) -> str:
    """Return a hash of a file, or of all files that lie in a directory."""
    if not path.is_dir():
        return file_digest(path)
    return digest_of([[file.name, file_digest(file)] for file in sorted(path.iterdir()) if file.is_file()])
