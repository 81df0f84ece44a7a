# SPDX-License-Identifier: Apache-2.0
"""Generates behavior targets for a corpus from a configuration: the library of ``mtbi targets``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from lhotse import CutSet
from lhotse.cut import Cut
from omegaconf import MISSING, DictConfig, OmegaConf
from rich.console import Console

from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.checks import Count, FrozenDtype, RaiseOrSkip, Section
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.config.schema import plain, read_section
from nemo_mtbi.data.gate import read_gated
from nemo_mtbi.data.loader_config import LOCATION_KEYS, check_source
from nemo_mtbi.demo.recipe import batch_rows, load_pool, text_responder
from nemo_mtbi.inference.follow import Leader, follow
from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.io.paths import named_files, refuse_overwriting
from nemo_mtbi.io.sources import SourcePolicy
from nemo_mtbi.parallel import groups, peers
from nemo_mtbi.parallel.device import pick_device
from nemo_mtbi.parallel.settings import check_same
from nemo_mtbi.parallel.stop import Remedies, explained
from nemo_mtbi.targets.generate import BAD_ENTRY, LEAVE_OUT, generate_targets
from nemo_mtbi.targets.plan import Split, TargetPlan
from nemo_mtbi.targets.source import shar_fields, shar_shard_size, whole_and_absolute
from nemo_mtbi.targets.store import JOINED, SHAR_CONFIG, join_shards, read_targets, seal, written_files


@dataclass
class PlanConfig(Section):
    """The tasks and prompts that are drawn for each cut; see :class:`nemo_mtbi.targets.plan.TargetPlan`."""

    SECTION: ClassVar[str] = "plan"

    tasks_per_cut: Count | None = None
    always_tasks: list[str] = field(default_factory=list)
    prompts_per_task: Count = 1
    split: Split = "train"
    wordings: Split = "train"
    seed: int = 0


@dataclass
class GenerateTargetsConfig(Section):
    """The keys of ``conf/mtbi_generate_targets.yaml``.

    Attributes:
        output_dir: folder of the shards.
        pretrained_llm: text LLM directory, of ours or of Hugging Face, or ``demo``.
        chat: format of the prompts, the same as ``model.chat`` in training; ``null``: the LLM's own.
        frozen_dtype: of the LLM's weights: ``float32`` or ``bfloat16``.
        tasks: task pool YAML, or ``demo``.
        cuts_path, manifest_filepath, shar_path, input_cfg: NeMo's names of a source; one must be set.
        text_field, lang_field: keys of a NeMo manifest.
        allow_remote, allow_commands: other sources than files that may be read
            (:class:`~nemo_mtbi.io.sources.SourcePolicy`).
        generation: decoding; a batch, which ``batch_tokens`` bounds, is the unit of resume.
        plan: tasks and prompts of each cut.
        shard_size: cuts in a shard (those of a Shar corpus are kept).
        on_missing_text: ``raise`` or ``skip`` cuts without a transcript, and entries with values of a wrong type.
        overwrite: replace targets of other settings.
        tensor_model_parallel_size, pipeline_model_parallel_size: processes that share the LLM.
        rank, world_size: this replica of the LLM makes the shards ``rank``, ``rank + world_size``, …; ``null``: the
            replicas that torchrun has started share them.
        cuda: index of the device; ``null``: a GPU if there is one; negative: CPU.
    """

    output_dir: str = MISSING
    pretrained_llm: str = "demo"
    chat: ChatConfig | None = None
    frozen_dtype: FrozenDtype = "float32"
    tasks: str = "demo"
    cuts_path: Any = None
    manifest_filepath: Any = None
    shar_path: Any = None
    input_cfg: Any = None
    tarred_audio_filepaths: Any = None
    text_field: str = "text"
    lang_field: str = "lang"
    allow_remote: bool = False
    allow_commands: bool = False
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    shard_size: Count = 1000
    on_missing_text: RaiseOrSkip = "raise"
    overwrite: bool = False
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    rank: int | None = None
    world_size: int | None = None
    cuda: int | None = None

    @property
    def layout(self) -> ParallelConfig:
        """Return how the LLM is split."""
        return ParallelConfig(self.tensor_model_parallel_size, self.pipeline_model_parallel_size)

    def share(self) -> tuple[int, int]:
        """Return rank and number of the replicas that share the shards; the groups have started.

        Raises:
            ValueError: if both torchrun and the configuration start several replicas.
        """
        replicas = groups.data_parallel_size()
        if self.rank is None or self.world_size is None:
            return groups.data_parallel_rank(), replicas
        if replicas > 1:
            raise ValueError(
                f"torchrun has started {replicas} replicas of the LLM, which share the shards: leave rank and "
                "world_size out, or start one replica for each rank"
            )
        return self.rank, self.world_size

    def target_plan(self) -> TargetPlan:
        """Return the plan with its decoding parameters."""
        return TargetPlan(**asdict(self.plan), **asdict(self.generation))


def parse_generate_config(cfg: Mapping) -> GenerateTargetsConfig:
    """Check the keys of ``conf/mtbi_generate_targets.yaml``.

    Raises:
        ValueError: unknown, missing or contradictory key; names the remedy.
    """
    config = read_section(GenerateTargetsConfig, cfg)
    given = [key for key in LOCATION_KEYS if getattr(config, key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"set exactly one source of {', '.join(LOCATION_KEYS)}; set are: {', '.join(given) or 'none'}"
        )
    if config.tarred_audio_filepaths is not None:
        raise ValueError(
            "tarred_audio_filepaths is not supported: targets are written into manifests, without audio. Give the "
            "manifest of the files before they were tarred, or convert the corpus to Shar and give shar_path"
        )
    if config.shar_path is not None and config.on_missing_text != "raise":
        raise ValueError("on_missing_text=skip would shift the cuts of a Shar against their audio: leave it at raise")
    if (config.rank is None) != (config.world_size is None):
        raise ValueError("rank and world_size belong together: set both, or leave both out under torchrun")
    config.target_plan()
    return config


def spare_inputs(config: GenerateTargetsConfig) -> None:
    """Refuse an ``output_dir`` where the run would replace or delete what it reads.

    Raises:
        ValueError: names the file and the key that it is read by.
    """
    folder = Path(config.output_dir).expanduser()
    inputs = {key: list(named_files(getattr(config, key))) for key in LOCATION_KEYS}
    inputs |= {key: [name] for key in ("tasks", "pretrained_llm") if (name := getattr(config, key)) != "demo"}
    refuse_overwriting(inputs, {"output_dir": [*written_files(folder), folder / SHAR_CONFIG]})


# ------------------------------------------------------------------------------------------------------------- source


def open_source(config: GenerateTargetsConfig) -> Iterable[Cut]:
    """Return the cuts of the source with absolute paths (they are written to another folder), in a fixed order.

    Raises:
        ValueError: if the source does not exist, is not allowed or is a stream of audio.
    """
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

    from nemo_mtbi.register import register

    register()
    keys = {key: getattr(config, key) for key in (*LOCATION_KEYS, "text_field", "lang_field")}
    source = OmegaConf.create({**keys, "noise_path": None, "rir_path": None})
    policy = SourcePolicy(config.allow_remote, config.allow_commands)
    check_source(source, policy)
    gated = partial(read_gated, policy=policy, skip=config.on_missing_text == "skip", remedy=LEAVE_OUT, restart=True)
    if config.shar_path is not None:
        files = shar_fields(config.shar_path)["cuts"]
        return gated(lambda: (CutSet.from_files(files, shuffle_iters=False), False), source)[0]
    # a fixed seed: a blend is then mixed alike in every run, on which resuming relies
    fixed = {"shuffle": False, "shard_seed": 0, "force_finite": True, "tarred_audio_filepaths": None}
    full = OmegaConf.merge(source, fixed)
    cuts, is_stream = gated(lambda: read_cutset_from_config(full), source)
    if is_stream:
        raise ValueError(
            "the source is a stream of audio or text (tarred, Shar or text data in input_cfg), but targets are "
            "written into manifests of cuts: give manifests, or one Shar corpus with shar_path"
        )
    cuts.prepare = whole_and_absolute
    return cuts


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class TargetsReport:
    """Result of a run.

    Attributes:
        folder: of the shards.
        shards: number of shards that this process made or that were finished before.
        counts: of ``generate_targets``.
        llm, chat: fingerprints that training compares.
        train_on: the key and value for training; ``None`` while other ranks are at work.
        waiting: why ``train_on`` is ``None``.
    """

    folder: Path
    shards: int
    counts: Counter
    llm: str
    chat: str
    train_on: str | None = None
    waiting: str | None = None

    def render(self, console: Console) -> None:
        """Print the numbers of targets made, left out and reused, and what to train on."""
        counts, lines = self.counts, []
        lines.append(f"{counts['cuts']} cuts with {counts['rows']} rows in {self.shards} shards in {self.folder}")
        lines.append(f"responses cut by the length limit: {counts['truncated']}")
        if counts["dropped_empty"]:
            lines[-1] += f", of these empty and dropped: {counts['dropped_empty']}"
        if counts["skipped_no_text"]:
            lines.append(f"left out: {counts['skipped_no_text']} cuts without a transcript")
        bad = {key.removeprefix(BAD_ENTRY): counts[key] for key in sorted(counts) if key.startswith(BAD_ENTRY)}
        if bad:
            reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
            lines.append(f"left out: {sum(bad.values())} entries that cannot be used ({reasons})")
        if counts["reused_shards"] or counts["reused_batches"]:
            lines.append(f"from a former run: {counts['reused_shards']} shards and {counts['reused_batches']} batches")
        if counts["replaced"]:
            lines.append(f"replaced, since made otherwise: {counts['replaced']} files")
        lines += [f"LLM {self.llm}", f"chat format {self.chat}"]
        lines.append(f"not complete: {self.waiting}" if self.waiting else f"train on: model.train_ds.{self.train_on}")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


@explained(
    Remedies(
        go_on="What was finished is kept: start the same command again to go on",
        place="output_dir",
        patience="the time limit of torch.distributed",
        work="while it made targets",
    )
)
def run(cfg: Mapping, progress: bool = True) -> TargetsReport | None:
    """Generate the targets of a configuration, or the rest of them after a run that was killed.

    Every process of a replica calls it; the first of them reads, writes and returns the report.

    Raises:
        ValueError: if the configuration, the source or a cut is not legal.
        RuntimeError: if ``output_dir`` holds targets of other settings, and ``overwrite`` is not set, or if another
            run makes the same share of them there.
        SystemExit: after Ctrl-C or another signal.
    """
    config = parse_generate_config(cfg)
    pool, plan = load_pool(config.tasks), config.target_plan()
    plan.tasks(pool)
    spare_inputs(config)
    started = plain(cast(DictConfig, OmegaConf.merge(cfg)))  # of a mapping it is a DictConfig
    groups.initialize(config.layout, check=lambda: check_same(started, ("cuda",)))
    share, source = config.share(), open_source(config)  # before an LLM is loaded
    loaded = text_responder(config.pretrained_llm, config.chat, config.generation, config.frozen_dtype)
    origin = {} if config.frozen_dtype == "float32" else {"dtype": config.frozen_dtype}
    with loaded as (responder, llm):
        responder.model.to(pick_device(config.cuda))
        if not groups.is_reader():
            follow(responder)
            return None
        with Leader(responder) as leader:
            inputs = {
                "pool": pool,
                "plan": plan,
                "chat": responder.chat,
                "provenance": {"llm": llm, **origin},
                "respond": lambda layouts: [(answer.ids, answer.truncated) for answer in leader.layouts(layouts)],
                "batch_rows": batch_rows(responder),
            }
            return _make(config, source, share, inputs, progress)


def _make(
    config: GenerateTargetsConfig,
    cuts: Iterable[Cut],
    share: tuple[int, int],
    inputs: Mapping[str, Any],
    progress: bool,
) -> TargetsReport:
    """Generate the share of a replica, on its reader.

    Args:
        config: of the run.
        cuts: the source.
        share: rank and number of the replicas that share the shards.
        inputs: pool, plan, chat format, LLM and answers, as ``generate_targets`` takes them.
        progress: show a bar, on the first replica.
    """
    folder, (rank, world_size), shard_size = Path(config.output_dir).expanduser(), share, config.shard_size
    if config.shar_path is not None:
        shard_size = shar_shard_size(shar_fields(config.shar_path)["cuts"])
    counts: Counter = Counter()
    shards = generate_targets(
        cuts,
        folder,
        **inputs,
        shard_size=shard_size,
        on_missing_text=config.on_missing_text,
        overwrite=config.overwrite,
        outdated=[folder / JOINED, folder / SHAR_CONFIG],  # nobody trains on what is about to be replaced
        rank=rank,
        world_size=world_size,
        progress=progress and rank == 0,
        counts=counts,
    )
    fingerprints = inputs["provenance"]["llm"], inputs["chat"].fingerprint()
    report = TargetsReport(folder, len(shards), counts, *fingerprints)
    try:
        read_targets(folder)
    except RuntimeError as error:
        lost = peers.ended() if config.rank is None else []  # of those that torchrun has started with this one
        if world_size == 1:
            raise
        if lost and not _is_complete(folder):  # they may have finished since
            ranks = ", ".join(map(str, lost))
            raise RuntimeError(f"process {ranks} has ended before its targets were made: {error}") from error
        return replace(report, waiting=f"{error}; the last rank says what to train on")
    return replace(report, train_on=publish(folder, config.shar_path))


def _is_complete(folder: Path) -> bool:
    """Return whether all shards of a folder are finished."""
    try:
        read_targets(folder)
    except RuntimeError:
        return False
    return True


def publish(folder: Path, shar_path: Any = None) -> str:
    """Write the one file that training reads, and return its key and path as ``key=path``.

    Any rank may do this; all write the same bytes.
    """
    folder = folder.absolute()
    if shar_path is None:
        joined = join_shards(folder)
        seal(folder)
        return f"cuts_path={joined}"
    fields = {**shar_fields(shar_path), "cuts": [str(shard) for shard in sorted(folder.glob("cuts-*.jsonl.gz"))]}
    with replacing(folder / SHAR_CONFIG) as file:
        file.write(yaml.safe_dump([{"type": "lhotse_shar", "shar_path": fields}], sort_keys=False).encode())
    seal(folder)
    return f"input_cfg={folder / SHAR_CONFIG}"
