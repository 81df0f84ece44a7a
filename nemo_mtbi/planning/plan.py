# SPDX-License-Identifier: Apache-2.0
"""What a run would do, and what would be refused, found out without weights, process groups or CUDA."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.utils.data import DataLoader

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.model import LAYOUT_KEYS, ModelConfig, parse_model_config
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.config.schema import explain
from nemo_mtbi.data.behaviors import CHAT_FORMAT
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.data.loader_config import check_config
from nemo_mtbi.data.passes import EpochSampler
from nemo_mtbi.data.step import Step, assumed_step, measured_step, steps_of_pass
from nemo_mtbi.demo.recipe import describe_preparation, parse_data_config, unread_sources
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.llm.architecture import DecoderConfig, parameter_count
from nemo_mtbi.llm.decoder import check_training
from nemo_mtbi.llm.directory import TextLLMDirectory, open_text_llm
from nemo_mtbi.llm.lora import check_lora
from nemo_mtbi.parallel.rank_layout import places
from nemo_mtbi.planning import memory
from nemo_mtbi.planning.footprint import EncoderFacts, read_encoder, speech_parts
from nemo_mtbi.planning.layout_table import RankFacts
from nemo_mtbi.planning.memory import Load, StageMemory, Term
from nemo_mtbi.planning.trained import adapted_memory, trained_memory
from nemo_mtbi.speech_llm.connector import connector_stages
from nemo_mtbi.speech_llm.pretrained import resolve

GRANULARITIES = (None, "selective", "full")
OPTIMIZER_STATES = {"sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "adam": 2, "adamw": 2, "adamax": 2, "nadam": 2}
SAMPLED_BATCHES = 50  # from which a step is judged


@dataclass
class Plan:
    """What a run would do. Parts that could not be found out are empty, and a problem says why.

    Attributes:
        world: processes.
        layout: of one replica; ``None`` if it contradicts itself.
        ranks: who holds what.
        stages: memory of one process of each stage.
        layer: bytes that a layer keeps for each position.
        choices: largest bytes of activations by (recomputation, sequence parallelism).
        step: what a step holds.
        load: what goes through the model at once.
        micro_batch_tokens: bound on a microbatch.
        steps_per_epoch: a number, or why there is none.
        preparation: what is made before training.
        problems: what would be refused, and why.
        notes: what was assumed.
    """

    world: int = 1
    layout: ParallelConfig | None = None
    ranks: list[RankFacts] = field(default_factory=list)
    stages: list[StageMemory] = field(default_factory=list)
    layer: list[Term] = field(default_factory=list)
    choices: dict[tuple[str | None, bool], int] = field(default_factory=dict)
    step: Step | None = None
    load: Load | None = None
    micro_batch_tokens: int = 0
    steps_per_epoch: str = "unknown"
    preparation: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns, or ``None`` and one more problem if it refuses."""
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            self.refuse(str(error))
            return None

    def refuse(self, message: str) -> None:
        if message not in self.problems:
            self.problems.append(message)

    @property
    def replicas(self) -> int:
        """Data-parallel size; 1 where the processes do not divide."""
        return max(self.world // self.layout.model_parallel_size, 1) if self.layout else 1


# --------------------------------------------------------------------------------------------------- what is asked for


def check_layout(plan: Plan, model: Mapping) -> None:
    """Reads the layout. Keys are checked apart from each other, so that one mistake does not hide another."""
    given = {key: model[key] for key in LAYOUT_KEYS if model.get(key) is not None}
    if not all(isinstance(value, int) for value in given.values()):
        return  # the schema says what is wrong
    tensor, pipeline, virtual, split = LAYOUT_KEYS
    parts = ((tensor,), (pipeline,), (pipeline, virtual), (tensor, split))
    found = [plan.attempt(ParallelConfig, **{key: given[key] for key in part if key in given}) for part in parts]
    plan.layout = ParallelConfig(**given) if all(found) else None


def check_model(plan: Plan, model: Mapping) -> ModelConfig | None:
    """Reads the section key by key; keys that are wrong are left out of what is returned."""
    needed = {key: model[key] for key in ("pretrained_asr", "pretrained_llm") if key in model}
    good = dict(needed)
    for key, value in model.items():
        # the layout's keys may contradict each other: see check_layout
        layout = key in LAYOUT_KEYS and isinstance(value, (int, type(None)))
        if not layout and plan.attempt(parse_model_config, {**needed, key: value}):
            good[key] = value
    return plan.attempt(parse_model_config, good)


def check_architecture(plan: Plan, config: DecoderConfig) -> bool:
    """Whether the layout can split an LLM; every size that does not divide is a problem."""
    sizes = {
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "ffn": config.ffn_hidden_size,
    }
    fits = dict.fromkeys(sizes, plan.layout.model_parallel_size * plan.layout.chunks)
    before = len(plan.problems)
    plan.attempt(check_training, config, plan.layout)
    for name, size in sizes.items():
        plan.attempt(plan.layout.check_architecture, **{**fits, name: size})
    return len(plan.problems) == before


def check_world(plan: Plan, trainer: Mapping, environ: Mapping[str, str]) -> int:
    """Finds the number of processes, and returns how many of them share a machine.

    Raises:
        ValueError: if the trainer's section holds no numbers.
    """
    devices, nodes = trainer.get("devices", 1), int(trainer.get("num_nodes") or 1)
    if devices in ("auto", -1, "-1", None):
        plan.notes.append(f"trainer.devices is {devices}: counted as 1 process on each machine")
        devices = 1
    elif isinstance(devices, str):
        devices = len([part for part in devices.split(",") if part.strip()]) if "," in devices else int(devices)
    elif not isinstance(devices, int):
        devices = len(devices)
    plan.world = devices * nodes
    started = int(environ.get("WORLD_SIZE", plan.world))
    if started != plan.world:
        plan.refuse(
            f"{started} processes were started, but trainer.devices x num_nodes = {devices} x {nodes}: make them equal"
        )
        plan.world = started
    if plan.layout:
        plan.attempt(plan.layout.replicas, plan.world)
    return int(environ.get("LOCAL_WORLD_SIZE", devices))


def device_names(world: int, per_node: int, accelerator: str) -> list[str]:
    """What each process runs on, as far as the configuration says."""
    kind = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}.get(accelerator, "device")
    names = [kind if kind == "cpu" else f"{kind}:{rank % per_node}" for rank in range(world)]
    return names if world <= per_node else [f"node {rank // per_node} {name}" for rank, name in enumerate(names)]


