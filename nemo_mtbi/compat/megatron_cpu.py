# SPDX-License-Identifier: Apache-2.0
"""Names of CUDA that Megatron-core uses also where there is none, and what they are replaced by.

Megatron-core has no public way to run without CUDA: it allocates small tensors on ``torch.cuda.current_device()`` or
``device="cuda"``, and forks a CUDA random state where weights are initialized. A device argument in its place would
replace this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


class _CpuTorch:
    """``torch`` as seen by a Megatron module that writes ``device="cuda"`` literally."""

    def __getattr__(self, name: str):
        attribute = getattr(torch, name)
        if name not in ("zeros", "ones", "empty", "tensor", "full"):
            return attribute

        def on_cpu(*args, device=None, **kwargs):
            return attribute(*args, **kwargs)

        return on_cpu


class _NoRngTracker:
    """Stands for the CUDA random state tracker: on the CPU there is one generator, which every rank seeds itself."""

    @contextlib.contextmanager
    def fork(self, name: str | None = None) -> Iterator[None]:
        yield

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict:
        return {}

    def set_states(self, states: dict) -> None:
        pass


class _NoStream:
    """Stands for a CUDA stream, on which experts' tokens are counted: on the CPU a call returns when it is done."""

    def wait_stream(self, stream: _NoStream) -> None:
        pass

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def cuda_names_replaced() -> Iterator[None]:
    """Replace the names of CUDA that Megatron's models and schedules use, for all threads of the process.

    Replaces ``_get_cuda_rng_state``, ``_set_cuda_rng_state`` and ``get_cuda_rng_tracker`` of its ``tensor_parallel``,
    the ``torch`` of its ``schedules``, five names of ``torch.cuda``, and ``Tensor.cuda``.
    """
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import layers, random

    tracker = _NoRngTracker()
    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (torch.cuda, "synchronize", lambda *args, **kwargs: None),
            (torch.cuda, "Stream", _NoStream),
            (torch.cuda, "current_stream", lambda *args, **kwargs: _NoStream()),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor),
            (schedules, "torch", _CpuTorch()),
            (random, "_get_cuda_rng_state", lambda *args, **kwargs: None),
            (random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
            (random, "get_cuda_rng_tracker", lambda *args, **kwargs: tracker),
            (tensor_parallel, "get_cuda_rng_tracker", lambda *args, **kwargs: tracker),
            (layers, "get_cuda_rng_tracker", lambda *args, **kwargs: tracker),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield


@contextlib.contextmanager
def optimizer_names_replaced() -> Iterator[None]:
    """Replace what Megatron's optimizer uses besides: its ``torch``, and ``Tensor.type``, whose names it compares."""
    from megatron.core.optimizer import optimizer

    type_of = torch.Tensor.type

    def cuda_name(tensor: torch.Tensor, *args, **kwargs):
        kind = type_of(tensor, *args, **kwargs)
        return kind.replace("torch.", "torch.cuda.", 1) if isinstance(kind, str) else kind

    with mock.patch.object(optimizer, "torch", _CpuTorch()), mock.patch.object(torch.Tensor, "type", cuda_name):
        yield
