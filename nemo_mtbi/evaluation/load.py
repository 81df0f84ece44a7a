# SPDX-License-Identifier: Apache-2.0
"""Systems of a configuration: who each is, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.evaluation.hypotheses import read_hypotheses
from nemo_mtbi.evaluation.items import EvalSet
from nemo_mtbi.evaluation.recognizers import find_recognizer, load_recognizer
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.evaluation.systems import CascadeSystem, HypothesesSystem, SpeechSystem, TextSystem, with_limits
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.parallel.device import pick_device
from nemo_mtbi.speech_llm.model import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import find_text_llm, load_text_llm, resolve


@dataclass(frozen=True)
class NemoFacts:
    """Facts of a ``.nemo`` that are known before it is restored.

    Attributes:
        encoder: path of its speech encoder; None if it lies inside.
        llm_trained: whether its LLM itself was trained.
    """

    encoder: Path | None
    llm_trained: bool


@dataclass(frozen=True)
class Backends:
    """What this package does not import: the models stand above it.

    Attributes:
        restore: ``MTBIModel.restore_from``.
        transcribe: ``models.ctc.transcribe_ctc``.
        digest: Hash of a file, ``modules.text_llm.file_digest``.
        inspect: ``models.inspection.inspect_nemo``.
    """

    restore: Callable[..., Any]
    transcribe: Callable[..., list[str]]
    digest: Callable[[Path], str]
    inspect: Callable[[str], NemoFacts]


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
        self._digest = lru_cache(maxsize=None)(lambda path: digest_of_path(Path(path).expanduser(), backends.digest))
        self._facts = lru_cache(maxsize=None)(backends.inspect)
        self._hypotheses = lru_cache(maxsize=None)(read_hypotheses)

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
        if system.hypotheses:
            parts.append(self._digest(system.hypotheses))
        nemo = self._nemo(name, seed)
        return digest_of([*parts, nemo and self._digest(nemo)])

    def check(self, names: Iterable[str], sets: Sequence[EvalSet]) -> None:
        """Find out whether systems can be loaded and asked, before hours of work on others; no weights are loaded.

        Args:
            names: of the systems.
            sets: what they are asked about.

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
                for nemo in (nemo for nemo, found in zip(nemos, facts, strict=True) if found.llm_trained):
                    self._refuse_trained(name, nemo)
            if system.hypotheses:
                self._hypotheses(system.hypotheses, f"{where}.hypotheses").check(sets)
            elif system.kind == "cascade":
                find_recognizer(where, system.asr, facts[0].encoder if facts else None)

    def load(self, name: str, seed: int) -> TextSystem:
        """The system, ready to be asked.

        Raises:
            ValueError: as :meth:`check`, or a part is damaged.
        """
        system = self._config.systems[name]
        nemo = self._nemo(name, seed)
        model = self._restore(nemo) if nemo else None
        responder = model.responder() if system.llm is None else self._text_llm(name, system.llm)
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

    def _refuse_trained(self, name: str, nemo: str | None) -> None:
        raise ValueError(
            f"systems.{name}: the LLM in {nemo} was itself trained, and is not what it was: set "
            f"systems.{name}.llm to the path of the LLM that it was"
        )

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

    def _cascade(self, name: str, responder: Responder, nemo: str | None) -> TextSystem:
        system, where = self._config.systems[name], f"systems.{name}"
        if system.hypotheses:
            return HypothesesSystem(responder, self._hypotheses(system.hypotheses, f"{where}.hypotheses"))
        path = find_recognizer(where, system.asr, self._encoder_of(nemo))
        return CascadeSystem(responder, load_recognizer(where, path, self._device, self._backends.transcribe))

    def _encoder_of(self, nemo: str | None) -> Path | None:
        return self._facts(nemo).encoder if nemo else None


def digest_of_path(path: Path, digest: Callable[[Path], str]) -> str:
    """Hash of a file, or of all files that lie in a directory."""
    if not path.is_dir():
        return digest(path)
    return digest_of([[file.name, digest(file)] for file in sorted(path.iterdir()) if file.is_file()])
