# SPDX-License-Identifier: Apache-2.0
"""The loops of Lightning's trainer, whose classes are private since Lightning 2.0, and what else is internal there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def is_time_limit(error: BaseException | None) -> bool:
    """Return whether an error is how NeMo's time limit ends a run, which is not a failure.

    Uses ``_TunerExitException``: NeMo's ``StatelessTimer`` raises it since Lightning, which catches it, has no public
    exception for a clean end. ``trainer.should_stop`` in NeMo's timer would replace it.
    """
    from lightning.pytorch.utilities.exceptions import _TunerExitException

    return isinstance(error, _TunerExitException)


def leave_out_steps(trainer: Trainer, is_left_out: Callable[[], bool]) -> None:
    """Let the trainer take steps that are left out for gradients that are still being accumulated.

    Replaces ``_should_accumulate`` of the loop over batches, until :func:`keep_all_steps`. Lightning has no public way
    to leave out a step of several processes: a ``training_step`` that returns ``None`` is refused there. Public
    support of skipped steps would replace it.

    Args:
        trainer: must not accumulate gradients itself.
        is_left_out: whether the step in hand is left out; the same on all processes.
    """
    trainer.fit_loop.epoch_loop._should_accumulate = is_left_out


def keep_all_steps(trainer: Trainer) -> None:
    """Undo :func:`leave_out_steps`; without effect where nothing was replaced."""
    vars(trainer.fit_loop.epoch_loop).pop("_should_accumulate", None)


def end_within_pass(trainer: Trainer) -> None:
    """Let ``trainer.should_stop`` end the fit after this step.

    Sets ``fit_loop.min_epochs``: Lightning would first end the pass over the data, and ``Trainer`` takes that number
    from its constructor only. A way to end a fit at once would replace it.
    """
    trainer.fit_loop.min_epochs = 0


def store_running_pass(checkpoint: dict[str, Any], trainer: Trainer, number: Callable[[], int]) -> None:
    """Store a pass over the data that was broken off as one that goes on, where a checkpoint is of such a pass.

    Reads ``epoch_loop.batch_progress`` and changes the state of ``fit_loop.epoch_progress`` in the checkpoint:
    Lightning counts a pass that ``should_stop`` breaks off as one that has ended, and has no other place for it.

    Args:
        checkpoint: of Lightning; changed in place.
        trainer: that saves it.
        number: returns the number of the pass; called only where the pass goes on.
    """
    passes = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current")
    if passes and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        running = number()
        passes.update({key: min(passes[key], running) for key in ("processed", "completed")})
        checkpoint["epoch"] = min(checkpoint["epoch"], running)


def resume_pass(trainer: Trainer, number: int) -> None:
    """Set the counters of a run that has been resumed, before its first step.

    Sets ``fit_loop.epoch_progress`` and ``epoch_loop._batches_that_stepped``, the step that loggers get. Lightning
    restores both from the checkpoint and has no public setter: a pass that had ended is ended once more, and would be
    counted twice, and the step of the loggers is counted after the validation that saved the checkpoint.

    Args:
        trainer: whose state has been restored.
        number: of the pass over the data that goes on.
    """
    loop, passes = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    passes.processed = passes.completed = number
    loop._batches_that_stepped = max(loop._batches_that_stepped, trainer.global_step)
