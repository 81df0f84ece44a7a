# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run, as Lightning and NeMo's ``exp_manager`` ask for them.

To be resumed exactly, a strategy needs three things beside the plugin: it calls the plugin's methods on all processes,
its ``restore_checkpoint_after_setup`` is true (optimizers must exist to have their state numbered), and
``random_states.restore(checkpoint[RANDOM_STATES])`` runs right before the first step that is taken.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from nemo_mtbi.compat.lightning import is_time_limit
from nemo_mtbi.compat.nemo_checkpoint import FinalizableCheckpointIO
from nemo_mtbi.parallel.agreement import together
from nemo_mtbi.parallel.checkpoint import files
from nemo_mtbi.parallel.checkpoint.loading import load
from nemo_mtbi.parallel.checkpoint.saving import Save
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer

logger = logging.getLogger(__name__)
_WITHOUT_OPTIMIZER = ("optimizer_states", "lr_schedulers")


class ShardedCheckpointIO(FinalizableCheckpointIO):
    """Save and load checkpoint folders that fit every parallel layout.

    All processes call its methods together, except ``remove_checkpoint``.

    A save goes on in the background if NeMo's checkpoint callback has ``async_save``: what is written is the state at
    the time of the call. :meth:`maybe_finalize_save_checkpoint` then has to be called until it is done, at the latest
    before the process ends; NeMo's ``AsyncFinalizerCallback`` calls it at the end of each step.

    Args:
        weights: gives what the model saves by name, the parameters themselves: its ``state_dict(keep_vars=True)``.
        optimizers: gives those of this process.
        seed: of random numbers where a checkpoint of another layout has none for this process.
        timeout: seconds after which a save counts as failed.
        llm: gives the optimizer of the LLM, if that trains.
    """

    def __init__(
        self,
        weights: Callable[[], Mapping[str, Tensor]],
        optimizers: Callable[[], Sequence[Optimizer]],
        seed: int = 0,
        timeout: float = 1800,
        llm: Callable[[], LlmOptimizer | None] = lambda: None,
    ):
        super().__init__()
        self._weights, self._optimizers, self._llm = weights, optimizers, llm
        self._seed, self._timeout = seed, timeout
        self._pending: Save | None = None
        self._finalize: Callable[[], None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save; in the background where ``storage_options`` holds NeMo's ``finalize_fn``.

        Raises:
            ValueError, RuntimeError: the same in all processes; names path, cause and remedy.
        """
        options = dict(storage_options or {})
        finalize, with_optimizer = options.pop("finalize_fn", None), options.pop("include_optimizer", True)
        if options:
            raise ValueError(f"unknown storage_options {', '.join(options)}: leave them out")
        if not with_optimizer:
            checkpoint = {key: value for key, value in checkpoint.items() if key not in _WITHOUT_OPTIMIZER}
        self.maybe_finalize_save_checkpoint(blocking=True)
        in_background = finalize is not None
        self._pending = Save(
            checkpoint,
            files.folder_of(path),
            self._weights(),
            self._optimizers(),
            self._llm(),
            copy=in_background,
            timeout=self._timeout,
        )
        self._finalize = finalize
        if not in_background:
            self.maybe_finalize_save_checkpoint(blocking=True)

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Complete the save that goes on in the background, if all processes have written their share.

        Args:
            blocking: whether to wait for it.

        Returns:
            Whether a save was completed.

        Raises:
            RuntimeError: in all processes, if it failed.
        """
        save = self._pending
        if save is None:
            return False
        try:
            if not save.written(blocking):
                return False
            save.finish()
        except BaseException:
            self._pending = None
            raise
        finalize, self._pending, self._finalize = self._finalize, None, None
        if finalize is not None:
            finalize()
        return True

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return this process's part of a checkpoint; see :func:`nemo_mtbi.parallel.checkpoint.loading.load`.

        Args:
            path: of the folder, with or without ``.ckpt``.
            map_location: tensors stay on the CPU.
            weights_only: never is more loaded than that.
        """
        self.maybe_finalize_save_checkpoint(blocking=True)
        return load(files.folder_of(path), self._weights(), self._optimizers(), self._seed, self._llm())

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint. One process does it, so a failure is logged and not raised: others would wait."""
        folder = files.folder_of(path)
        if not folder.exists():
            return
        try:
            files.remove(folder)
        except OSError as error:
            logger.warning(f"the old checkpoint {folder} could not be removed: {files.explain_system_error(error)}")

    @property
    def async_calls_queue(self) -> ShardedCheckpointIO:
        """Return this object: NeMo's ``AsyncFinalizerCallback`` reads the number of saves in progress from it."""
        return self

    def get_num_unfinalized_calls(self) -> int:
        """Return the number of saves that go on in the background: 0 or 1."""
        return int(self._pending is not None)

    def teardown(self) -> None:
        """Complete the save that goes on in the background; not after a failure, when other processes may be gone."""
        error = sys.exc_info()[1]  # Lightning calls it while it handles what has ended the run
        if error is None or is_time_limit(error):
            self.maybe_finalize_save_checkpoint(blocking=True)
        elif self._pending is not None:
            logger.warning(f"the checkpoint {self._pending.folder} was not completed; the one before it counts")


def choose_resume(folder: str | Path) -> Path | None:
    """Return the checkpoint that a run in ``folder`` resumes. All processes call it, before NeMo's ``exp_manager``.

    What a killed run has left is tidied up, see :func:`nemo_mtbi.parallel.checkpoint.files.recover`; broken
    checkpoints are warned of by name.

    Args:
        folder: of the checkpoints: ``exp_manager.checkpoint_callback_params.dirpath``.

    Returns:
        The newest whole checkpoint; ``None``: there is none, the run begins anew.

    Raises:
        ValueError: in all processes, if there are checkpoints and none of them is whole.
        RuntimeError: in all processes, if the folder can't be read or changed.
    """
    what = f"no checkpoint could be chosen in {folder}"
    return together(what, lambda: files.recover(folder) if dist.get_rank() == 0 else None, files.explain_system_error)[
        0
    ]