@dataclass(frozen=True)
class Llm:
    """A text LLM directory, perhaps without weights; ``chat`` is ``None`` without a tokenizer."""

    directory: TextLLMDirectory
    architecture: DecoderConfig
    chat: ChatFormat | None
    whole: bool


def read_llm(plan: Plan, name: str, chat: ChatConfig | None) -> Llm | None:
    """What a text LLM directory says of itself, also if its weights are still to come."""
    path = plan.attempt(resolve, name, "model.pretrained_llm", "llm")
    if path is None:
        return None
    found = open_text_llm(path)
    missing = plan.attempt(found.missing) or []
    for file in missing:
        plan.refuse(f"model.pretrained_llm={name}: {path} lacks {file}")
    architecture = plan.attempt(lambda: found.architecture)
    if architecture is None:
        return None
    weighed = not any(file.endswith(".safetensors") for file in missing)
    if weighed:
        plan.attempt(check_weights, found)
    readable = len(missing) == (0 if weighed else 1)
    return Llm(found, architecture, plan.attempt(found.chat, chat) if readable else None, not missing)


def check_weights(directory: TextLLMDirectory) -> None:
    """Compares the number of stored weights with the architecture's; only the files' headers are read.

    Raises:
        ValueError: if they differ, or a file is damaged.
    """
    weights = directory.weights()
    stored = sum(math.prod(weights.shape(name)) for name in weights.names())
    wanted = parameter_count(directory.architecture)
    if stored != wanted:
        raise ValueError(f"{directory.path} holds {stored} weights, but the LLM of its llm.yaml has {wanted}")


# ---------------------------------------------------------------------------------------------------------------- data


