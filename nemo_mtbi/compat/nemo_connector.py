# SPDX-License-Identifier: Apache-2.0
"""A base class of NeMo's connectors for ``.nemo`` archives, whose steps have public names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from torch import Tensor


class WeightFileConnector(SaveRestoreConnector):
    """NeMo's connector with a format of its own for the file of weights.

    Overrides ``_save_state_dict_to_disk``, ``_load_state_dict_from_disk`` and
    ``_inject_model_parallel_rank_for_ckpt``: NeMo has a public name for the file (``model_weights_ckpt``) and none for
    its format, which is a pickle. Support of safetensors in NeMo's archives would replace it.
    """

    def write_weights(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        """Write weights to a file."""
        raise NotImplementedError

    @staticmethod
    def read_weights(path: str | Path, map_location: Any = "cpu") -> Mapping[str, Tensor]:
        """Return the weights of a file.

        Args:
            path: of the file.
            map_location: device of the weights.
        """
        raise NotImplementedError

    def _inject_model_parallel_rank_for_ckpt(self, dirname: str, basename: str) -> str:
        """Return one file for every layout; NeMo looks for one for each model-parallel process."""
        return os.path.join(dirname, basename)

    def _save_state_dict_to_disk(self, state_dict: Mapping[str, Tensor], filepath: str) -> None:
        self.write_weights(state_dict, filepath)

    @classmethod
    def _load_state_dict_from_disk(cls, model_weights: str, map_location: Any = "cpu") -> Mapping[str, Tensor]:
        return cls.read_weights(model_weights, map_location)
