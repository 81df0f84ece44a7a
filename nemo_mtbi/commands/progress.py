# SPDX-License-Identifier: Apache-2.0
"""Throughput and memory of a training run: measured, logged, and shown while it trains."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from nemo_mtbi.io.display import printable
from nemo_mtbi.layouts.layout import StepBatch
from nemo_mtbi.parallel import groups

GIB = 2**30
REFRESH_SECONDS = 0.5  # of the bar in a terminal
HIDDEN = ("val_", "train_step_timing")  # metrics with a line of their own, and NeMo's timer, which ours replaces

# ---------------------------------------------------------------------------------------------------------- throughput


@dataclass(frozen=True)
class Report:
    """Counts of one process since its last report.

    Attributes:
        steps: batches.
        seconds: time for them, with the wait for data and without validation.
        speech: seconds of speech in them.
        positions: of the decoder that hold a token or a speech frame.
        padded: rows x longest row of all microbatches.
        memory: peak bytes of this process since it started: on its GPU, else in main memory.
        elapsed: seconds since training started, with validation.
        time_left: seconds until a time limit ends the run; infinite without one.
    """

    steps: int
    seconds: float
    speech: float
    positions: int
    padded: int
    memory: int
    elapsed: float
    time_left: float = math.inf


class Meter:
    """Counters of one process. Tensors are summed on their device, and read when a report is due.

    Args:
        sample_rate: of the audio, in hertz.
        clock: seconds from any origin.
    """

    def __init__(self, sample_rate: int, clock: Callable[[], float] = time.monotonic):
        self.sample_rate = sample_rate
        self.clock = clock
        self._begun = self._last = clock()
        self._reset()

    def _reset(self) -> None:
        self._steps, self._padded = 0, 0
        self._samples: Any = 0
        self._positions: Any = 0

    def add(self, batch: StepBatch) -> None:
        """Count a batch."""
        self._steps += 1
        self._samples = self._samples + batch.audio_lengths.sum()
        for microbatch in batch.microbatches:
            self._positions = self._positions + microbatch.lengths.sum()
            self._padded += microbatch.layout.numel()

    def skip(self, seconds: float) -> None:
        """Exclude time that was not spent on training from the next report."""
        self._last += seconds

    def report(self, memory: int, time_left: float = math.inf) -> Report:
        """Return the counts since the last report; counting starts anew."""
        now = self.clock()
        speech, positions = int(self._samples) / self.sample_rate, int(self._positions)
        report = Report(
            self._steps, now - self._last, speech, positions, self._padded, memory, now - self._begun, time_left
        )
        self._last = now
        self._reset()
        return report


def summarize(reports: Sequence[Report], replica: int) -> dict[str, float]:
    """Return the figures of the whole run, a pure function of the reports.

    Args:
        reports: of all processes, for the same steps.
        replica: processes of one model replica, which all count the same batch.

    Returns:
        Figures by name, in seconds and GiB; without ``speed/fill_ratio`` if no microbatch was read.
    """
    steps, seconds = max(report.steps for report in reports), max(report.seconds for report in reports)
    seconds = max(seconds, 1e-9)
    positions, padded = (sum(getattr(report, name) for report in reports) for name in ("positions", "padded"))
    values = {
        "speed/step_seconds": seconds / max(steps, 1),
        "speed/speech_seconds_per_second": sum(report.speech for report in reports) / replica / seconds,
        "speed/tokens_per_second": positions / replica / seconds,
        "memory/peak_gib": max(report.memory for report in reports) / GIB,
    }
    if padded:
        values["speed/fill_ratio"] = positions / padded
    return values


def time_to_end(reports: Sequence[Report], done: int, left: int | None) -> float | None:
    """Return the seconds until a step limit or a time limit ends the run, whichever is first; ``None`` without either.

    Args:
        reports: of all processes.
        done: steps of this run, which took the time that has elapsed; validation is part of it.
        left: steps until the limit.
    """
    limits = [min(report.time_left for report in reports)]
    if left is not None and done:
        limits.append(max(report.elapsed for report in reports) / done * max(left, 0))
    soonest = max(min(limits), 0.0)
    return None if math.isinf(soonest) else soonest


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process: on its GPU, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_limit(trainer: Trainer) -> int | None:
    """Return the step at which the run ends; ``None`` if steps do not limit it."""
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if (trainer.max_epochs or -1) >= 0 and math.isfinite(trainer.num_training_batches):
        limits.append(trainer.max_epochs * int(trainer.num_training_batches))
    return min(limits, default=None)


class Throughput(Callback):
    """Measures the run and logs :func:`summarize` every ``trainer.log_every_n_steps``, the same on all processes.

    Processes exchange reports over the control group when it logs, and in no other step.

    Attributes:
        values: of the last report.
        reports: of all processes, by rank.
        eta: seconds until the end, or ``None``.
        count: of reports.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.values: dict[str, float] = {}
        self.reports: list[Report] = []
        self.eta: float | None = None
        self.count = 0
        self._meter: Meter | None = None
        self._first = self._reported = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._meter = Meter(pl_module.speech_llm.frame_counter.sample_rate, self.clock)
        self._first = self._reported = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        """Count a batch, and report where a step is to be logged."""
        self._running.add(batch)
        step = trainer.global_step  # that of the batch before, if this one was left out
        if step % trainer.log_every_n_steps == 0 and step != self._reported:
            self._reported = step
            self._report(trainer, pl_module)
            pl_module.log_dict(self.values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report once more."""
        self._report(trainer, pl_module)  # the rest, and the memory of the last validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting time."""
        self._paused = self.clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count time again."""
        if self._meter is not None:
            self._meter.skip(self.clock() - self._paused)

    @property
    def _running(self) -> Meter:
        if self._meter is None:
            raise RuntimeError("no training has started: add the callback to a trainer and call fit")
        return self._meter

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        timers = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]
        time_left = min((seconds for seconds in timers if seconds is not None), default=math.inf)
        report = self._running.report(peak_memory(pl_module.device), time_left)
        self.reports = groups.gather_objects(report)
        if report.steps:
            self.values = summarize(self.reports, groups.layout().model_parallel_size)
        limit = step_limit(trainer)
        done, left = trainer.global_step - self._first, None if limit is None else limit - trainer.global_step
        self.eta = time_to_end(self.reports, done, left)
        self.count += 1


# ------------------------------------------------------------------------------------------------------------- the bar


def duration(seconds: float) -> str:
    """Return seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def speed_text(values: Mapping[str, float]) -> list[str]:
    """Return the figures of :func:`summarize` as text with units."""
    if not values:
        return []
    parts = [
        f"{values['speed/step_seconds']:.3g} s/step",
        f"{values['speed/speech_seconds_per_second']:.3g} s of speech/s",
        f"{values['speed/tokens_per_second']:.0f} tokens/s",
    ]
    if "speed/fill_ratio" in values:
        parts.append(f"{values['speed/fill_ratio']:.0%} filled")
    return parts


def memory_text(reports: Sequence[Report]) -> list[str]:
    """Return the peak memory of the first process, and of the process with the largest."""
    if not reports:
        return []
    peaks = [report.memory / GIB for report in reports]
    most = max(range(len(peaks)), key=peaks.__getitem__)
    return [f"{peaks[0]:.2f} GiB" + (f" (rank {most}: {peaks[most]:.2f})" if most else "")]


class RunBar(ProgressBar):
    """Lightning's progress bar for a run that counts steps: a bar in a terminal, else a line for each report.

    Args:
        throughput: must stand before this callback.
        console: ``None``: standard output.
        clock: seconds from any origin.
    """

    def __init__(
        self, throughput: Throughput, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ):
        super().__init__()
        self.throughput = throughput
        self.console = console or Console()
        self.clock = clock
        self._enabled = True
        self._live: Live | None = None
        self._drawn = -math.inf
        self._shown = 0

    def enable(self) -> None:
        """Show lines and bar, as Lightning wishes on the first process."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, as Lightning wishes on all other processes."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar."""
        if self._enabled:
            shown = [printable(part) if isinstance(part, str) else part for part in args]
            self.console.print(*shown, soft_wrap=True, highlight=False, markup=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar in a terminal."""
        if self._enabled and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
            self._draw(trainer, "training", force=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        """Draw the bar, or print a line for each report."""
        if self._live is not None:
            self._draw(trainer, "training")
        elif self.throughput.count > self._shown:
            self._shown = self.throughput.count
            self.print(self.line(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation."""
        self._validating = self.clock()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        """Draw the bar."""
        if self._live is not None:
            self._draw(trainer, f"validation, batch {batch_idx + 1}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the figures of a validation."""
        if trainer.sanity_checking:
            return
        values = [f"{name} {value:.4g}" for name, value in trainer.callback_metrics.items() if name.startswith("val_")]
        took = f"validated in {duration(self.clock() - self._validating)}"
        self.print(" · ".join([self._where(trainer), took, *values]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar, and print the peak memory of all processes."""
        if self._live is not None:
            self.print(self.line(trainer))  # the last state of the bar stays
        self._stop()
        if len(self.throughput.reports) > 1:
            peaks = ", ".join(f"{report.memory / GIB:.2f}" for report in self.throughput.reports)
            self.print(f"peak memory in GiB by rank: {peaks}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the bar."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the bar."""
        self._stop()

    def line(self, trainer: Trainer) -> str:
        """Return the state of the run in one line."""
        return " · ".join([self._where(trainer), *self._figures(trainer), *self._left()])

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @staticmethod
    def _where(trainer: Trainer) -> str:
        limit = step_limit(trainer)
        return f"step {trainer.global_step}" + ("" if limit is None else f"/{limit}")

    def _figures(self, trainer: Trainer) -> list[str]:
        metrics = trainer.progress_bar_metrics.items()
        losses = [f"{name} {value:.4g}" for name, value in metrics if not name.startswith(HIDDEN)]
        return [*losses, *speed_text(self.throughput.values), *memory_text(self.throughput.reports)]

    def _left(self) -> list[str]:
        return [] if self.throughput.eta is None else [f"{duration(self.throughput.eta)} left"]

    def _draw(self, trainer: Trainer, what: str, force: bool = False) -> None:
        now, live = self.clock(), self._live
        if live is not None and (force or now - self._drawn >= REFRESH_SECONDS):
            self._drawn = now
            bar = Bar(total=step_limit(trainer), completed=trainer.global_step)
            grid = Table.grid(padding=(0, 1), expand=True)
            grid.add_column(no_wrap=True)
            grid.add_column(ratio=1)
            grid.add_column(no_wrap=True, justify="right")
            grid.add_row(what, bar, " · ".join([self._where(trainer), *self._left()]))
            live.update(Group(grid, Text(" · ".join(self._figures(trainer)), style="dim")), refresh=True)


def progress_callbacks(bar: bool = True, console: Console | None = None) -> list[Callback]:
    """Return the callbacks that measure a run, with its bar unless ``trainer.enable_progress_bar`` is off."""
    throughput = Throughput()
    return [throughput, RunBar(throughput, console)] if bar else [throughput]
