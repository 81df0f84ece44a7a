# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: its layout, memory, data and problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.data.step import Step
from nemo_mtbi.planning.layout_table import RankFacts
from nemo_mtbi.planning.memory import Load, StageMemory, Term

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class Plan:
    """The plan of a run. Parts that could not be determined are empty, and a problem says why.

    Attributes:
        world: number of processes.
        layout: of one replica; ``None`` if it contradicts itself.
        ranks: what each process holds.
        stages: memory of one process of each stage.
        layer: bytes that a layer keeps for each position.
        choices: largest bytes of activations by (recomputation, sequence parallelism).
        step: contents of a step.
        load: sizes of what goes through the model at once.
        micro_batch_tokens: bound on a microbatch.
        steps_per_epoch: a number, or why there is none.
        preparation: what is made before training.
        problems: reasons for which the run would be refused.
        notes: assumptions.
    """

    world: int = 1
    layout: ParallelConfig | None = None
    ranks: list[RankFacts] = field(default_factory=list)
    stages: list[StageMemory] = field(default_factory=list)
    layer: list[Term] = field(default_factory=list)
    choices: dict[tuple[str | None, bool], int] = field(default_factory=dict)
    step: Step | None = None
    load: Load | None = None
    micro_batch_tokens: int = 0
    steps_per_epoch: str = "unknown"
    preparation: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def attempt(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result | None:
        """Call a function; where it raises ``ValueError`` or ``OSError``, note a problem and return ``None``."""
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            self.refuse(str(error))
            return None

    def refuse(self, message: str) -> None:
        """Note a problem once."""
        if message not in self.problems:
            self.problems.append(message)

    @property
    def replicas(self) -> int:
        """Data-parallel size; 1 where the number of processes is not a multiple of a replica's."""
        return max(self.world // self.layout.model_parallel_size, 1) if self.layout else 1