def check_data(plan: Plan, cfg: DictConfig, config: ModelConfig, encoder: EncoderFacts, llm: Llm) -> None:
    """Opens the data as training would, and judges a step by the first batches; no audio is read."""
    sections = {
        name: OmegaConf.to_container(cfg.model.get(name) or OmegaConf.create())
        for name in ("train_ds", "validation_ds")
    }
    for section in sections.values():
        plan.attempt(check_config, section, encoder.shape.sample_rate)
    if cfg.get("data"):
        data = plan.attempt(parse_data_config, cfg.data)
        if data:
            plan.preparation = plan.attempt(describe_preparation, data, config) or []
            plan.notes += unread_sources(sections)
            plan.steps_per_epoch = f"unknown until the corpus of {data.train_utterances} utterances is built"
        return
    loaders = open_data(plan, config, frame_counter(encoder, config), llm, sections)
    if loaders["train_ds"] is None:
        return
    if not isinstance(loaders["train_ds"].sampler, EpochSampler):
        plan.steps_per_epoch = "none: the data are a stream"
        return
    batches = plan.attempt(list, islice(loaders["train_ds"].sampler, SAMPLED_BATCHES))
    if batches:
        frames, bound = frame_counter(encoder, config), config.micro_batch_tokens
        plan.step = measured_step(batches, llm.chat, frames, bound, plan.step.positions)
        plan.steps_per_epoch = steps_of_pass(sections["train_ds"], batches, SAMPLED_BATCHES, plan.replicas)


def open_data(
    plan: Plan, config: ModelConfig, frames: FrameCounter, llm: Llm, sections: Mapping[str, dict]
) -> dict[str, DataLoader | None]:
    """The loaders of the first replica; ``None`` where one is refused."""
    expected = {"chat": llm.chat.fingerprint(), CHAT_FORMAT: llm.chat.description()}
    if llm.whole:
        expected["llm"] = llm.directory.fingerprint
    else:
        plan.notes.append("the LLM's weights are missing: they were not compared with the behaviors' LLM")
    loaders = {}
    for name, section in sections.items():
        training = name == "train_ds"
        longest = llm.architecture.max_sequence_length - (0 if training else config.generation.max_new_tokens)
        loaders[name] = plan.attempt(
            build_dataloader,
            {"max_tokens": longest, **section},
            MTBIDataset(llm.chat, frames, config.micro_batch_tokens, on_bad_audio=config.on_bad_audio),
            world_size=plan.replicas,
            train=training,
            expected=expected,
            allow_foreign=config.targets.allow_foreign,
        )
    return loaders


def frame_counter(encoder: EncoderFacts, config: ModelConfig) -> FrameCounter:
    """That of the model.

    Raises:
        ValueError: if the connector can't reach its frame rate.
    """
    shape = encoder.shape
    return FrameCounter(shape.stages + connector_stages(config.connector, shape.frame_rate), shape.sample_rate)


# ---------------------------------------------------------------------------------------------------------------- plan


