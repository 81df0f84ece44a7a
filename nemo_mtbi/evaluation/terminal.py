# SPDX-License-Identifier: Apache-2.0
"""The summary of a benchmark in the terminal: speech against text by group and by task, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_mtbi.evaluation.examples import Example, displayed, pick_examples
from nemo_mtbi.evaluation.questions import GROUPS
from nemo_mtbi.io.display import printable

_MISSING = "-"
_DEFAULT_WIDTH = 100


def print_summary(
    summary: Mapping[str, Any], examples: Sequence[Example], console: Console | None = None, shown: int = 6
) -> None:
    """Print the figures of a benchmark and some examples side by side.

    Args:
        summary: What ``summary.summary`` returned, or the results that hold it.
        examples: All questions with their answers.
        console: Where to print; by default the standard output, 100 columns wide where it is no terminal.
        shown: How many examples, see :func:`~nemo_mtbi.evaluation.examples.pick_examples`.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_DEFAULT_WIDTH)
    console.print()
    console.print(_behavior_table(summary["behavior"]))
    transcription = summary["transcription"]
    if transcription["n"]:
        rates = [f"{key.upper()} {_percent(transcription[key])}" for key in ("cer", "wer") if key in transcription]
        console.print(f"  transcription of speech: {', '.join(rates)}, {transcription['n']} utterances")
    console.print()
    console.print(_task_table(summary["tasks"]))
    picked = pick_examples(examples, shown)
    if picked:
        console.print()
        console.print(_example_table(picked, examples))


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f}%"


def _ratio(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _graded(value: float | None) -> Text:
    """Return a share as text, colored where the terminal has colors: weak ones are to be seen at a glance."""
    if value is None:
        return Text(_MISSING, style="dim")
    return Text(_percent(value), style="green" if value >= 0.9 else "yellow" if value >= 0.7 else "red")


def _table(title: str, **options: Any) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold", **options)


def _behavior_table(behavior: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(
        "What the LLM does with speech against what it does with text",
        box=box.ROUNDED,
        caption="text, speech: right answers. ratio: speech / text. agreement: both answers equal.",
        caption_justify="left",
    )
    table.add_column("prompts", min_width=18)
    for name in ("text", "speech", "ratio", "agreement", "token F1", "n"):
        table.add_column(name, justify="right", min_width=8)
    for group, title in GROUPS.items():
        f = behavior[group]
        table.add_row(
            title,
            _percent(f["text"]),
            _graded(f["speech"]),
            _ratio(f["ratio"]),
            _graded(f["agreement"]),
            _percent(f["token_f1"]),
            str(f["n"]),
        )
    return table


def _task_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("By task", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", min_width=18, overflow="fold")
    table.add_column("scored by")
    for name in ("text", "speech", "ratio", "agreement", "n"):
        table.add_column(name, justify="right", min_width=7)
    for heldout in (False, True):
        rows = [(name, f) for name, f in tasks.items() if f["heldout"] is heldout]
        if not rows:
            continue
        table.add_section()
        table.add_row(Text("held-out tasks" if heldout else "trained tasks", style="italic dim"))
        for name, f in rows:
            table.add_row(
                Text("  " + printable(name)),
                f["scoring"],
                _percent(f["text"]),
                _graded(f["speech"]),
                _ratio(f["ratio"]),
                _graded(f["agreement"]),
                str(f["n"]),
            )
    return table


def _example_table(picked: Sequence[Example], examples: Sequence[Example]) -> Table:
    differing = sum(not example.agrees for example in examples)
    table = _table(
        f"Examples (the two answers differ in {differing} of all {len(examples)} rows)",
        box=box.ROUNDED,
        show_lines=True,
        expand=True,
    )
    table.add_column("question", ratio=4, overflow="fold")
    table.add_column("answer to text", ratio=3, overflow="fold")
    table.add_column("answer to speech", ratio=3, overflow="fold")
    for example in picked:
        question = Text.assemble(
            ("said:  ", "dim"),
            (displayed(example.clip.transcript or ""), "italic"),
            ("\nasked: ", "dim"),
            (displayed(example.prompt), "bold"),
            (f"\n({printable(example.task)}, {GROUPS[example.group]})", "dim"),
        )
        mark = ("= ", "green") if example.agrees else ("≠ ", "bold red")
        table.add_row(question, Text(displayed(example.text)), Text.assemble(mark, displayed(example.speech)))
    return table
