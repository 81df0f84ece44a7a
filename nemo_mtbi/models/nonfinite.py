# SPDX-License-Identifier: Apache-2.0
"""Attribution of a NaN or Inf in loss or gradient to the cuts of a step."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 20  # cuts in a message


REMEDY = "Look at their audio, lower model.optim.lr, or set model.on_nonfinite=skip to leave such steps out"


def nonfinite_message(parts: Sequence[tuple[bool, Sequence[str]]], step: int) -> str:
    """Return which cuts a loss or gradient belongs to that is not finite.

    Args:
        parts: of each replica: whether its loss is finite, and the cuts of its part of the step. Named are the cuts of
            the losses that are not, or all of them if only the gradient is not.
        step: its number.
    """
    blamed = [cut for finite, cuts in parts if not finite for cut in cuts] or [c for _, cuts in parts for c in cuts]
    shown = ", ".join(blamed[:NAMED]) + (f" and {len(blamed) - NAMED} more" if len(blamed) > NAMED else "")
    return f"the loss or gradient of step {step} is NaN or Inf; its cuts: {shown}"
