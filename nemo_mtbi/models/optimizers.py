# SPDX-License-Identifier: Apache-2.0
"""Check that the optimizers of a run are those of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

OPTIMIZERS = "optimizers"  # key of a checkpoint
_LATER = ("params", "param_names", "initial_lr")  # of a parameter group, whatever its optimizer is


def names(optimizers: Sequence[Optimizer]) -> list[str]:
    """Return the classes of optimizers."""
    return [type(optimizer).__name__ for optimizer in optimizers]


def check_optimizers(checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Compare the optimizers of a run with those that a checkpoint holds the states of.

    Args:
        checkpoint: from Lightning; older ones do not name the optimizer, and its options must do.
        optimizers: of this run; none if it does not train.

    Raises:
        ValueError: if they differ; names both and the remedy.
    """
    saved, now = checkpoint.get(OPTIMIZERS), names(optimizers)
    states = checkpoint.get("optimizer_states") or []
    if saved is None:
        then = "another optimizer"
        pairs = zip(states, optimizers, strict=False)  # a run that only validates has none
        differs = any(_options(state["param_groups"]) != _options(one.param_groups) for state, one in pairs)
    else:
        then = f"the optimizer {', '.join(saved)}"
        differs = bool(states) and bool(now) and saved != now
    if differs:
        raise ValueError(
            f"the checkpoint was written with {then}, and model.optim.name gives {', '.join(now)}, which can't go on "
            "from its state: give the optimizer of then, or begin a new run with init_from_nemo_model and the .nemo "
            "of the former one"
        )


def _options(groups: Sequence[Mapping[str, Any]]) -> set[str]:
    return {key for group in groups for key in group if key not in _LATER}
