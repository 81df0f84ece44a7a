# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints that Megatron's ``torch_dist`` format holds, in every process what it needs.

Megatron's own reader unpickles what it finds; this one takes tensors and plain containers only. Processes read on
their own, and tell each other how it went.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.optim import Optimizer

from nemo_mtbi.compat.megatron import load_planner, torch_state_dict
from nemo_mtbi.compat.torch import set_files
from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.parallel import random_states
from nemo_mtbi.parallel.agreement import together
from nemo_mtbi.parallel.checkpoint import files, optimizer_state, tensors
from nemo_mtbi.parallel.checkpoint.content import LLM_OPTIMIZER, OPTIMIZER_GROUPS, RANDOM_STATES
from nemo_mtbi.parallel.checkpoint.digests import CheckedFiles, open_checked
from nemo_mtbi.parallel.checkpoint.metadata import read_metadata
from nemo_mtbi.parallel.checkpoint.tensors import Place
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


def load(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    seed: int,
    llm: LlmOptimizer | None = None,
) -> dict[str, Any]:
    """Read this process's part of a checkpoint, by all processes together.

    Args:
        folder: the checkpoint; it may have been saved at another layout.
        weights: what the model saves by name, the parameters themselves; they are not changed.
        optimizers: of this process; none where nothing trains, or if their state is not wanted.
        seed: of random generators whose state the checkpoint does not hold for this process.
        llm: the optimizer of the LLM, if that trains.

    Returns:
        Lightning's checkpoint for this process. Tensors are on the CPU, optimizer states have the numbers of
        ``optimizers``, ``LLM_OPTIMIZER`` holds what ``llm`` restores, and ``RANDOM_STATES`` holds what
        :func:`nemo_mtbi.parallel.random_states.restore` takes.

    Raises:
        ValueError: the same in all processes; if the checkpoint is not whole, or does not fit.
    """
    what = f"the checkpoint {folder} could not be loaded"
    together(what, lambda: _check(folder) if dist.get_rank() == 0 else None, files.explain_system_error)
    loading = _Loading(folder, weights, Place.here())
    stored = together(
        what, lambda: _named(folder, lambda: loading.read(optimizers, seed, llm)), files.explain_system_error
    )[0]
    wanted = together(what, lambda: list(weights))
    unknown = sorted(stored - {name for names in wanted for name in names})
    if unknown:
        raise ValueError(f"{what}: it holds weights that this model has not: {', '.join(unknown[:5])}; {_CONFIG}")
    return loading.result


_CONFIG = "give the model: section that it was trained with"


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            "there is no such folder: give one that training has written (a .nemo is for init_from_nemo_model)"
        )
    _named(folder, lambda: files.check(folder))


def _named(folder: Path, read: Callable[[], Value]) -> Value:
    """Read of a checkpoint; if it is damaged, the error says which one to resume from.

    Raises:
        ValueError: names the folder and what is wrong.
    """
    try:
        return read()
    except ValueError as error:
        if isinstance(error, DamageError):
            message = f"{folder} is damaged: {error}; move it away"
        elif "is not a whole checkpoint" in str(error):
            message = str(error)
        else:
            raise
        other = files.survey(folder.parent, without=folder).last
        hint = f"{other} is whole: resume from that" if other else "there is no whole one beside it"
        raise ValueError(f"{message}; {hint}") from error


