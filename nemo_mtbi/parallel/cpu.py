# SPDX-License-Identifier: Apache-2.0
"""The least that lets Megatron-core run without CUDA.

Megatron-core allocates small tensors on ``torch.cuda.current_device()`` or ``device="cuda"`` and forks a CUDA random
state where weights are initialized. :func:`megatron_device` redirects these to the CPU while its body runs. It patches
a handful of names and restores them: outside the body the process is unchanged, and no operator is slower.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from nemo_mtbi.compat.megatron_cpu import cuda_names_replaced, optimizer_names_replaced

_lock = threading.Lock()
_depth = 0  # bodies that are running, in all threads
_patches = contextlib.ExitStack()


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
            _patches.enter_context(cuda_names_replaced())
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
    with megatron_device(device), optimizer_names_replaced():
        yield
