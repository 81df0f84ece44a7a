# SPDX-License-Identifier: Apache-2.0
"""A table of processes with their layers and parameters, for a plan or a run that has started."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.rank_layout import RankPlace
from nemo_mtbi.speech_llm.model import SpeechLLM

MOST_ROWS = 32  # of the table; more processes are shown stage by stage


@dataclass(frozen=True)
class RankFacts:
    """Layers and parameters of one process.

    Attributes:
        place: its ranks and layers.
        device: its host and device.
        trained: number of trained parameters.
        frozen: number of frozen parameters.
    """

    place: RankPlace
    device: str
    trained: int
    frozen: int


def own_facts(model: SpeechLLM) -> RankFacts:
    """Return the facts of this process."""
    blocks: list[Any] = [chunk.decoder for chunk in model.chunks]
    runs = tuple(tuple(layer.layer_number - 1 for layer in block.layers) for block in blocks)
    rank = groups.control_group("world").rank()
    data, tensor, stage = groups.data_parallel_rank(), groups.tensor_parallel_rank(), groups.pipeline_parallel_rank()
    device = str(model.device)
    if model.device.type == "cuda":
        device += f" {torch.cuda.get_device_name(model.device)}"
    count = {False: 0, True: 0}
    for value in model.parameters():
        count[value.requires_grad] += value.numel()
    return RankFacts(
        RankPlace(rank, data, tensor, stage, runs), f"{socket.gethostname()} {device}", count[True], count[False]
    )


def layout_table(facts: Sequence[RankFacts]) -> Table | Text:
    """Return a table of ranks, layers, devices and parameters; one line for a single process.

    The processes of a stage share a line where there are more than :data:`MOST_ROWS`: they hold equally much.
    """
    if len(facts) == 1:
        (fact,) = facts
        sizes = f"{count_text(fact.trained)} trained and {count_text(fact.frozen)} frozen parameters"
        return Text(f"one process: layers {_runs(fact.place.runs)} on {fact.device}, {sizes}")
    shared = [[fact] for fact in facts]
    if len(facts) > MOST_ROWS:
        stages = sorted({fact.place.stage for fact in facts})
        shared = [[fact for fact in facts if fact.place.stage == stage] for stage in stages]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("rank", "data", "tensor", "stage", "layers", "device", "trained", "frozen"):
        table.add_column(name, justify="left" if name == "device" else "right", overflow="fold")
    for members in shared:
        spans = [_span([getattr(f.place, name) for f in members]) for name in ("rank", "data", "tensor", "stage")]
        devices = list(dict.fromkeys(fact.device for fact in members))
        device = devices[0] if len(devices) == 1 else f"{devices[0]} … {devices[-1]}"
        counts = (count_text(members[0].trained), count_text(members[0].frozen))
        table.add_row(*spans, _runs(members[0].place.runs), device, *counts)
    return table


def step_text(positions: int | None, replicas: int, micro_batch_tokens: int) -> str:
    """Return the size of a step and its microbatches as text, in decoder positions; ``None``: no bound is set."""
    where = "1 replica" if replicas == 1 else f"each of {replicas} replicas"
    size = "any number of" if positions is None else f"at most {positions}"
    return f"{size} positions on {where}, in microbatches of at most {micro_batch_tokens}"


def show_start(model: SpeechLLM, console: Console, batch_tokens: int | None, micro_batch_tokens: int) -> None:
    """Print :func:`layout_table` and :func:`step_text` of the real run on the first process.

    All processes must call it.
    """
    facts = groups.gather_objects(own_facts(model))
    if groups.control_group("world").rank() == 0:
        console.print(layout_table(facts), highlight=False)
        step = step_text(batch_tokens, groups.data_parallel_size(), micro_batch_tokens)
        console.print(f"a step: {step}", highlight=False)


def count_text(number: int) -> str:
    """Return a number of parameters as short text."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _runs(runs: Sequence[Sequence[int]]) -> str:
    return ", ".join(_span(run) for run in runs if len(run)) or "none"
