# SPDX-License-Identifier: Apache-2.0
"""Behavior targets for a corpus, from a configuration: what ``examples/mtbi_generate_targets.py`` calls."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.lazy import count_newlines_fast
from omegaconf import MISSING, OmegaConf
from rich.console import Console

from nemo_mtbi.config import FROZEN_DTYPES
from nemo_mtbi.data.chat_template import ChatConfig
from nemo_mtbi.data.loader_config import LOCATION_KEYS, check_source
from nemo_mtbi.data.nemo_cuts import restore_piece
from nemo_mtbi.data.target_plan import TargetPlan
from nemo_mtbi.data.target_shards import JOINED, join_shards, read_targets
from nemo_mtbi.data.targets import generate_targets
from nemo_mtbi.durable import replacing
from nemo_mtbi.inference.follow import Leader, follow
from nemo_mtbi.inference.generate import GenerationConfig
from nemo_mtbi.inference.transcribe import pick_device
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.groups import ParallelConfig
from nemo_mtbi.recipe import load_pool, text_responder
from nemo_mtbi.schema import read_section

SHAR_CONFIG = "input_cfg.yaml"  # for a Shar corpus: our cuts beside its data


@dataclass
class PlanConfig:
    """What is asked about each cut; see :class:`nemo_mtbi.data.target_plan.TargetPlan`."""

    tasks_per_cut: int | None = None
    always_tasks: list[str] = field(default_factory=list)
    prompts_per_task: int = 1
    split: str = "train"
    wordings: str = "train"
    seed: int = 0


@dataclass
class GenerateTargetsConfig:
    """Everything that ``conf/mtbi_generate_targets.yaml`` may hold.

    Attributes:
        output_dir: folder of the shards.
        pretrained_llm: text LLM directory, of ours or of Hugging Face, or ``demo``.
        chat: how prompts are put, as training will put them (``model.chat``); ``null``: as the LLM says.
        frozen_dtype: of the LLM's weights: ``float32`` or ``bfloat16``.
        tasks: task pool YAML, or ``demo``.
        cuts_path, manifest_filepath, shar_path, input_cfg: NeMo's names of a source; one must be set.
        text_field, lang_field: keys of a NeMo manifest.
        generation: decoding; ``batch_tokens`` also sets the unit of resume.
        plan: what is asked.
        shard_size: cuts in a shard (those of a Shar corpus are kept).
        on_missing_text: ``raise`` or ``skip`` cuts without a transcript.
        overwrite: replace what was made otherwise.
        tensor_model_parallel_size, pipeline_model_parallel_size: processes that share the LLM.
        rank, world_size: this replica of the LLM makes the shards ``rank``, ``rank + world_size``, …; ``null``: the
            replicas that torchrun has started share them.
        cuda: index of the device; ``null``: a GPU if there is one; negative: CPU.
    """

    output_dir: str = MISSING
    pretrained_llm: str = "demo"
    chat: ChatConfig | None = None
    frozen_dtype: str = "float32"
    tasks: str = "demo"
    cuts_path: Any = None
    manifest_filepath: Any = None
    shar_path: Any = None
    input_cfg: Any = None
    tarred_audio_filepaths: Any = None
    text_field: str = "text"
    lang_field: str = "lang"
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    shard_size: int = 1000
    on_missing_text: str = "raise"
    overwrite: bool = False
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    rank: int | None = None
    world_size: int | None = None
    cuda: int | None = None

    @property
    def layout(self) -> ParallelConfig:
        """How the LLM is split."""
        return ParallelConfig(self.tensor_model_parallel_size, self.pipeline_model_parallel_size)

    def share(self) -> tuple[int, int]:
        """Rank and number of the replicas that share the shards, once the groups have started.

        Raises:
            ValueError: if both torchrun and the configuration say so.
        """
        replicas = groups.data_parallel_size()
        if self.rank is None:
            return groups.data_parallel_rank(), replicas
        if replicas > 1:
            raise ValueError(
                f"torchrun has started {replicas} replicas of the LLM, which share the shards: leave rank and "
                "world_size out, or start one replica for each rank"
            )
        return self.rank, self.world_size

    def target_plan(self) -> TargetPlan:
        """The plan with the decoding parameters that belong to it."""
        return TargetPlan(**asdict(self.plan), **asdict(self.generation))


def parse_generate_config(cfg: Mapping) -> GenerateTargetsConfig:
    """Checks the keys of ``conf/mtbi_generate_targets.yaml``.

    Raises:
        ValueError: unknown, missing or contradictory key; names the remedy.
    """
    config = read_section(GenerateTargetsConfig, cfg)
    if config.frozen_dtype not in FROZEN_DTYPES:
        raise ValueError(f"frozen_dtype is {config.frozen_dtype!r}; it must be {' or '.join(FROZEN_DTYPES)}")
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


# ------------------------------------------------------------------------------------------------ what is read


def open_source(config: GenerateTargetsConfig) -> CutSet:
    """The cuts of the source, with absolute paths (they are written to another folder), in the same order each time.

    Raises:
        ValueError: if the source does not exist or is a stream of audio.
    """
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

    from nemo_mtbi.register import register

    register()
    source = {key: getattr(config, key) for key in (*LOCATION_KEYS, "text_field", "lang_field")}
    source = OmegaConf.create({**source, "noise_path": None, "rir_path": None})
    check_source(source)
    if config.shar_path is not None:
        return CutSet.from_files(shar_fields(config.shar_path)["cuts"], shuffle_iters=False)
    # a fixed seed: a blend is then mixed alike in every run, which resuming builds on
    fixed = {"shuffle": False, "shard_seed": 0, "force_finite": True, "tarred_audio_filepaths": None}
    cuts, is_stream = read_cutset_from_config(OmegaConf.merge(source, fixed))
    if is_stream:
        raise ValueError(
            "the source is a stream of audio or text (tarred, Shar or text data in input_cfg), but targets are "
            "written into manifests of cuts: give manifests, or one Shar corpus with shar_path"
        )
    return cuts.map(restore_piece).map(absolute_paths)


def absolute_paths(cut: Cut) -> Cut:
    """``cut`` with absolute paths of its audio files; it is changed in place."""
    for part in [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]:
        if not isinstance(part, PaddingCut) and part.has_recording:
            for source in part.recording.sources:
                if source.type == "file":
                    source.source = os.path.abspath(source.source)
    return cut


def shar_fields(shar_path: Any) -> dict[str, list[str]]:
    """The files of one Shar corpus by field, in order of their shards.

    Args:
        shar_path: its folder, or a mapping of fields to paths as NeMo takes it.

    Raises:
        ValueError: if it is neither, or has no cuts.
    """
    from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths

    fields: dict[str, list[str]] = {}
    if isinstance(shar_path, (str, Path)):
        for path in sorted(Path(shar_path).absolute().glob("*.*")):
            fields.setdefault(path.name.split(".")[0], []).append(str(path))
    elif isinstance(shar_path, Mapping):
        fields = {
            key: [os.path.abspath(path) for path in expand_sharded_filepaths(paths)]
            for key, paths in shar_path.items()
        }
    if not fields.get("cuts"):
        raise ValueError(
            f"shar_path={shar_path} must be the folder of one Shar corpus, or a mapping with the key cuts"
        )
    return fields


def shar_shard_size(files: list[str]) -> int:
    """Cuts in each shard of a Shar corpus; ours must be the same, since cuts and audio are read side by side.

    Raises:
        ValueError: if they differ.
    """
    sizes = [count_newlines_fast(path) for path in files]
    if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:
        raise ValueError(
            f"the shards of this Shar corpus hold {min(sizes)} to {max(sizes)} cuts, and targets are made for shards "
            "of one size (the last may be smaller): write it again with Lhotse and a single shard_size"
        )
    return sizes[0]


# ------------------------------------------------------------------------------------------------ what is written


@dataclass(frozen=True)
class TargetsReport:
    """What a run did.

    Attributes:
        folder: of the shards.
        shards: how many this process made or found finished.
        counts: of ``generate_targets``.
        llm, chat: fingerprints that training compares.
        train_on: the key and value for training; ``None`` while other ranks are at work.
        waiting: why ``train_on`` is not there.
    """

    folder: Path
    shards: int
    counts: Counter
    llm: str
    chat: str
    train_on: str | None = None
    waiting: str | None = None

    def render(self, console: Console) -> None:
        """Prints what was made, left out and reused, and what to train on."""
        counts, lines = self.counts, []
        lines.append(f"{counts['cuts']} cuts with {counts['rows']} rows in {self.shards} shards in {self.folder}")
        lines.append(f"responses cut by the length limit: {counts['truncated']}")
        if counts["dropped_empty"]:
            lines[-1] += f", of these empty and dropped: {counts['dropped_empty']}"
        if counts["skipped_no_text"]:
            lines.append(f"left out: {counts['skipped_no_text']} cuts without a transcript")
        if counts["reused_shards"] or counts["reused_batches"]:
            lines.append(f"from a former run: {counts['reused_shards']} shards and {counts['reused_batches']} batches")
        if counts["replaced"]:
            lines.append(f"replaced, since made otherwise: {counts['replaced']} files")
        lines += [f"LLM {self.llm}", f"chat format {self.chat}"]
        lines.append(f"not complete: {self.waiting}" if self.waiting else f"train on: model.train_ds.{self.train_on}")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def run(cfg: Mapping, progress: bool = True) -> TargetsReport | None:
    """Makes the targets of a configuration, or what is left of them after a run that was killed.

    Every process of a replica calls it; the first of them reads, writes and returns what was done.

    Raises:
        ValueError: if the configuration, the source or a cut is not legal.
        RuntimeError: if ``output_dir`` holds targets made otherwise, and ``overwrite`` is not set.
    """
    config = parse_generate_config(cfg)
    pool, plan = load_pool(config.tasks), config.target_plan()
    plan.tasks(pool)
    groups.initialize(config.layout)
    share, source = config.share(), open_source(config)  # before an LLM is loaded
    loaded = text_responder(config.pretrained_llm, config.chat, config.generation, config.frozen_dtype)
    origin = {} if config.frozen_dtype == "float32" else {"dtype": config.frozen_dtype}
    with loaded as (responder, llm):
        responder.model.to(pick_device(config.cuda))
        if not groups.is_reader():
            follow(responder)
            return None
        with Leader(responder) as leader:
            asked = {
                "pool": pool,
                "plan": plan,
                "chat": responder.chat,
                "provenance": {"llm": llm, **origin},
                "respond": lambda layouts: [(answer.ids, answer.truncated) for answer in leader.layouts(layouts)],
            }
            return _make(config, source, share, asked, progress)


def _make(
    config: GenerateTargetsConfig, cuts: CutSet, share: tuple[int, int], asked: Mapping[str, Any], progress: bool
) -> TargetsReport:
    """The part of a replica's reader.

    Args:
        config: of the run.
        cuts: the source.
        share: rank and number of the replicas that share the shards.
        asked: what ``generate_targets`` takes of pool, plan, chat format, LLM and answers.
        progress: show a bar, on the first replica.
    """
    folder, (rank, world_size), shard_size = Path(config.output_dir).expanduser(), share, config.shard_size
    if config.shar_path is not None:
        shard_size = shar_shard_size(shar_fields(config.shar_path)["cuts"])
    if config.overwrite:  # until it is written anew nobody trains on what is about to be replaced
        for name in (JOINED, SHAR_CONFIG):
            (folder / name).unlink(missing_ok=True)
    counts: Counter = Counter()
    shards = generate_targets(
        cuts,
        folder,
        **asked,
        shard_size=shard_size,
        on_missing_text=config.on_missing_text,
        overwrite=config.overwrite,
        rank=rank,
        world_size=world_size,
        progress=progress and rank == 0,
        counts=counts,
    )
    report = dict(folder=folder, shards=len(shards), counts=counts)
    report |= {"llm": asked["provenance"]["llm"], "chat": asked["chat"].fingerprint()}
    try:
        read_targets(folder)
    except RuntimeError as error:
        if world_size == 1:
            raise
        return TargetsReport(**report, waiting=f"{error}; the last rank says what to train on")
    return TargetsReport(**report, train_on=publish(folder, config.shar_path))


def publish(folder: Path, shar_path: Any = None) -> str:
    """Writes the one file that training is pointed at; returns its key and path as ``key=path``.

    All ranks may do this; they write the same.
    """
    folder = folder.absolute()
    if shar_path is None:
        return f"cuts_path={join_shards(folder)}"
    fields = {**shar_fields(shar_path), "cuts": [str(shard) for shard in sorted(folder.glob("cuts-*.jsonl.gz"))]}
    with replacing(folder / SHAR_CONFIG) as file:
        file.write(yaml.safe_dump([{"type": "lhotse_shar", "shar_path": fields}], sort_keys=False).encode())
    return f"input_cfg={folder / SHAR_CONFIG}"
