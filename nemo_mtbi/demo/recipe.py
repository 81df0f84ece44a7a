# SPDX-License-Identifier: Apache-2.0
"""The ``data:`` section: builds a corpus, lets the text LLM answer its tasks, and hands the cuts to training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from filelock import FileLock
from lhotse import CutSet

from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.checks import Count, OneOf, Section, at_least
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.config.schema import read_section
from nemo_mtbi.data.cut_files import CUTS_FILE
from nemo_mtbi.data.loader_config import LOCATION_KEYS
from nemo_mtbi.demo.corpora.corpus import cached, load_corpus
from nemo_mtbi.demo.corpora.digits import build_digits, list_speakers
from nemo_mtbi.demo.corpora.synthetic import build_synthetic
from nemo_mtbi.demo.corpora.synthetic_digits import build_synthetic_digits
from nemo_mtbi.inference.follow import Leader, follow
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.llm.architecture import parameter_count
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import DEMO, load_asr_model, load_text_llm, resolve
from nemo_mtbi.targets.generate import TargetPlan, generate_targets
from nemo_mtbi.targets.plan import rows_at_once
from nemo_mtbi.targets.reference import reference_targets
from nemo_mtbi.targets.tasks import TaskPool


@dataclass
class AdaptConfig(Section):
    """CTC training of the encoder on the training utterances before MTBI (``steps: 0``: none)."""

    SECTION: ClassVar[str] = "data.adapt"

    steps: Annotated[int, at_least(0)] = 0
    learning_rate: float = 5e-4
    batch_duration: float = 60.0


@dataclass
class DataConfig(Section):
    """Everything that stands under ``data:``.

    Attributes:
        kind: ``synthetic`` (espeak-ng) or ``digits`` (a clone of the Free Spoken Digit Dataset).
        cache_dir: corpora, targets and adapted encoders are kept here, by the hash of what made them.
        tasks: task pool YAML, or ``demo``.
        seed: of sentences, voices, recordings and tasks drawn. Training has its own.
        train_utterances, validation_utterances, test_utterances: sizes.
        synthetic_utterances: digits by espeak-ng that are trained on as well, for ``kind: digits``.
        tasks_per_cut: trained tasks answered about each training utterance; ``null``: all.
        train_tasks: names of the trained tasks that are really trained on; ``null``: all.
        targets: ``behavior``, the LLM's own answers, or ``reference``, the right ones, for comparison.
        reference_format: how ``targets: reference`` words a right answer, which stands in place of ``{}``: other
            annotators have other styles than the LLM.
        always_tasks: names of tasks that are drawn for every training utterance, among its ``tasks_per_cut``.
        digits_dir: the clone, for ``kind: digits``.
        heldout_speakers: speakers of the test utterances; all others are trained on.
        adapt: encoder adaptation.
    """

    SECTION: ClassVar[str] = "data"

    kind: Annotated[str, OneOf("synthetic", "digits", remedy=", or remove data: whole")] = "synthetic"
    cache_dir: str = "~/.cache/nemo_mtbi"
    tasks: str = "demo"
    seed: int = 0
    train_utterances: Count = 3000
    validation_utterances: Count = 50
    test_utterances: Count = 150
    synthetic_utterances: Annotated[int, at_least(0)] = 0
    tasks_per_cut: Count | None = 8
    always_tasks: list[str] = field(default_factory=list)
    train_tasks: list[str] | None = None
    targets: Annotated[str, OneOf("behavior", "reference")] = "behavior"
    reference_format: str = "{}"
    prompts_per_task: Count = 1
    digits_dir: str | None = None
    heldout_speakers: list[str] = field(default_factory=list)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)


@dataclass(frozen=True)
class Prepared:
    """Input of training and the benchmark: cut manifests and the encoder that fits them."""

    train: Path
    validation: Path
    test: Path
    pretrained_asr: str
    pool: TaskPool


def _digits_dir(config: DataConfig) -> str:
    """Return the clone that ``kind: digits`` needs."""
    if not config.digits_dir:
        raise ValueError("data.digits_dir is missing: give a clone of the Free Spoken Digit Dataset")
    return config.digits_dir


def parse_data_config(cfg: Mapping) -> DataConfig:
    """Check a ``data:`` section.

    Raises:
        ValueError: unknown key, wrong type or contradiction.
    """
    config = read_section(DataConfig, cfg, "data")
    _check_targets(config)
    if config.kind == "synthetic":
        for name in ("digits_dir", "heldout_speakers", "synthetic_utterances"):
            if getattr(config, name):
                raise ValueError(f"data.{name} belongs to kind: digits; set it, or remove data.{name}")
    if config.kind == "digits":
        speakers = list_speakers(_digits_dir(config))
        unknown = sorted(set(config.heldout_speakers) - set(speakers))
        if unknown or not config.heldout_speakers or set(config.heldout_speakers) == set(speakers):
            raise ValueError(
                f"data.heldout_speakers is {config.heldout_speakers}; name some, not all, of {', '.join(speakers)}"
            )
    return config


def load_pool(tasks: str) -> TaskPool:
    """Return the task pool of a YAML file, or of the demo."""
    return TaskPool.from_yaml(DEMO / "tasks.yaml" if tasks == "demo" else tasks)


def prepare(config: DataConfig, model: ModelConfig) -> Prepared:
    """Build corpus, adapted encoder and targets, or find them in the cache.

    Args:
        config: the ``data:`` section.
        model: the checked ``model:`` section, for its LLM, encoder and decoding parameters.
    """
    pool = load_pool(config.tasks)
    trained_pool(pool, config.train_tasks)  # before any work
    with groups.first(groups.is_global_first()):  # the others find all of it in the cache
        corpora = {split: _build(config, split) for split in ("train", "validation", "test")}
        asr = _adapt(config, model.pretrained_asr, corpora["train"])
    with groups.first(groups.data_parallel_rank() == 0):
        targets = _answer(config, model, corpora, pool)
    return Prepared(targets["train"], targets["validation"], corpora["test"][0] / CUTS_FILE, asr, pool)


def _answer(
    config: DataConfig, model: ModelConfig, corpora: Mapping[str, Sequence[Path]], pool: TaskPool
) -> dict[str, Path]:
    """Return the answers about the train and validation utterances: manifests by split."""
    with text_responder(model.pretrained_llm, model.chat, model.generation) as (responder, fingerprint):
        if not groups.is_reader():  # the reader of this replica writes
            follow(responder)
            targets = None
        else:
            with Leader(responder) as leader:
                targets = {
                    split: _targets(config, split, corpora[split], pool, responder, leader, fingerprint)
                    for split in ("train", "validation")
                }
    return groups.broadcast_object(targets)


def _check_targets(config: DataConfig) -> None:
    if config.reference_format.count("{}") != 1:
        raise ValueError(
            f"data.reference_format is {config.reference_format!r}; it must hold {{}} once, for the answer"
        )
    if config.reference_format != "{}" and config.targets != "reference":
        raise ValueError("data.reference_format words right answers: remove it, or set data.targets: reference")


def _targets(
    config: DataConfig,
    split: str,
    folders: Sequence[Path],
    pool: TaskPool,
    responder: Responder,
    leader: Leader,
    llm: str,
) -> Path:
    """Return the manifest of a split. Validation is always on the LLM's own answers to all trained tasks."""
    plan, pool = _plan_of(config, split, pool, responder.config.max_new_tokens)
    reference = split == "train" and config.targets == "reference"
    wording = reference and config.reference_format
    name = digest_of([*(folder.name for folder in folders), llm, repr(plan), pool.fingerprint(), wording])
    out_dir = Path(config.cache_dir).expanduser() / f"targets-{name[:16]}"
    cuts = CutSet.from_cuts(cut for folder in folders for cut in load_corpus(folder))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out_dir}.lock"):  # another run may want the same now: it waits, and finds them
        if reference:
            return reference_targets(
                cuts, out_dir, pool=pool, chat=responder.chat, llm=llm, plan=plan, wording=config.reference_format
            )
        (path,) = generate_targets(
            cuts,
            out_dir,
            pool=pool,
            chat=responder.chat,
            respond=lambda layouts: [(a.ids, a.truncated) for a in leader.layouts(layouts)],
            provenance={"llm": llm},
            plan=plan,
            shard_size=len(cuts),
            batch_rows=batch_rows(responder),
        )
    return path


