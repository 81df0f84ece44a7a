# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what the LLM does with speech against what it does with text.

Every figure is a mean over rows (micro average; one row is one utterance under one prompt), so a task counts by how
often it was asked. The figures of each single task stand beside.
"""

import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.io.display import printable
from nemo_mtbi.metrics.behavior import agreement, behavior_gap, text_f1
from nemo_mtbi.metrics.corpus import ERROR_KINDS, SCORERS, cer, exact, normalize, right, task_scores, wer

GROUPS = {
    "seen": "seen prompts",
    "heldout_wordings": "held-out wordings",
    "heldout_tasks": "held-out tasks",
}
TRAIN_KEYS = ("seconds", "steps", "peak_rss_gib")
_RESERVED = ("seed", "train", "transcription", "behavior", "tasks", "nemo")
_MISSING = "-"
_CLIP = 300  # characters of one text in an example
_DEFAULT_WIDTH = 100


@dataclass(frozen=True)
class Answer:
    """One utterance under one prompt, answered by the LLM from its text and from its speech.

    Attributes:
        cut_id: Id of the utterance.
        task: Name of the task.
        prompt: The wording of the task that was used; may be empty.
        group: "seen", "heldout_wordings" or "heldout_tasks".
        scoring: The task's kind of scoring, a key of ``metrics.SCORERS``.
        transcript: What was said.
        reference: The right answer, or None where none is known.
        text: The LLM's answer to the transcript.
        speech: The LLM's answer to the speech.

    Raises:
        ValueError: the group or the kind of scoring is unknown.
    """

    cut_id: str
    task: str
    prompt: str
    group: str
    scoring: str
    transcript: str
    reference: str | None
    text: str
    speech: str

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"unknown group {self.group!r} of task {self.task!r}: use one of {', '.join(GROUPS)}")
        if self.scoring not in SCORERS:
            raise ValueError(
                f"unknown scoring kind {self.scoring!r} of task {self.task!r}: use one of {', '.join(sorted(SCORERS))}"
            )

    @property
    def agrees(self) -> bool:
        """Whether both answers are equal after folding whitespace."""
        return exact(self.text, self.speech) == 1.0


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the figures of a run.

    ``transcription``: ``wer`` of the speech answers of the transcription task (scored by WER or CER, seen wordings)
    against the transcript, and ``n`` utterances; ``wer`` is None if there are none. ``cer`` is there too if a task is
    scored by it. ``behavior``: for each group ``text`` and
    ``speech`` (share of right answers, score exactly 1, among the ``n_scored`` rows with a reference), ``text_score``
    and ``speech_score`` (mean scores of the same rows), ``ratio`` (``speech / text``), ``agreement`` (share of rows
    whose two answers are equal), ``token_f1`` (mean, of the speech answer against the text answer) and ``n``.
    A figure without a row behind it is None. ``tasks``: the same over all rows of a task, with ``scoring``,
    ``heldout`` and the figures of each of its ``groups``.

    Raises:
        ValueError: there is no answer, a task has two kinds of scoring or is both trained and held out, or a
            reference breaks the format of its kind of scoring.
    """
    if not answers:
        raise ValueError("no answers to report: the validation set gave no rows; check its manifest and task pool")
    by_task: dict[str, list[Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, []).append(answer)
    return {
        "transcription": _transcription(answers),
        "behavior": {group: _figures([a for a in answers if a.group == group]) for group in GROUPS},
        "tasks": {task: _task_figures(task, rows) for task, rows in sorted(by_task.items())},
    }


def write_results(
    path: str | os.PathLike[str],
    *,
    summary: Mapping[str, Any],
    seed: int,
    train: Mapping[str, float],
    nemo_path: str | os.PathLike[str] | None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``results.json`` in one step (never half a file): sorted keys, numbers rounded to 6 digits.

    Args:
        path: The file; its folder is made if it is missing.
        summary: What :func:`summarize` returned.
        seed: Seed of the run.
        train: ``seconds`` (wall clock), ``steps`` and ``peak_rss_gib`` of the training; more keys are kept.
        nemo_path: The saved model, or None if none was saved.
        extra: More keys for the top level.

    Raises:
        ValueError: ``train`` lacks a key, ``extra`` would overwrite one, or a number is NaN or infinite.
    """
    missing = [key for key in TRAIN_KEYS if key not in train]
    if missing:
        raise ValueError(f"train lacks {', '.join(missing)}: results.json needs {', '.join(TRAIN_KEYS)}")
    clash = sorted(set(extra or {}) & set(_RESERVED))
    if clash:
        raise ValueError(f"extra may not hold {', '.join(clash)}: these keys belong to the report; rename them")
    results = {
        **(extra or {}),
        "seed": seed,
        "train": dict(train),
        "transcription": summary["transcription"],
        "behavior": summary["behavior"],
        "tasks": summary["tasks"],
        "nemo": None if nemo_path is None else os.fspath(nemo_path),
    }
    return write_json(path, results)


def render(
    summary: Mapping[str, Any], answers: Sequence[Answer], console: Console | None = None, examples: int = 6
) -> None:
    """Print the report: speech against text by group, by task, and some examples side by side.

    Args:
        summary: What :func:`summarize` returned.
        answers: The rows to draw examples from.
        console: Where to print; by default the standard output, 100 columns wide where it is no terminal.
        examples: How many examples, see :func:`pick_examples`.
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
    picked = pick_examples(answers, examples)
    if picked:
        console.print()
        console.print(_example_table(picked, answers))


def pick_examples(answers: Sequence[Answer], k: int) -> list[Answer]:
    """Return up to k rows to show: half of them disagreements where there are that many, then agreements.

    Groups, tasks and utterances are spread as far as possible; the choice depends on the rows, not on their order.
    """
    ordered = sorted(answers, key=_random_key)
    differing = [a for a in ordered if not a.agrees]
    equal = [a for a in ordered if a.agrees]
    wanted = min(len(differing), max(k // 2, k - len(equal)))
    picked = _spread(equal, k - wanted, [])
    return _spread(differing, wanted, picked) + picked


def examples_markdown(answers: Sequence[Answer], k: int = 6) -> str:
    """Return k examples (see :func:`pick_examples`) as a Markdown table, as TensorBoard's text tab shows it."""
    lines = ["| transcript | prompt | answer to text | answer to speech | same |", "|---|---|---|---|---|"]
    for a in pick_examples(answers, k):
        cells = [_markdown(shown(text)) for text in (a.transcript, a.prompt, a.text, a.speech)]
        lines.append(f"| {' | '.join(cells)} | {'yes' if a.agrees else '**no**'} |")
    return "\n".join(lines) + "\n"


def _transcription(answers: Sequence[Answer]) -> dict[str, Any]:
    # A task scored by an error rate against something else than the transcript, such as a translation, is none.
    rows = [
        a
        for a in answers
        if a.scoring in ERROR_KINDS
        and a.group == "seen"
        and (a.reference is None or normalize(a.reference) == normalize(a.transcript))
    ]
    said, written = [a.transcript for a in rows], [a.speech for a in rows]
    found = {"wer": wer(said, written) if rows else None, "n": len(rows)}
    return {**found, "cer": cer(said, written)} if any(a.scoring == "cer" for a in rows) else found


def _figures(rows: Sequence[Answer]) -> dict[str, Any]:
    scored = [(a.scoring, a.reference, a) for a in rows if a.reference is not None]
    found = dict.fromkeys(("text", "speech", "ratio", "text_score", "speech_score", "agreement", "token_f1"))
    if scored:
        kinds, references, answers = zip(*scored, strict=True)
        text, speech = (task_scores(kinds, references, given) for given in _answers(answers))
        found |= {"text": right(text).value, "speech": right(speech).value}
        found |= {"text_score": text.value, "speech_score": speech.value}
        found["ratio"] = behavior_gap(right(text), right(speech)).value
    if rows:
        found |= {"agreement": agreement(*_answers(rows)).value, "token_f1": text_f1(*_answers(rows)).value}
    return {**found, "n": len(rows), "n_scored": len(scored)}


def _answers(rows: Sequence[Answer]) -> tuple[list[str], list[str]]:
    return [a.text for a in rows], [a.speech for a in rows]


def _task_figures(task: str, rows: Sequence[Answer]) -> dict[str, Any]:
    kinds = sorted({a.scoring for a in rows})
    if len(kinds) > 1:
        raise ValueError(f"task {task!r} is scored by {' and '.join(kinds)}: give each task one kind of scoring")
    groups = {a.group for a in rows}
    if "heldout_tasks" in groups and len(groups) > 1:
        raise ValueError(f"task {task!r} is both trained and held out: give the two different names")
    return {
        "scoring": kinds[0],
        "heldout": "heldout_tasks" in groups,
        **_figures(rows),
        "groups": {group: _figures([a for a in rows if a.group == group]) for group in GROUPS if group in groups},
    }


def _random_key(answer: Answer) -> str:
    parts = (answer.cut_id, answer.task, answer.prompt, answer.group, answer.text, answer.speech)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _spread(candidates: Sequence[Answer], k: int, shown: Sequence[Answer]) -> list[Answer]:
    """Return k candidates, each the one whose group, task and utterance were shown least often so far."""
    left, picked = list(candidates), []
    for _ in range(min(k, len(left))):
        before = [*shown, *picked]
        best = min(
            range(len(left)),
            key=lambda i: (
                sum(a.group == left[i].group for a in before),
                sum(a.task == left[i].task for a in before),
                sum(a.cut_id == left[i].cut_id for a in before),
                i,
            ),
        )
        picked.append(left.pop(best))
    return picked


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


def _example_table(picked: Sequence[Answer], answers: Sequence[Answer]) -> Table:
    differing = sum(not a.agrees for a in answers)
    table = _table(
        f"Examples (the two answers differ in {differing} of all {len(answers)} rows)",
        box=box.ROUNDED,
        show_lines=True,
        expand=True,
    )
    table.add_column("question", ratio=4, overflow="fold")
    table.add_column("answer to text", ratio=3, overflow="fold")
    table.add_column("answer to speech", ratio=3, overflow="fold")
    for a in picked:
        question = Text.assemble(
            ("said:  ", "dim"),
            (shown(a.transcript), "italic"),
            ("\nasked: ", "dim"),
            (shown(a.prompt), "bold"),
            (f"\n({printable(a.task)}, {GROUPS[a.group]})", "dim"),
        )
        mark = ("= ", "green") if a.agrees else ("≠ ", "bold red")
        table.add_row(question, Text(shown(a.text)), Text.assemble(mark, shown(a.speech)))
    return table


def shown(text: str) -> str:
    """Return the text as an example shows it: no control characters (a model may write any), cut where it is long."""
    text = "".join("�" if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() else c for c in text)
    text = printable("\n".join(line.strip() for line in text.strip().splitlines()))
    if len(text) > _CLIP:
        text = text[:_CLIP].rstrip() + " [...]"
    return text or "(empty)"


def _markdown(text: str) -> str:
    # Character references stay text in every Markdown dialect, also where a backslash would not help (tables).
    escaped = "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>&|#~$" else c for c in text)
    return escaped.replace("\n", "<br>")
