# SPDX-License-Identifier: Apache-2.0
"""Makes the plan of a run from its configuration, without weights, process groups or CUDA."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.config.schema import explain_config_error
from nemo_mtbi.data.step import Step, assumed_step
from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.llm.lora import check_lora
from nemo_mtbi.parallel.rank_layout import rank_places
from nemo_mtbi.planning import memory
from nemo_mtbi.planning.checks import (
    check_architecture,
    check_layout,
    check_model,
    check_world,
    device_names,
    read_llm,
)
from nemo_mtbi.planning.data_checks import check_data
from nemo_mtbi.planning.footprint import EncoderFacts, read_encoder_settings, speech_parts
from nemo_mtbi.planning.layout_table import RankFacts
from nemo_mtbi.planning.memory import Load, StageMemory
from nemo_mtbi.planning.plan import Plan
from nemo_mtbi.planning.trained import adapted_memory, trained_memory
from nemo_mtbi.speech_llm.connector import frame_counter

GRANULARITIES = (None, "selective", "full")
OPTIMIZER_STATES = {"sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "adam": 2, "adamw": 2, "adamax": 2, "nadam": 2}


def make_plan(
    cfg: DictConfig,
    *checks: Callable[[DictConfig], Any],
    frozen_dtype: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Plan:
    """Plan a run without weights, process groups or CUDA. Errors of the configuration become problems of the plan.

    Args:
        cfg: the whole configuration; its interpolations are resolved in place.
        *checks: further checks of it, which raise ``ValueError``.
        frozen_dtype: name of torch's dtype of the frozen weights; ``None``: that of the ``model:`` section.
        environ: variables of the environment, for the number of processes that torchrun has started.
    """
    plan = Plan()
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        plan.refuse(explain_config_error(error, "config"))
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
    encoder = plan.attempt(read_encoder_settings, str(model.get("pretrained_asr")), config.encoder if config else None)
    layout = plan.layout
    divides = layout is not None and llm is not None and check_architecture(plan, layout, llm.architecture)
    if not (config and llm and encoder and plan.attempt(frame_counter, encoder.shape, config.connector)):
        return plan
    plan.micro_batch_tokens = config.micro_batch_tokens
    plan.step = step = assumed_step(model.get("train_ds") or {}, config.micro_batch_tokens)
    if llm.chat:
        check_data(plan, cfg, config, encoder.shape, llm, llm.chat, step)
    if layout and divides:
        bytes_per_param = getattr(torch, frozen_dtype or config.frozen_dtype).itemsize
        if any(part.trained for part in encoder.parts):
            plan.notes.append("the encoder trains: what backward keeps of its layers is not counted")
        plan.attempt(count_memory, plan, layout, plan.step, llm.architecture, encoder, config, bytes_per_param)
        if plan.stages:
            name_ranks(plan, layout, llm.architecture, per_node, str(trainer.get("accelerator", "auto")))
    return plan


def load_of(step: Step, config: ModelConfig, architecture: DecoderConfig) -> Load:
    """Return the sizes of what goes through the model in a step and in generation."""
    bound = config.micro_batch_tokens
    positions = max(min(bound, step.positions or bound), step.row)  # a row beyond the bound goes through alone
    longest = step.row + config.generation.max_new_tokens if step.row else architecture.max_sequence_length
    cached = max(config.generation.batch_tokens, longest if step.row else 0)
    return Load(
        positions=positions,
        microbatches=math.ceil(step.positions / positions) if step.positions else 10**6,
        responses=math.ceil(positions * step.share),
        cached=cached,
        longest=min(longest, cached),
        compared=math.ceil((step.positions or positions) * step.share) if config.loss.uses_teacher else 0,
    )


def optimizer_states(plan: Plan, config: ModelConfig) -> int:
    """Return how many numbers the connector's optimizer keeps for each parameter; an unknown one is noted."""
    optim = config.optim or {}
    name = str(optim.get("name", "adamw"))
    if name not in OPTIMIZER_STATES:
        plan.notes.append(f"model.optim.name={name}: counted with 2 states for each parameter, as Adam has")
    return OPTIMIZER_STATES.get(name, 2) + bool(name in ("sgd", "rmsprop") and optim.get("momentum"))


def count_memory(
    plan: Plan,
    layout: ParallelConfig,
    step: Step,
    architecture: DecoderConfig,
    encoder: EncoderFacts,
    config: ModelConfig,
    bytes_per_param: int,
) -> None:
    """Put the memory of each stage into the plan, and the activations of other choices.

    Args:
        plan: to be filled.
        layout: that can split the LLM.
        step: contents of a step.
        architecture: of the LLM.
        encoder: facts about it.
        config: the section ``model``.
        bytes_per_param: bytes of a frozen parameter.

    Raises:
        ValueError: if the LLM can't train as ``config`` wants.
    """
    plan.load = load = load_of(step, config, architecture)
    tensor = layout.tensor_model_parallel_size
    speech_side = speech_parts(
        encoder,
        config.connector,
        architecture.hidden_size,
        frames=max(step.frames, 1),
        bytes_per_param=bytes_per_param,
        share=tensor,
        states=optimizer_states(plan, config),
    )
    stages = range(layout.pipeline_model_parallel_size)
    adapted, learning = trained_parts(plan, layout, architecture, config)

    def count(layout: ParallelConfig, granularity: str | None) -> list[StageMemory]:
        return [
            memory.stage_memory(
                architecture,
                layout,
                stage,
                load=load,
                speech=speech_side,
                bytes_per_param=bytes_per_param,
                granularity=granularity,
                adapted=adapted,
                learning=learning,
            )
            for stage in stages
        ]

    granularity = config.activations_checkpoint_granularity
    plan.stages = count(layout, granularity)
    plan.layer = memory.layer_terms(architecture, layout, bytes_per_param, granularity, adapted)
    for split in (False, True) if tensor > 1 else (False,):
        for choice in GRANULARITIES:
            counted = count(replace(layout, sequence_parallel=split), choice)
            plan.choices[choice, split] = max(memory.total(stage.activations) for stage in counted)


def trained_parts(
    plan: Plan, layout: ParallelConfig, architecture: DecoderConfig, config: ModelConfig
) -> tuple[memory.Adapted | None, memory.Learning | None]:
    """Return the memory that adapters add, and weights of the LLM that train.

    Raises:
        ValueError: if the LLM can't train as ``config`` wants.
    """
    if config.lora:
        check_lora(architecture, config.lora, config.activations_checkpoint_granularity)
        return adapted_memory(architecture, config.lora, layout), None
    learning, kept = trained_memory(architecture, config.llm, layout, plan.replicas) or (None, None)
    return kept, learning


def name_ranks(
    plan: Plan, layout: ParallelConfig, architecture: DecoderConfig, per_node: int, accelerator: str
) -> None:
    """Put what each process holds into the plan, if the number of processes is a multiple of a replica's."""
    if plan.world % layout.model_parallel_size:
        return
    devices = device_names(plan.world, per_node, accelerator)
    for place in rank_places(layout, architecture.num_layers, plan.world):
        stage = plan.stages[place.stage]
        plan.ranks.append(RankFacts(place, devices[place.rank], stage.trained, stage.frozen))