def _plan_of(config: DataConfig, split: str, pool: TaskPool, max_new_tokens: int) -> tuple[TargetPlan, TaskPool]:
    """Return the requests about each utterance of a split."""
    plan = TargetPlan(max_new_tokens=max_new_tokens, seed=config.seed)
    if split != "train":
        return plan, pool
    plan = replace(
        plan,
        tasks_per_cut=config.tasks_per_cut,
        always_tasks=tuple(config.always_tasks),
        prompts_per_task=config.prompts_per_task,
    )
    return plan, trained_pool(pool, config.train_tasks)


def describe_preparation(config: DataConfig, model: ModelConfig) -> list[str]:
    """Return what :func:`prepare` would do before training, as sentences; nothing is read but the task pool.

    Raises:
        ValueError: if the task pool can't be read or does not fit.
    """
    pool = load_pool(config.tasks)
    sizes = {split: getattr(config, f"{split}_utterances") for split in ("train", "validation", "test")}
    spoken = "spoken by espeak-ng" if config.kind == "synthetic" else f"made of the recordings in {config.digits_dir}"
    lines = [f"{sum(sizes.values())} utterances are {spoken}: " + ", ".join(f"{n} {s}" for s, n in sizes.items())]
    if config.synthetic_utterances:
        lines[0] += f"; beside them {config.synthetic_utterances} by espeak-ng"
    if config.adapt.steps:
        lines.append(f"{model.pretrained_asr} is adapted to them by {config.adapt.steps} steps of CTC training")
    wanted = {split: sizes[split] for split in ("train", "validation")}
    wanted["train"] += config.synthetic_utterances
    if config.targets == "reference":
        trained_pool(pool, config.train_tasks)
        del wanted["train"]
        lines.append("right answers are written as the targets of training: the LLM is asked none of them")
    counts = {}
    for split, utterances in wanted.items():
        plan, tasks = _plan_of(config, split, pool, model.generation.max_new_tokens)
        counts[split] = utterances * plan.most_rows(tasks)
    total = sum(counts.values())
    lines.append(
        f"{total:,} questions, each answered in up to {model.generation.max_new_tokens} tokens, are put to the LLM "
        f"model.pretrained_llm={model.pretrained_llm}: " + ", ".join(f"{n:,} {s}" for s, n in counts.items())
    )
    lines.append(
        f"what data.cache_dir={config.cache_dir} holds already is not made again. data=null leaves all of this out: "
        "training reads your own cuts from model.train_ds, with the targets that mtbi_generate_targets.py has made"
    )
    return lines


