# SPDX-License-Identifier: Apache-2.0
"""Checks of a plan's data, and the size of a step as the first batches have it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.data.behaviors import CHAT_FORMAT
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.data.loader_config import check_config
from nemo_mtbi.data.passes import EpochSampler
from nemo_mtbi.data.step import Step, measured_step, steps_of_pass
from nemo_mtbi.demo.recipe import describe_preparation, parse_data_config, unread_sources
from nemo_mtbi.encoders.base import EncoderShape
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.planning.checks import Llm
from nemo_mtbi.planning.plan import Plan
from nemo_mtbi.speech_llm.connector import frame_counter

SAMPLED_BATCHES = 50  # of which the size of a step is estimated


def section_of(cfg: DictConfig, name: str) -> dict[str, Any]:
    """Return a section as plain values; empty if it is not there."""
    values: Any = OmegaConf.to_container(cfg.get(name) or OmegaConf.create())
    return values


def check_data(
    plan: Plan, cfg: DictConfig, config: ModelConfig, shape: EncoderShape, llm: Llm, chat: ChatFormat, step: Step
) -> None:
    """Open the data as training would, and estimate a step from the first batches; no audio is read.

    Args:
        plan: gets preparation, step and steps per epoch.
        cfg: the whole configuration.
        config: its section ``model``.
        shape: of the encoder.
        llm: the text LLM.
        chat: its chat format.
        step: as the configuration bounds it.
    """
    sections = {name: section_of(cfg.model, name) for name in ("train_ds", "validation_ds")}
    for section in sections.values():
        plan.attempt(check_config, section, shape.sample_rate)
    if cfg.get("data"):
        data = plan.attempt(parse_data_config, cfg.data)
        if data:
            plan.preparation = plan.attempt(describe_preparation, data, config) or []
            plan.notes += unread_sources(sections)
            plan.steps_per_epoch = f"unknown until the corpus of {data.train_utterances} utterances is built"
        return
    frames = frame_counter(shape, config.connector)
    loader = open_data(plan, config, frames, llm, chat, sections)["train_ds"]
    if loader is None:
        return
    sampler = loader.sampler
    if not isinstance(sampler, EpochSampler):
        plan.steps_per_epoch = "none: the data are a stream"
        return
    batches = plan.attempt(lambda: list(islice(sampler, SAMPLED_BATCHES)))
    if batches:
        plan.step = measured_step(batches, chat, frames, config.micro_batch_tokens, step.positions)
        plan.steps_per_epoch = steps_of_pass(sections["train_ds"], batches, SAMPLED_BATCHES, plan.replicas)


def open_data(
    plan: Plan,
    config: ModelConfig,
    frames: FrameCounter,
    llm: Llm,
    chat: ChatFormat,
    sections: Mapping[str, dict[str, Any]],
) -> dict[str, DataLoader | None]:
    """Return the loaders of the first replica by the names of their sections; ``None`` where one is refused."""
    expected: dict[str, Any] = {"chat": chat.fingerprint(), CHAT_FORMAT: chat.description()}
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
            MTBIDataset(chat, frames, config.micro_batch_tokens, on_bad_audio=config.on_bad_audio),
            world_size=plan.replicas,
            train=training,
            expected=expected,
            allow_foreign=config.targets.allow_foreign,
        )
    return loaders
