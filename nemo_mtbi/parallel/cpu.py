# SPDX-License-Identifier: Apache-2.0
"""What Megatron-core needs to run without CUDA, and nothing more.

Megatron-core allocates small tensors on ``torch.cuda.current_device()`` or ``device="cuda"`` and forks a CUDA random
state where weights are initialized. :func:`megatron_device` redirects these to the CPU while its body runs. It patches
a handful of names and restores them: outside the body the process is unchanged, and no operator is slower.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from unittest import mock

import torch

_lock = threading.Lock()
_depth = 0  # bodies that are running, in all threads
_patches = contextlib.ExitStack()


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


def _patch() -> None:
    """Replace the CUDA names by CPU versions; ``_patches.close()`` restores them."""
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import layers, random

    tracker = _NoRngTracker()
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
        _patches.enter_context(mock.patch.object(target, name, value))


@contextlib.contextmanager
def megatron_device(device: torch.device | str = "cpu") -> Iterator[None]:
    """Run Megatron-core code on ``device``. On CUDA nothing is changed; nested use costs nothing.

    Threads may overlap (a server answers several requests): the last one out restores the names.

    Args:
        device: where the model's parameters are.
    """
    global _depth
    if torch.device(device).type == "cuda":
        yield
        return
    with _lock:
        if _depth == 0:
            _patch()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _patches.close()


@contextlib.contextmanager
def megatron_optimizer_device(device: torch.device | str = "cpu") -> Iterator[None]:
    """Run Megatron's optimizer on ``device`` too, which compares CUDA names of types. For one thread at a time."""
    if torch.device(device).type == "cuda":
        yield
        return
    from megatron.core.optimizer import optimizer

    type_of = torch.Tensor.type

    def cuda_name(tensor: torch.Tensor, *args, **kwargs):
        found = type_of(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

    with (
        megatron_device(device),
        mock.patch.object(optimizer, "torch", _CpuTorch()),
        mock.patch.object(torch.Tensor, "type", cuda_name),
    ):
        yield