def unread_sources(sections: Mapping[str, Mapping]) -> list[str]:
    """Return a note for each source of the user's own that the ``data:`` section takes the place of.

    Args:
        sections: ``train_ds`` and ``validation_ds``, by name.
    """
    return [
        f"model.{name}.{key}={section[key]} is not read, since the section data: makes what is trained on: set "
        "data=null to train on your own cuts"
        for name, section in sections.items()
        for key in LOCATION_KEYS
        if section.get(key) is not None
    ]


def batch_rows(responder: Responder) -> int | None:
    """Return rows that an LLM answers at once where it makes targets; ``None``: as many as ``batch_tokens`` allows."""
    if responder.model.device.type != "cpu":
        return None
    return rows_at_once(parameter_count(responder.model.decoder.architecture))


def trained_pool(pool: TaskPool, names: Sequence[str] | None) -> TaskPool:
    """Return the pool with these tasks only.

    Raises:
        ValueError: if one of them is unknown or held out.
    """
    if names is None:
        return pool
    chosen = pool.subset(names)
    if chosen.heldout:
        raise ValueError(
            f"data.train_tasks names {', '.join(task.name for task in chosen.heldout)}, which the task pool holds "
            f"out; choose among {', '.join(task.name for task in pool.train)}"
        )
    return chosen


@contextlib.contextmanager
def text_responder(
    llm: str, chat: ChatConfig | None, generation: GenerationConfig, dtype: str = "float32"
) -> Iterator[tuple[Responder, str]]:
    """Load a text LLM alone, with its fingerprint; ``dtype`` is the name of that of its weights."""
    groups.initialize()
    text = load_text_llm(llm, getattr(torch, dtype), chat=chat)
    yield Responder(LayoutDecoder(text.chunks), text.chat, generation), text.fingerprint


def _build(config: DataConfig, split: str) -> list[Path]:
    """Return the corpus folders of one split."""
    size = getattr(config, f"{split}_utterances")
    right = split == "test" or (split == "train" and config.targets == "reference")
    common = dict(num_utterances=size, seed=config.seed, split=split, with_references=right)
    if config.kind == "synthetic":
        return [build_synthetic(config.cache_dir, **common)]
    speakers = list_speakers(_digits_dir(config))
    if split == "test":
        chosen = list(config.heldout_speakers)
    else:
        chosen = [speaker for speaker in speakers if speaker not in config.heldout_speakers]
    train = split == "train"
    folders = [build_digits(config.cache_dir, _digits_dir(config), speakers=chosen, augment=train, **common)]
    if train and config.synthetic_utterances:
        size = config.synthetic_utterances
        folders.append(build_synthetic_digits(config.cache_dir, num_utterances=size, seed=config.seed))
    return folders


def _adapt(config: DataConfig, pretrained_asr: str, corpora: Sequence[Path]) -> str:
    """Return the path of the encoder adapted to the training corpora, or the encoder as it is."""
    adapt = config.adapt
    if not adapt.steps:
        return pretrained_asr
    source = resolve(pretrained_asr, "model.pretrained_asr", "encoder.nemo")
    if not source.is_file():
        raise ValueError(f"data.adapt.steps trains NeMo's CTC models, and {source} is none: set data.adapt.steps=0")
    names = [corpus.name for corpus in corpora]
    key = {"source": digest_of(source.read_bytes().hex()), "corpora": names, "adapt": vars(adapt)}

    def build(work: Path, final: Path) -> None:
        from nemo_mtbi.encoders.ctc import save_asr, train_ctc

        model = load_asr_model(pretrained_asr)
        train_ctc(
            model,
            [corpus / CUTS_FILE for corpus in corpora],
            steps=adapt.steps,
            learning_rate=adapt.learning_rate,
            seed=config.seed,
            batch_duration=adapt.batch_duration,
            spec_augment=True,
        )
        save_asr(model, work / "encoder.nemo")

    return str(cached(build, config.cache_dir, key, name="encoder") / "encoder.nemo")
