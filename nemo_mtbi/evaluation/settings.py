# SPDX-License-Identifier: Apache-2.0
"""The schema of ``conf/mtbi_eval.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING

from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.checks import Count, FrozenDtype, OneOf, Section, at_least
from nemo_mtbi.config.schema import read_section
from nemo_mtbi.evaluation.formats import FORMATS
from nemo_mtbi.evaluation.items import EvalSet, check_references, from_cuts
from nemo_mtbi.io.sources import SourcePolicy
from nemo_mtbi.targets.tasks import TaskPool


@dataclass
class SystemConfig(Section):
    """One row of the tables.

    Attributes:
        kind: ``speech``: an MTBI model. ``cascade``: transcripts of a recognizer, then the LLM on them. ``text``: the
            LLM on reference transcripts.
        nemo: ``.nemo`` of the model, or a list: one for each seed. For ``speech``.
        of: for ``cascade`` and ``text``: the speech system whose encoder and LLM are used.
        llm: for ``cascade`` and ``text``: a text LLM directory or ``demo``, in place of that of ``of``.
        chat: chat format of ``llm`` (``model.chat`` in training); ``null``: that of its directory.
        frozen_dtype: of the weights of ``llm``: ``float32`` or ``bfloat16``.
        asr: for ``cascade``: a NeMo ``.nemo`` with CTC, a Hugging Face directory of Whisper with its
            decoder, or ``demo``, in place of the encoder of ``of``.
        hypotheses: for ``cascade``: a JSONL of transcripts made elsewhere, in place of a recognizer
            (:func:`nemo_mtbi.evaluation.hypotheses.read_hypotheses`).
        adapted: for ``text``: whether the adapters of the model ``of`` are on, as they are for its speech; without
            them the LLM is what it was before training, unless it was trained itself.
        against: text system that behavior is measured against; ``null``: that ``of`` this system, or the first.
        hours: hours of speech that it was trained on, for the plot of behavior gap against hours.
        line: systems with the same value are one line of that plot.
        logs: folders with TensorBoard logs of its training, for learning curves.
    """

    kind: Annotated[str, OneOf("speech", "cascade", "text")] = "speech"
    nemo: Any = None
    of: str | None = None
    llm: str | None = None
    chat: ChatConfig | None = None
    frozen_dtype: FrozenDtype = "float32"
    asr: str | None = None
    hypotheses: str | None = None
    adapted: bool = False
    against: str | None = None
    hours: float | None = None
    line: str | None = None
    logs: list[str] = field(default_factory=list)

    @property
    def nemos(self) -> list[str]:
        """The ``.nemo`` files, one for each seed."""
        return [] if self.nemo is None else [self.nemo] if isinstance(self.nemo, str) else list(self.nemo)


@dataclass
class SetConfig(Section):
    """One set of questions: ``cuts`` under a task pool, or the file of a public benchmark.

    Attributes:
        cuts: Lhotse cut manifest; references come from its custom field ``references``.
        tasks: task pool YAML, or ``demo``.
        only: names of tasks; ``null``: all of the pool.
        wordings: how many wordings of each task; ``null``: all.
        seed: of the draw of wordings.
        limit: only the first cuts by id.
        format: ``llaso_eval``, ``speech_ifeval`` or ``voicebench``.
        path: JSON or JSONL of that benchmark.
        audio_dir: folder of its audio; ``null``: the folder of ``path``.
        part: VoiceBench's subset, or a name for LLaSO-Eval's task; ``null``: by the name of the file.
        metric: what LLaSO-Eval's file is scored by; ``null``: by its name.
    """

    cuts: str | None = None
    tasks: str = "demo"
    only: list[str] | None = None
    wordings: Count | None = 2
    seed: int = 0
    limit: int | None = None
    format: Annotated[str | None, OneOf(*FORMATS)] = None
    path: str | None = None
    audio_dir: str | None = None
    part: str | None = None
    metric: str | None = None


@dataclass
class EvalConfig(Section):
    """The configuration of an evaluation: all keys of ``conf/mtbi_eval.yaml``.

    Attributes:
        output_dir: folder of answers and results; a run that was killed goes on in it.
        title: of the report.
        systems: rows of the tables, by name.
        sets: sets of questions, by name.
        compare_with: system that all others are compared with; ``null``: the first speech system.
        compare: further pairs, each a system and the one that is subtracted from it.
        batch_size: utterances that are loaded and encoded at once.
        batch_tokens: rows x positions that the LLM takes at once; ``null``: that of the model.
        max_new_tokens: longest answer in tokens; ``null``: that of the model.
        cache_gib: memory for encoded utterances, which are then not encoded again for each task.
        kl_utterances: utterances of each set, by id, that the KL divergence from the text is measured on: two forward
            passes for each answer. ``null``: all; 0: none.
        on_bad_audio: ``raise``, or ``abstain``: an empty answer, which is counted and scores nothing. Entries of a
            manifest with values of a wrong type are then left out, and counted.
        allow_remote, allow_commands: what cuts may be read from beside files
            (:class:`~nemo_mtbi.io.sources.SourcePolicy`).
        resamples: of bootstrap and permutation tests.
        seed: of their draws.
        examples: answers side by side in the report, for each set.
        tensor_model_parallel_size, pipeline_model_parallel_size: processes that share each model.
        overwrite: replace answers of other systems or to other questions in the folder.
        cuda: index of the device; ``null``: a GPU if there is one; negative: CPU.
    """

    output_dir: str = MISSING
    title: str = "What speech LLMs do with speech"
    systems: dict[str, SystemConfig] = MISSING
    sets: dict[str, SetConfig] = MISSING
    compare_with: str | None = None
    compare: list[list[str]] = field(default_factory=list)
    batch_size: Count = 32
    batch_tokens: Count | None = None
    max_new_tokens: Count | None = None
    cache_gib: float = 2.0
    kl_utterances: Annotated[int | None, at_least(0)] = None
    on_bad_audio: Annotated[str, OneOf("raise", "abstain")] = "raise"
    allow_remote: bool = False
    allow_commands: bool = False
    resamples: Count = 2000
    seed: int = 0
    examples: int = 6
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    overwrite: bool = False
    cuda: int | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs that are compared: each a system and the one that is subtracted from it."""
        first = [(name, self.compare_with) for name in self.systems if self.compare_with not in (None, name)]
        return list(dict.fromkeys([*first, *((system, other) for system, other in self.compare)]))

    def models(self, name: str) -> list[str]:
        """Return the ``.nemo`` files that a system answers with, one for each seed; empty if it needs none."""
        system = self.systems[name]
        if system.kind == "speech":
            return system.nemos
        nemos = self.systems[system.of].nemos if system.of else []
        return nemos if system.adapted else nemos[:1]  # without adapters the LLM is the same for all of them

    def seeds(self, name: str) -> int:
        """Return the number of seeds of a system."""
        return max(1, len(self.models(name)))

    def text_of(self, name: str) -> str | None:
        """Return the text system that a system's behavior is measured against; None for text systems."""
        system = self.systems[name]
        # the LLM with adapters is not the behavior to imitate: the training on speech has changed it
        texts = [other for other, of_other in self.systems.items() if of_other.kind == "text" and not of_other.adapted]
        if system.kind == "text" or not texts:
            return None
        owner = system.of or name
        return system.against or next((t for t in texts if self.systems[t].of == owner), texts[0])


