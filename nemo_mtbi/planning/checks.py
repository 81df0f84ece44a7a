# SPDX-License-Identifier: Apache-2.0
"""Checks of a plan's layout, section ``model``, processes and text LLM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.config.model import LAYOUT_KEYS, ModelConfig, parse_model_config
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig, parameter_count
from nemo_mtbi.llm.decoder import check_training
from nemo_mtbi.llm.directory import TextLLMDirectory, open_text_llm
from nemo_mtbi.planning.plan import Plan
from nemo_mtbi.speech_llm.pretrained import resolve


def check_layout(plan: Plan, model: Mapping) -> None:
    """Read the layout into the plan. Keys are checked one by one, so that one mistake does not hide another."""
    given = {key: model[key] for key in LAYOUT_KEYS if model.get(key) is not None}
    if not all(isinstance(value, int) for value in given.values()):
        return  # check_model reports it
    tensor, pipeline, virtual, split = LAYOUT_KEYS
    parts = ((tensor,), (pipeline,), (pipeline, virtual), (tensor, split))
    valid = [plan.attempt(ParallelConfig, **{key: given[key] for key in part if key in given}) for part in parts]
    plan.layout = ParallelConfig(**given) if all(valid) else None


def check_model(plan: Plan, model: Mapping) -> ModelConfig | None:
    """Read the section ``model`` key by key, and return it without the keys that are wrong."""
    needed = {key: model[key] for key in ("pretrained_asr", "pretrained_llm") if key in model}
    good = dict(needed)
    for key, value in model.items():
        # the layout's keys may contradict each other: see check_layout
        layout = key in LAYOUT_KEYS and isinstance(value, (int, type(None)))
        parsed = None if layout else plan.attempt(parse_model_config, {**needed, key: value})
        if parsed is not None:
            good[key] = value
    return plan.attempt(parse_model_config, good)


def check_architecture(plan: Plan, layout: ParallelConfig, config: DecoderConfig) -> bool:
    """Return whether a layout can split an LLM; every size that does not divide is a problem."""
    sizes = {
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "ffn": config.ffn_hidden_size,
    }
    fits = dict.fromkeys(sizes, layout.model_parallel_size * layout.chunks)
    before = len(plan.problems)
    plan.attempt(check_training, config, layout)
    for name, size in sizes.items():
        plan.attempt(layout.check_architecture, **{**fits, name: size})
    return len(plan.problems) == before


def check_world(plan: Plan, trainer: Mapping, environ: Mapping[str, str]) -> int:
    """Read the number of processes into the plan, and return how many of them share a machine.

    Args:
        plan: with its layout.
        trainer: the section ``trainer``.
        environ: variables of torchrun.

    Raises:
        ValueError: if the section holds no numbers.
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
    """Return the device of each process, as far as the configuration says."""
    kind = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}.get(accelerator, "device")
    names = [kind if kind == "cpu" else f"{kind}:{rank % per_node}" for rank in range(world)]
    return names if world <= per_node else [f"node {rank // per_node} {name}" for rank, name in enumerate(names)]


@dataclass(frozen=True)
class Llm:
    """A text LLM directory, perhaps without weights.

    Attributes:
        directory: on disk.
        architecture: of the LLM.
        chat: its chat format; ``None`` without a tokenizer.
        whole: whether no file is missing.
    """

    directory: TextLLMDirectory
    architecture: DecoderConfig
    chat: ChatFormat | None
    whole: bool


def read_llm(plan: Plan, name: str | None, chat: ChatConfig | None) -> Llm | None:
    """Return the facts of a text LLM directory, also if its weights are missing; ``None`` if it can't be read."""
    path = plan.attempt(resolve, str(name), "model.pretrained_llm", "llm")
    if path is None:
        return None
    directory = open_text_llm(path)
    missing = plan.attempt(directory.missing) or []
    for file in missing:
        plan.refuse(f"model.pretrained_llm={name}: {path} lacks {file}")
    architecture = plan.attempt(lambda: directory.architecture)
    if architecture is None:
        return None
    has_weights = not any(file.endswith(".safetensors") for file in missing)
    if has_weights:
        plan.attempt(check_weights, directory)
    readable = len(missing) == (0 if has_weights else 1)
    return Llm(directory, architecture, plan.attempt(directory.chat, chat) if readable else None, not missing)


def check_weights(directory: TextLLMDirectory) -> None:
    """Compare the number of stored weights with the architecture's; only the files' headers are read.

    Raises:
        ValueError: if they differ, or a file is damaged.
    """
    weights = directory.weights()
    stored = sum(math.prod(weights.shape(name)) for name in weights.names())
    wanted = parameter_count(directory.architecture)
    if stored != wanted:
        raise ValueError(f"{directory.path} holds {stored} weights, but the LLM of its llm.yaml has {wanted}")
