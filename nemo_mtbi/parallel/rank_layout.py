# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which layers: arithmetic alone, no process is started."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_mtbi.config.parallel import ParallelConfig


@dataclass(frozen=True)
class RankPlace:
    """Position of one process in the parallel layout.

    Attributes:
        rank: of the world.
        data, tensor, stage: its ranks in the data-parallel, tensor-parallel and pipeline-parallel group.
        runs: the layers of each of its model chunks, counted from 0 over the whole LLM.
    """

    rank: int
    data: int
    tensor: int
    stage: int
    runs: tuple[tuple[int, ...], ...]


def stage_runs(layout: ParallelConfig, num_layers: int, stage: int) -> tuple[tuple[int, ...], ...]:
    """Return the layers of each model chunk of a stage; with virtual stages the chunks of all stages alternate."""
    stages = layout.pipeline_model_parallel_size
    size = num_layers // (stages * layout.chunks)
    starts = ((chunk * stages + stage) * size for chunk in range(layout.chunks))
    return tuple(tuple(range(start, start + size)) for start in starts)


def rank_places(layout: ParallelConfig, num_layers: int, world: int) -> list[RankPlace]:
    """Return all positions in Megatron's order of ranks: tensor parallelism fastest, then data, then the pipeline."""
    data = layout.replicas(world)
    positions = []
    for rank in range(world):
        rest, tensor = divmod(rank, layout.tensor_model_parallel_size)
        stage, replica = divmod(rest, data)
        positions.append(RankPlace(rank, replica, tensor, stage, stage_runs(layout, num_layers, stage)))
    return positions
