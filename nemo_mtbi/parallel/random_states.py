# SPDX-License-Identifier: Apache-2.0
"""States of all random generators of a process, as tensors: Python's, NumPy's, torch's and Megatron's.

They are tensors, so that a checkpoint holds nothing that has to be unpickled.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRACKED = "tracked."  # prefix of the CUDA generators that Megatron keeps for regions of the model


def capture() -> dict[str, Tensor]:
    """Return the states of this process's generators: name -> ``[n]``, on the CPU."""
    states = {
        "python": _python_tensor(random.getstate()),
        "numpy": _numpy_tensor(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in _tracker().get_states().items():
        states[TRACKED + name] = state.cpu().clone()
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Set this process's generators. To be exact, call it right before the first step that is taken after a resume.

    Raises:
        ValueError: if a generator of this process has no state among these.
    """
    missing = sorted(capture().keys() - states.keys())
    if missing:
        raise ValueError(f"no state for the random generators {', '.join(missing)}: take them from the checkpoint")
    random.setstate(_python_state(states["python"]))
    np.random.set_state(_numpy_state(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name: states[TRACKED + name] for name in _tracker().get_states()}
    if tracked:
        _tracker().set_states(tracked)


def seeded(*parts: int | str) -> dict[str, Tensor]:
    """Return states for this process's generators that depend on ``parts`` alone. The generators stay as they are."""
    states = {}
    for name in capture():
        digest = hashlib.sha256("/".join(map(str, (*parts, name))).encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
        if name == "python":
            states[name] = _python_tensor(random.Random(seed).getstate())
        elif name == "numpy":
            states[name] = _numpy_tensor(np.random.RandomState(seed % 2**32).get_state())
        else:
            device = "cpu" if name == "torch" else "cuda"
            states[name] = torch.Generator(device).manual_seed(seed).get_state()
    return states


def _tracker():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


# The numbers of both generators are below 2^32, so float64 holds them exactly.


def _python_tensor(state: tuple) -> Tensor:
    version, numbers, gauss = state
    return torch.tensor([version, *numbers, gauss is not None, gauss or 0.0], dtype=torch.float64)


def _python_state(value: Tensor) -> tuple:
    version, *numbers, has_gauss, gauss = value.tolist()
    return int(version), tuple(map(int, numbers)), gauss if has_gauss else None


def _numpy_tensor(state: Any) -> Tensor:
    """Return numpy's legacy state, which is a tuple though numpy's hints allow a dictionary."""
    _, numbers, position, has_gauss, gauss = state
    return torch.tensor([*numbers.tolist(), position, has_gauss, gauss], dtype=torch.float64)


def _numpy_state(value: Tensor) -> tuple:
    *numbers, position, has_gauss, gauss = value.tolist()
    return "MT19937", np.array(numbers, dtype=np.uint32), int(position), int(has_gauss), gauss