def make_plan(
    cfg: DictConfig,
    *checks: Callable[[DictConfig], Any],
    frozen_dtype: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Plan:
    """Finds out what a run with this configuration would do. Nothing that is wrong with it raises.

    Args:
        cfg: the whole configuration; its interpolations are resolved in place.
        *checks: further checks of it, which raise ``ValueError``.
        frozen_dtype: name of torch's dtype of the frozen weights; ``None``: that of the ``model:`` section.
        environ: for the number of processes that torchrun has started.
    """
    plan = Plan()
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        plan.refuse(explain(error, "config"))
        return plan
    for check in checks:
        plan.attempt(check, cfg)
    model, trainer = cfg.get("model") or OmegaConf.create(), cfg.get("trainer") or OmegaConf.create()
    check_layout(plan, model)
    per_node = plan.attempt(check_world, plan, trainer, environ) or 1
    if int(trainer.get("accumulate_grad_batches") or 1) != 1:
        plan.refuse("trainer.accumulate_grad_batches must be 1: raise model.train_ds.batch_tokens for a larger step")
    config = check_model(plan, model)
    llm = read_llm(plan, model.get("pretrained_llm"), config.chat if config else None)
    encoder = plan.attempt(read_encoder, model.get("pretrained_asr"), config.encoder if config else None)
    divides = bool(plan.layout and llm) and check_architecture(plan, llm.architecture)
    if not (config and llm and encoder and plan.attempt(frame_counter, encoder, config)):
        return plan
    plan.micro_batch_tokens = config.micro_batch_tokens
    plan.step = assumed_step(model.get("train_ds") or {}, config.micro_batch_tokens)
    if llm.chat:
        check_data(plan, cfg, config, encoder, llm)
    if divides:
        number = getattr(torch, frozen_dtype or config.frozen_dtype).itemsize
        if any(part.trained for part in encoder.parts):
            plan.notes.append("the encoder trains: what backward keeps of its layers is not counted")
        plan.attempt(count_memory, plan, llm.architecture, encoder, config, number)
    if plan.stages:
        name_ranks(plan, llm.architecture, per_node, str(trainer.get("accelerator", "auto")))
    return plan


def count_memory(plan: Plan, architecture: DecoderConfig, encoder: EncoderFacts, config: ModelConfig, number: int):
    """Fills in the memory of each stage, and what other choices would change."""
    layout, step, bound = plan.layout, plan.step, config.micro_batch_tokens
    positions = max(min(bound, step.positions or bound), step.row)  # a row beyond the bound goes through alone
    asked = step.row + config.generation.max_new_tokens if step.row else architecture.max_sequence_length
    cached = max(config.generation.batch_tokens, asked if step.row else 0)
    plan.load = Load(
        positions=positions,
        microbatches=math.ceil(step.positions / positions) if step.positions else 10**6,
        responses=math.ceil(positions * step.share),
        cached=cached,
        longest=min(asked, cached),
        compared=math.ceil((step.positions or positions) * step.share) if config.loss.uses_teacher else 0,
    )
    optim = config.optim or {}
    name = str(optim.get("name", "adamw"))
    if name not in OPTIMIZER_STATES:
        plan.notes.append(f"model.optim.name={name}: counted with 2 states for each parameter, as Adam has")
    states = OPTIMIZER_STATES.get(name, 2) + bool(name in ("sgd", "rmsprop") and optim.get("momentum"))
    tensor = layout.tensor_model_parallel_size
    speech_side = speech_parts(
        encoder,
        config.connector,
        architecture.hidden_size,
        frames=max(step.frames, 1),
        number=number,
        share=tensor,
        states=states,
    )
    stages = range(layout.pipeline_model_parallel_size)
    adapted, learning = learned_memory(plan, architecture, config)

    def count(layout: ParallelConfig, granularity: str | None) -> list[StageMemory]:
        common = dict(load=plan.load, speech=speech_side, number=number, adapted=adapted, learning=learning)
        return [memory.stage_memory(architecture, layout, n, granularity=granularity, **common) for n in stages]

    granularity = config.activations_checkpoint_granularity
    plan.stages = count(layout, granularity)
    plan.layer = memory.layer_terms(architecture, layout, number, granularity, adapted)
    for split in (False, True) if tensor > 1 else (False,):
        for choice in GRANULARITIES:
            found = count(replace(layout, sequence_parallel=split), choice)
            plan.choices[choice, split] = max(memory.total(stage.activations) for stage in found)


def learned_memory(
    plan: Plan, architecture: DecoderConfig, config: ModelConfig
) -> tuple[memory.Adapted | None, memory.Learning | None]:
    """What adapters, or the LLM where it trains itself, add to the memory.

    Raises:
        ValueError: if the LLM can't learn so.
    """
    if config.lora:
        check_lora(architecture, config.lora, config.activations_checkpoint_granularity)
        return adapted_memory(architecture, config.lora, plan.layout), None
    learning, kept = trained_memory(architecture, config.llm, plan.layout, plan.replicas) or (None, None)
    return kept, learning


def name_ranks(plan: Plan, architecture: DecoderConfig, per_node: int, accelerator: str) -> None:
    """Fills in who holds what, if the processes divide."""
    if plan.world % plan.layout.model_parallel_size:
        return
    devices = device_names(plan.world, per_node, accelerator)
    for place in places(plan.layout, architecture.num_layers, plan.world):
        stage = plan.stages[place.stage]
        plan.ranks.append(RankFacts(place, devices[place.rank], stage.trained, stage.frozen))