class _Loading:
    """One process's part of a checkpoint."""

    def __init__(self, folder: Path, weights: Mapping[str, Tensor], place: Place):
        self.folder = folder
        self.result: dict[str, Any] = {}
        self._weights, self._place = weights, place
        self._sharded: dict[str, list] = {}  # key -> sharded tensors, whose memory is to be filled

    def read(self, optimizers: Sequence[Optimizer], seed: int, llm: LlmOptimizer | None) -> set[str]:
        """Fill ``result``; return the names of all weights that are stored."""
        self._marks = files.read_marker(self.folder).files
        self._metadata = read_metadata(self.folder, self._marks, self._content(".metadata"))
        common, saved = self._read_common()
        options, moments = common.pop(OPTIMIZER_GROUPS, None), common.pop(LLM_OPTIMIZER, None)
        self.result = {**common, "state_dict": {name: self._weight(name) for name in self._weights}}
        numbers: list[tuple[dict[str, Any], str]] = []  # states that are numbers, and their names
        if options is not None:
            self.result["optimizer_states"] = self._optimizers(optimizers, options, numbers)
        if llm is not None and options is not None:
            if moments is None:
                raise ValueError(
                    "it holds nothing of the LLM's optimizer, since it was saved behind a fit: resume from one that "
                    "was saved within"
                )
            self.result[LLM_OPTIMIZER] = {**moments, "values": self._moments(llm) if moments["steps"] else {}}
        self.result[RANDOM_STATES] = self._random(saved, seed, common["global_step"])
        self._fill()
        for state, kind in numbers:  # they were stored as tensors
            state[kind] = state[kind].item()
        for name, value in self.result[RANDOM_STATES].items():
            self.result[RANDOM_STATES][name] = value.reshape(-1)
        return tensors.stored_weights(self._metadata)

    def _content(self, name: str) -> bytes:
        """Return the content of a file that every process reads whole."""
        with open_checked(self.folder, name, self._marks) as file:
            return file.read()

    def _read_common(self) -> tuple[dict[str, Any], Place]:
        content = self._content("common.pt")
        try:
            stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return stored["checkpoint"], Place(**stored["place"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.folder / 'common.pt'} is not loaded, it holds more than plain data: {reason}"
            ) from error

    def _find(self, key: str) -> TensorStorageMetadata | None:
        """Return the description of a stored tensor; ``None`` if nothing is stored under that key.

        Raises:
            ValueError: if something else than a tensor is.
        """
        stored = self._metadata.state_dict_metadata.get(key)
        if stored is not None and not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"it holds {key}, but not as a tensor: resume from another checkpoint")
        return stored

    def _want(self, shards: Sequence[Any]) -> None:
        for shard in shards:
            self._sharded.setdefault(shard.key, []).append(shard)

    def _weight(self, name: str) -> Tensor:
        """Return memory for a weight, which :meth:`_fill` fills."""
        parameter = self._weights[name]
        data = torch.zeros_like(parameter, device="cpu", requires_grad=False)  # where it is padded, it stays so
        shards = tensors.weight_shards(name, data, parameter, self._place)
        stored = self._find(shards[0].key)
        if stored is None:
            raise ValueError(f"the model's {name} is not in it: {_CONFIG}")
        stored_as, wanted = (stored.properties.dtype, tuple(stored.size)), (data.dtype, shards[0].global_shape)
        if stored_as != wanted:
            raise ValueError(
                f"the model's {name} is {wanted[0]} {wanted[1]}, in it {stored_as[0]} {stored_as[1]}: {_CONFIG}"
            )
        self._want(shards)
        return data

    def _optimizers(self, optimizers: Sequence[Optimizer], options: Sequence, numbers: list) -> list[dict[str, Any]]:
        """Return state dictionaries of this process's optimizers."""
        if optimizers and len(optimizers) != len(options):
            raise ValueError(
                f"the run has {len(optimizers)} optimizers, the one that was saved {len(options)}: {_CONFIG}"
            )
        return [self._optimizer(i, optimizer, options[i], numbers) for i, optimizer in enumerate(optimizers)]

    def _optimizer(self, number: int, optimizer: Optimizer, options: Sequence, numbers: list) -> dict[str, Any]:
        names = optimizer_state.parameter_names(optimizer, self._weights)
        states: dict[int, dict[str, Any]] = {}
        for key, index, kind, is_number in optimizer_state.state_keys(number, names, self._metadata):
            parameter, stored = self._weights[names[index]], self._find(key)
            if stored is None:  # the keys are those of the metadata
                raise ValueError(f"it holds no {key}: resume from another checkpoint")
            whole = tensors.weight_shards("", parameter.detach(), parameter, self._place)[0].global_shape
            if tuple(stored.size) == whole:
                data = torch.empty(parameter.shape, dtype=stored.properties.dtype)
                self._want(tensors.shards(key, data, parameter, self._place))
            else:  # one number, or what every process has whole
                data = torch.empty(stored.size, dtype=stored.properties.dtype)
                self._want(tensors.shards(key, data, data, self._place))
            states.setdefault(index, {})[kind] = data
            if is_number:
                numbers.append((states[index], kind))
        groups_now = optimizer.state_dict()["param_groups"]
        return {
            "state": dict(sorted(states.items())),
            "param_groups": optimizer_state.with_options(groups_now, options),
        }

    def _moments(self, llm: LlmOptimizer) -> dict[str, dict[str, Tensor]]:
        """Return memory for the moments of this process's optimizer of the LLM, by the names of weights."""
        moments: dict[str, dict[str, Tensor]] = {}
        for fragment in llm.fragments(complete=True):
            for kind, value in fragment.values.items():
                key = tensors.llm_key(kind, fragment.name)
                if self._find(key) is not None:
                    data = moments.setdefault(fragment.name, {})[kind] = torch.zeros(value.shape, dtype=value.dtype)
                    self._want(tensors.fragments(key, data, fragment.start, fragment.weight, self._place))
        return moments

    def _random(self, saved: Place, seed: int, step: int) -> dict[str, Tensor]:
        """Return random states: those of this process as far as they are stored, else new ones."""
        here, origin = self._place, tensors.random_origin(self._place, saved)
        same = saved.sizes == here.sizes
        states = random_states.seeded(seed, step, here.data)
        apart = random_states.seeded(seed, step, here.data, here.pipeline, here.tensor)
        new = []
        for name in states:
            tracked = name.startswith(random_states.TRACKED)
            stored = self._find(tensors.random_key(name))
            if stored is None or origin is None or (tracked and not same):
                new.append(name)
                states[name] = apart[name] if tracked else states[name]
            else:
                states[name] = torch.empty(stored.size[-1], dtype=stored.properties.dtype).reshape(1, 1, 1, -1)
                self._want([tensors.random_shard(name, states[name], origin)])
        if new and dist.get_rank() == 0:
            logger.warning(
                f"{self.folder} was saved by {saved.sizes} data x pipeline x tensor-parallel processes, now there are "
                f"{here.sizes}: the random generators {', '.join(new)} are seeded anew, from seed, step and rank"
            )
        return states

    def _fill(self) -> None:
        """Read the tensors of all shards that were collected."""
        reader, planner = FileSystemReader(self.folder), load_planner()
        set_files(reader, CheckedFiles(self.folder, self._marks))
        reader.set_up_storage_reader(self._metadata, True)
        planner.set_up_planner(torch_state_dict(self._sharded, True), self._metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(planner.finish_plan(plan), planner).wait()
