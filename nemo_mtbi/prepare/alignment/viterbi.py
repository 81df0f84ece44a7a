# SPDX-License-Identifier: Apache-2.0
"""The best path through a chain of states, for a batch of utterances (Viterbi; Rabiner 1989, section III.B)."""

from __future__ import annotations

import torch
from torch import Tensor

IMPOSSIBLE = -1  # state of all frames of an utterance that has no path, and of those behind its end


def best_path(emissions: Tensor, may_skip: Tensor, frames: Tensor, states: Tensor) -> Tensor:
    """Return the most probable state of each frame of each utterance.

    From one frame to the next a path stays in its state, goes to the next one, or leaves out the one between where
    that is allowed. It begins in the first or second state and ends in the last or the one before: chains have
    something optional at both ends (silence, CTC's blank).

    Args:
        emissions: ``[B, T, U]`` log-probability of frame ``t`` in state ``u``.
        may_skip: ``[B, U]`` whether a state may be entered from two states before it.
        frames: ``[B]`` valid frames.
        states: ``[B]`` valid states.

    Returns:
        ``[B, T]`` states; :data:`IMPOSSIBLE` behind the end, and everywhere if the frames are too few for the states.
    """
    batch, steps, width = emissions.shape
    device, lowest = emissions.device, torch.finfo(emissions.dtype).min
    nowhere = emissions.new_full((batch, 2), -torch.inf)
    may_skip = may_skip.clone()
    may_skip[:, :2] = False
    score = emissions.new_full((batch, width), -torch.inf)
    score[:, :2] = emissions[:, 0, :2]
    came_from = torch.zeros(steps, batch, width, dtype=torch.int8, device=device)  # 0, 1 or 2 states before
    for t in range(1, steps):
        padded = torch.cat([nowhere, score], 1)  # [B, 2 + U]
        skipped = padded[:, :width].masked_fill(~may_skip, -torch.inf)
        best, came_from[t] = _max_of(score, padded[:, 1:-1], skipped)
        score = torch.where((t < frames)[:, None], best + emissions[:, t], score)
    rows = torch.arange(batch, device=device)
    last = torch.stack([states - 1, (states - 2).clamp(min=0)])  # [2, B]
    ends = score[rows, last]
    state = last[ends.argmax(0), rows]
    paths = torch.full((batch, steps), IMPOSSIBLE, dtype=torch.long, device=device)
    for t in range(steps - 1, -1, -1):
        inside = t < frames
        paths[:, t] = torch.where(inside, state, IMPOSSIBLE)
        state = torch.where(inside, state - came_from[t, rows, state], state)
    paths[ends.amax(0) < lowest] = IMPOSSIBLE
    return paths


def _max_of(stay: Tensor, step: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of three and which it is: much faster than a maximum over a stacked axis."""
    moved = step > stay
    best = torch.where(moved, step, stay)
    skipped = skip > best
    return torch.where(skipped, skip, best), torch.where(skipped, 2, moved.to(torch.int8)).to(torch.int8)
