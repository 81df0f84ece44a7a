# SPDX-License-Identifier: Apache-2.0
"""The device that a process works on."""

from __future__ import annotations

import os

import torch


def pick_device(cuda: int | None) -> torch.device:
    """Return the device of NeMo's key ``cuda``: an index; ``None`` for a GPU if there is one; negative for the CPU.

    Raises:
        ValueError: if there is no such GPU.
    """
    count = torch.cuda.device_count()
    if cuda is None and count:
        cuda = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda is None or cuda < 0:
        return torch.device("cpu")
    if cuda >= count:
        raise ValueError(f"cuda={cuda}, but there are {count} CUDA devices: cuda=-1 runs on the CPU")
    return torch.device("cuda", cuda)
