# SPDX-License-Identifier: Apache-2.0
"""Learning curves from the TensorBoard logs of trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

WANTED = ("val_agreement", "val_wer", "val_cer", "val_loss", "train_loss")
_MOST = 400  # points of a curve that are drawn


def read_curves(folders: Sequence[str]) -> dict[str, list[list[tuple[float, float]]]]:
    """Return the curves of several runs by tag: for each run its (step, value) pairs.

    Args:
        folders: Folders with TensorBoard logs, one for each run; the logs may be below them.

    Raises:
        ValueError: a folder is missing or holds no log with one of :data:`WANTED`.
    """
    by_tag: dict[str, list[list[tuple[float, float]]]] = {}
    for folder in folders:
        curves = _read_run(Path(folder).expanduser())
        if not curves:
            raise ValueError(f"logs={folder} holds no TensorBoard log with one of {', '.join(WANTED)}")
        for tag, points in curves.items():
            by_tag.setdefault(tag, []).append(points)
    return {tag: by_tag[tag] for tag in WANTED if tag in by_tag}


def _read_run(folder: Path) -> dict[str, list[tuple[float, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    merged: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in set(WANTED) & set(events.Tags()["scalars"]):
            # a run that was resumed has logged some steps twice
            merged.setdefault(tag, {}).update({e.step: e.value for e in events.Scalars(tag) if math.isfinite(e.value)})
    return {tag: _thinned(sorted(points.items())) for tag, points in merged.items() if points}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most about ``_MOST`` points, each the mean of some neighbors."""
    width = -(-len(points) // _MOST)
    blocks = [points[start : start + width] for start in range(0, len(points), width)]
    return [(block[-1][0], math.fsum(value for _, value in block) / len(block)) for block in blocks]
