# SPDX-License-Identifier: Apache-2.0
"""``.nemo`` archives whose weights are tensors only (safetensors) and never a pickle."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model_weights.safetensors"


class TensorArchive(SaveRestoreConnector):
    """Writes weights as safetensors; reads those, and NeMo's own ``.ckpt`` with ``weights_only``.

    Args:
        dtype: floating-point weights are stored in it; ``None`` keeps theirs.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.model_weights_ckpt = WEIGHTS
        self.dtype = dtype

    def _inject_model_parallel_rank_for_ckpt(self, dirname: str, basename: str) -> str:
        """One file for every layout; NeMo looks for one for each model-parallel process."""
        return os.path.join(dirname, basename)

    def _save_state_dict_to_disk(self, state_dict, filepath):
        def stored(value: Tensor) -> Tensor:
            # a tensor that two names share is written twice: safetensors refuses aliases
            value = value.detach().cpu().clone().contiguous()
            return value.to(self.dtype) if self.dtype and value.is_floating_point() else value

        save_file({name: stored(value) for name, value in state_dict.items()}, filepath)

    @staticmethod
    def _load_state_dict_from_disk(model_weights, map_location="cpu"):
        path = Path(model_weights)
        if path.suffix == ".safetensors" and not path.exists():
            path = path.with_suffix(".ckpt")  # an archive written by NeMo itself
            return torch.load(path, map_location=map_location, weights_only=True)
        try:
            return load_file(path, device=str(map_location or "cpu"))
        except SafetensorError as error:
            raise RuntimeError(f"{os.fspath(path)} is damaged: {error}; copy or save the archive again") from error
