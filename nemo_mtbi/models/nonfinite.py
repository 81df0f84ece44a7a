# SPDX-License-Identifier: Apache-2.0
"""Whose fault a NaN or Inf is."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 20  # cuts in a message


def nonfinite_message(told: Sequence[tuple[bool, Sequence[str]]], step: int) -> str:
    """What the user hears of a step whose loss or gradient is not finite.

    Args:
        told: by each replica: whether its loss is finite, and the cuts of its part of the step. Named are the cuts of
            the losses that are not, or all of them if only the gradient is not.
        step: its number.
    """
    blamed = [cut for finite, cuts in told if not finite for cut in cuts] or [c for _, cuts in told for c in cuts]
    shown = ", ".join(blamed[:NAMED]) + (f" and {len(blamed) - NAMED} more" if len(blamed) > NAMED else "")
    return (
        f"the loss or gradient of step {step} is NaN or Inf; its cuts: {shown}. Look at their audio, lower "
        "model.optim.lr, or set model.on_nonfinite=skip to leave such steps out"
    )
