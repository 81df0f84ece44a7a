# SPDX-License-Identifier: Apache-2.0
"""Prints a plan, on terminals of any width."""

from __future__ import annotations

import os

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nemo_mtbi.data.step import Step
from nemo_mtbi.io.display import printable
from nemo_mtbi.planning.layout_table import count_text, layout_table, step_text
from nemo_mtbi.planning.memory import StageMemory, Term, total
from nemo_mtbi.planning.plan import Plan

PARTS = ("weights", "training", "activations", "logits", "generation")
SOURCE = "Korthikanti et al. 2022, arXiv 2205.05198"


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan, in the first process if there are several."""
    if int(os.environ.get("RANK", "0")):
        return
    layout = plan.layout
    if layout:
        virtual = f" in {layout.chunks} runs of layers" if layout.chunks > 1 else ""
        shape = f"tensor {layout.tensor_model_parallel_size} x pipeline {layout.pipeline_model_parallel_size}{virtual}"
        processes = "1 process" if plan.world == 1 else f"{plan.world} processes"
        print_line(console, "plan", f"{processes}; a replica of the model is {shape}; no weights were loaded")
    if plan.ranks:
        console.print(layout_table(plan.ranks), highlight=False)
    if plan.stages:
        show_memory(plan, console)
    if plan.step:
        show_step(plan, plan.step, console)
    for line in plan.preparation:
        print_line(console, "before training", line)
    for note in plan.notes:
        print_line(console, "note", note)
    for problem in plan.problems:
        print_line(console, "refused", problem, "bold red")
    if not plan.problems:
        first = "; what stands under 'before training' is made first" if plan.preparation else ""
        print_line(console, "ready", f"nothing of this would be refused{first}")


def print_line(console: Console, title: str, text: str, style: str = "bold") -> None:
    """Print a line with a title in front."""
    console.print(Text.assemble((title, style), " · ", printable(text)))


def size_text(size: float) -> str:
    """Return a number of bytes with a unit."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def show_memory(plan: Plan, console: Console) -> None:
    """Print the memory of one process of each stage, its arithmetic, and that of other choices."""
    unit, name = (2**30, "GiB") if max(stage.peak for stage in plan.stages) >= 2**28 else (2**20, "MiB")
    peak = "peak = weights + training + the larger of (activations + logits) and generation"
    print_line(console, f"memory of one process in {name}", peak)
    console.print(memory_table(plan.stages, unit), highlight=False)
    each = size_text(total(plan.layer))
    print_line(console, "arithmetic", f"for each position, a layer keeps {each} until its backward ({SOURCE}):")
    for term in plan.layer:
        show_term(console, term.name, term)
    for stage in {id(stage): stage for stage in (plan.stages[0], plan.stages[-1])}.values():
        sizes = f"{count_text(stage.frozen)} frozen and {count_text(stage.trained)} trained parameters"
        print_line(console, f"stage {stage.stage}", sizes)
        for part in PARTS:
            for term in getattr(stage, part):
                show_term(console, f"{part}, {term.name}", term)
    print_line(console, "choices", f"activations of the fullest stage in {name}")
    console.print(choices_table(plan, unit), highlight=False)


def memory_table(stages: list[StageMemory], unit: int) -> Table:
    """Return a table of the memory of one process of each stage; equal stages share a line."""
    table = new_table("stage", *PARTS, "peak")
    lines: dict[tuple[str, ...], list[int]] = {}
    for stage in stages:
        sizes = (*(total(getattr(stage, part)) for part in PARTS), stage.peak)
        lines.setdefault(tuple(f"{size / unit:.2f}" for size in sizes), []).append(stage.stage)
    for cells, members in lines.items():
        table.add_row(", ".join(map(str, members)), *cells)
    return table


def choices_table(plan: Plan, unit: int) -> Table:
    """Return a table of activations by recomputation and sequence parallelism."""
    splits = sorted({split for _, split in plan.choices})
    table = new_table("activations_checkpoint_granularity", *(f"sequence_parallel: {str(x).lower()}" for x in splits))
    for choice in dict.fromkeys(choice for choice, _ in plan.choices):
        table.add_row(choice or "null", *(f"{plan.choices[choice, split] / unit:.2f}" for split in splits))
    return table


def new_table(*names: str) -> Table:
    """Return an empty table with columns on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    return table


def show_term(console: Console, name: str, term: Term) -> None:
    """Print the product of a term and its size."""
    console.print(Padding(Text(f"{name}: {term} = {size_text(term.size)}"), (0, 0, 0, 2), expand=False))


def show_step(plan: Plan, step: Step, console: Console) -> None:
    """Print the contents of a step, and the number of steps of an epoch."""
    most = plan.load.positions if plan.load else plan.micro_batch_tokens
    text = step_text(step.positions, plan.replicas, most)
    if step.cuts:
        text += f"; about {step.cuts:.1f} utterances and {step.seconds:.1f} s of speech"
    print_line(console, "step", text)
    print_line(console, "steps per epoch", plan.steps_per_epoch)