def parse_eval_config(cfg: Mapping) -> EvalConfig:
    """Return a checked configuration, whose files exist.

    Raises:
        ValueError: a key is unknown, missing or contradictory, or a file does not exist; names the remedy.
    """
    config = read_section(EvalConfig, cfg)
    if not config.systems or not config.sets:
        raise ValueError("systems and sets must each name at least one: see conf/mtbi_eval.yaml")
    for name, system in config.systems.items():
        _check_system(config, name, system)
    if config.compare_with is None:
        speech = [name for name, system in config.systems.items() if system.kind == "speech"]
        config.compare_with = speech[0] if speech else None
    elif config.compare_with not in config.systems:
        raise ValueError(f"compare_with={config.compare_with} is not a system: use one of {', '.join(config.systems)}")
    for pair in config.compare:
        if len(pair) != 2 or len(set(pair)) != 2 or not set(pair) <= set(config.systems):
            raise ValueError(f"compare holds {list(pair)}; each pair must name two of {', '.join(config.systems)}")
    return config


def _check_system(config: EvalConfig, name: str, system: SystemConfig) -> None:
    where, known = f"systems.{name}", ", ".join(config.systems)
    if not all(isinstance(path, str) for path in system.nemos):
        raise ValueError(f"{where}.nemo must be a path or a list of paths, got {system.nemo!r}")
    for path in system.nemos:
        if not Path(path).expanduser().is_file():
            raise ValueError(f"{where}.nemo={path} does not exist: train it first, or remove the system")
    for key in ("of", "against"):
        other = getattr(system, key)
        wanted = "speech" if key == "of" else "text"
        if other is not None and (other not in config.systems or config.systems[other].kind != wanted):
            raise ValueError(f"{where}.{key}={other} is not a system of kind {wanted}; the systems are: {known}")
    _check_llm(where, system)
    if system.kind == "speech":
        if not system.nemos or system.of or system.llm or system.asr or system.hypotheses:
            raise ValueError(f"{where}: a speech system needs nemo, and neither of, llm, asr nor hypotheses")
        return
    if system.nemos:
        raise ValueError(f"{where}.nemo belongs to a speech system: name that with of, or give llm")
    _check_recognizer(where, system)
    needed = (system.llm,) if system.kind == "text" else (system.llm, system.asr or system.hypotheses)
    if not system.of and not all(needed):
        raise ValueError(f"{where}: set of to a speech system, or {'llm' if system.kind == 'text' else 'llm and asr'}")


