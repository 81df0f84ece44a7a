# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints in Megatron's ``torch_dist`` format, by all processes together.

Megatron's own writer forks, and leaves the other processes in a collective if one of them can't write. So planning and
writing are done here with torch's planner and writer, in a thread of this process, and every step ends with an
exchange of outcomes: what fails in one process is the same error in all of them. Exchanges go over gloo from the main
thread; the other thread writes and nothing else.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim import Optimizer

from nemo_mtbi.compat.megatron import save_planner, torch_state_dict
from nemo_mtbi.compat.torch import set_files
from nemo_mtbi.parallel import groups, random_states
from nemo_mtbi.parallel.agreement import together
from nemo_mtbi.parallel.checkpoint import content, files
from nemo_mtbi.parallel.checkpoint.content import OPTIMIZER_GROUPS
from nemo_mtbi.parallel.checkpoint.digests import HashedFiles
from nemo_mtbi.parallel.checkpoint.tensors import Place
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer

Value = TypeVar("Value")
_COMMON, _CONFIG, _METADATA = "common.pt", "metadata.json", ".metadata"
_POLL_SECONDS = 0.1


def is_first() -> bool:
    """Whether this process writes what is not sharded."""
    return dist.get_rank() == 0


def _explain(error: Exception) -> str:
    return f"{files.explain_system_error(error)}; checkpoints saved before are intact"


class _Writing(threading.Thread):
    """Writes this process's share while the others go on."""

    def __init__(self, action: Callable[[], Any]):
        super().__init__(daemon=True, name="checkpoint")
        self._action = action
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value = self._action()
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class Save:
    """One save, by all processes. :meth:`written` and :meth:`finish` are called by all of them too.

    When the constructor returns, the state is copied (``copy``) or the tensors must stay as they are until the end.

    Args:
        checkpoint: Lightning's, of this process.
        folder: where it will stand.
        weights: what the model saves by name, the parameters themselves.
        optimizers: of this process.
        llm: the optimizer of the LLM, if that trains.
        copy: whether training goes on while it is written.
        timeout: seconds after which writing counts as failed.

    Raises:
        ValueError, RuntimeError: the same in all processes; what stood in ``folder`` still stands there then.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        folder: Path,
        weights: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        llm: LlmOptimizer | None = None,
        *,
        copy: bool,
        timeout: float,
    ):
        self.folder, self.step, self.epoch = folder, checkpoint["global_step"], checkpoint["epoch"]
        self._staging, self._place, self._copy = files.staging_of(folder), Place.here(), copy
        self._writer = FileSystemWriter(self._staging)
        self._files = HashedFiles()
        set_files(self._writer, self._files)
        self._marks: dict[str, files.FileMark] = {}  # of what this process writes
        self._planner = save_planner()
        with self._abandoned_on_failure():
            summaries = self._together(lambda: self._collect(checkpoint, weights, optimizers, llm))
            plans = self._together(lambda: self._plan(summaries))
            plans, self._metadata = self._planner.create_global_plan(plans)
            plan = self._planner.finish_plan(self._writer.prepare_global_plan(plans)[dist.get_rank()])
        self._writing = _Writing(lambda: self._write(plan))
        self._writing.start()
        self._deadline = time.monotonic() + timeout

    def _together(self, action: Callable[[], Value]) -> list[Value]:
        return together(f"the checkpoint {self.folder} could not be saved", action, _explain)

    @contextmanager
    def _abandoned_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if is_first():
                files.abandon(self.folder)
            raise

    def _collect(
        self,
        checkpoint: Mapping,
        weights: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        llm: LlmOptimizer | None,
    ) -> dict:
        """Return the state of this process, and a summary of it for the others."""
        if is_first():
            files.prepare_staging(self.folder)
        random = random_states.capture()
        self._common, self._tensors = content.to_save(checkpoint, weights, optimizers, random, self._place, llm)
        return {
            "hashes": content.hashes(self._common),
            "tensors": [tensor.without_data() for tensor in self._tensors],
            **{key: self._common.get(key) for key in (OPTIMIZER_GROUPS, "lr_schedulers")},
        }

    def _plan(self, summaries: Sequence[Mapping[str, Any]]) -> Any:
        """Write what is not sharded, and plan which tensors this process writes."""
        from megatron.core.dist_checkpointing.mapping import is_main_replica
        from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

        if is_first():
            content.check_equal([summary["hashes"] for summary in summaries])
            validate_sharding_integrity([summary["tensors"] for summary in summaries])
            for key in (OPTIMIZER_GROUPS, "lr_schedulers"):  # empty where nothing trains
                held = [summary[key] for summary in summaries if summary[key]]
                if held:
                    self._common[key] = held[0]
            buffer = io.BytesIO()
            torch.save({"checkpoint": self._common, "place": asdict(self._place)}, buffer)
            self._marks[_COMMON] = files.write_durably(self._staging / _COMMON, buffer.getvalue())
        mine: dict[str, list] = {}
        for tensor in self._tensors:
            if is_main_replica(tensor.replica_id):
                data = tensor.data.detach().to("cpu", copy=self._copy)
                mine.setdefault(tensor.key, []).append(replace(tensor, data=data))
        del self._tensors
        self._planner.set_up_planner(torch_state_dict(mine), is_coordinator=is_first())
        self._writer.set_up_storage_writer(is_first())
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _write(self, plan: Any) -> tuple[list, dict[str, files.FileMark]]:
        """Write the tensors of this process; runs in the thread."""
        results = self._writer.write_data(plan, self._planner).wait()
        return results, self._files.marks

    def written(self, blocking: bool) -> bool:
        """Whether all processes have written their share.

        Args:
            blocking: whether to wait for it.

        Raises:
            RuntimeError: in all processes, if it takes too long.
        """
        if blocking:
            self._writing.join(_POLL_SECONDS)  # a small checkpoint is ready at once
        with self._abandoned_on_failure():
            while not all(self._together(self._is_written)):
                if not blocking:
                    return False
                self._writing.join(_POLL_SECONDS)
        return True

    def _is_written(self) -> bool:
        running = self._writing.is_alive()
        if running and time.monotonic() > self._deadline:
            raise TimeoutError("writing takes too long: the device does not answer or is too slow")
        return not running

    def finish(self) -> None:
        """Declare the checkpoint whole and move it to its place; everything is written by now.

        Raises:
            RuntimeError: in all processes, if one could not write.
        """
        with self._abandoned_on_failure():
            outcomes = self._together(self._writing.result)
            self._together(lambda: self._complete(outcomes) if is_first() else None)

    def _complete(self, outcomes: Sequence[tuple[list, Mapping[str, files.FileMark]]]) -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig

        marks = self._marks
        for rank, (_, written) in enumerate(outcomes):
            for name, mark in written.items():
                path = self._staging / name
                if not path.is_file() or path.stat().st_size != mark.size:
                    raise RuntimeError(
                        f"process {rank} has written {path}, which process 0 does not see: checkpoints must be on a "
                        "file system that all nodes share"
                    )
                marks[name] = mark
        self._writer.finish(self._metadata, [results for results, _ in outcomes])
        config = json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode()
        marks[_CONFIG] = files.write_durably(self._staging / _CONFIG, config)
        marks[_METADATA] = self._files.marks[_METADATA]
        layout = {**asdict(groups.layout()), "data_parallel_size": self._place.data_size}
        serial = files.next_serial(self.folder.parent)
        files.write_marker(self._staging, files.Marker(self.step, self.epoch, serial, layout, marks))
        files.commit(self.folder)