def _check_recognizer(where: str, system: SystemConfig) -> None:
    for key in ("asr", "hypotheses"):
        if system.kind != "cascade" and getattr(system, key):
            raise ValueError(f"{where}.{key} belongs to a cascade: set kind to cascade, or leave it out")
    if system.asr and system.hypotheses:
        raise ValueError(f"{where}: asr transcribes here, hypotheses were made elsewhere: set one of them")
    if system.hypotheses and not Path(system.hypotheses).expanduser().is_file():
        raise ValueError(f"{where}.hypotheses={system.hypotheses} does not exist: give a JSONL with id and text")


def _check_llm(where: str, system: SystemConfig) -> None:
    if system.chat and not system.llm:
        raise ValueError(f"{where}.chat is the chat format of an llm of its own: set llm too, or leave it out")
    if system.adapted and (system.kind != "text" or not system.of or system.llm):
        raise ValueError(
            f"{where}.adapted is for the text system of a speech system: set kind to text and of, not llm"
        )


def read_sets(config: EvalConfig) -> list[EvalSet]:
    """Read the sets of a configuration and check their references.

    Raises:
        ValueError: a set names both or neither of ``cuts`` and ``format``, or its files are missing or malformed.
    """
    policy = SourcePolicy(config.allow_remote, config.allow_commands)
    leave_out = config.on_bad_audio == "abstain"
    return [_read_set(name, settings, policy, leave_out) for name, settings in config.sets.items()]


def _read_set(name: str, settings: SetConfig, policy: SourcePolicy, leave_out: bool) -> EvalSet:
    where = f"sets.{name}"
    if (settings.cuts is None) == (settings.format is None):
        raise ValueError(f"{where}: set cuts (with tasks), or format and path")
    if settings.cuts is not None:
        from nemo_mtbi.speech_llm.pretrained import DEMO  # with Megatron: a wrong configuration is refused before

        pool = TaskPool.from_yaml(DEMO / "tasks.yaml" if settings.tasks == "demo" else settings.tasks)
        pool = pool if settings.only is None else pool.subset(settings.only)
        drawn = (settings.wordings, settings.seed, settings.limit)
        chosen = from_cuts(name, settings.cuts, pool, *drawn, policy, leave_out)
    else:
        if settings.format is None or settings.path is None:
            raise ValueError(f"{where}.path is missing: give the file of the format {settings.format}")
        read = FORMATS[settings.format]
        chosen = read(name, settings.path, settings.audio_dir, settings.part, settings.metric)
    check_references(chosen)
    return chosen
