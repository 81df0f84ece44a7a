# SPDX-License-Identifier: Apache-2.0
"""``.nemo`` archives of NeMo's ASR models, which NeMo itself unpacks and builds: checked before it sees them."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_mtbi.modules.archive import CONFIG, WEIGHTS, read_members
from nemo_mtbi.modules.tensor_file import ArchiveError

_GZIP_GROWTH = 20  # weights hardly shrink; what grows more is a bomb


class TensorArchive(SaveRestoreConnector):
    """NeMo's connector for ASR models: weights as safetensors; NeMo's own ``.ckpt`` is read with ``weights_only``.

    Args:
        dtype: floating-point weights are stored in it; ``None`` keeps theirs.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.model_weights_ckpt = WEIGHTS
        self.dtype = dtype

    def load_config_and_state_dict(self, calling_cls, restore_path: str, *args, **kwargs):
        """NeMo's, behind a check of what it is about to unpack and to build.

        Raises:
            ArchiveError: if the archive is damaged or harmful; nothing was unpacked then.
            RuntimeError: if there is no room to unpack it.
        """
        if not Path(restore_path).is_dir():
            _check_unpacking(Path(restore_path))
        stored = super().load_config_and_state_dict(calling_cls, restore_path, return_config=True)
        _check_target(stored.get("target"))
        return super().load_config_and_state_dict(calling_cls, restore_path, *args, **kwargs)

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
        try:
            if path.suffix == ".safetensors" and not path.exists():
                path = path.with_suffix(".ckpt")  # an archive written by NeMo itself
                return torch.load(path, map_location=map_location, weights_only=True)
            return load_file(path, device=str(map_location or "cpu"))
        except pickle.UnpicklingError as error:
            raise ArchiveError(f"{path.name} holds more than tensors, and is not read: {error}") from error
        except (SafetensorError, EOFError, RuntimeError) as error:
            raise ArchiveError(f"{path.name} is damaged: {error}; copy or save the archive again") from error


def _check_unpacking(path: Path) -> None:
    """Checks the headers of an archive, and that there is room for what is in it."""
    with open(path, "rb") as file:
        size, packed = os.fstat(file.fileno()).st_size, file.read(2) == b"\x1f\x8b"  # NeMo before 1.7 packed
        file.seek(0)
        if packed:
            with gzip.open(file) as unpacked:
                members = read_members(unpacked, _GZIP_GROWTH * size, whole=False)
        else:
            members = read_members(file, size)
    if CONFIG not in members or not members.keys() & {WEIGHTS, "model_weights.ckpt"}:
        raise ArchiveError("it lacks its configuration or its weights")
    need, folder = sum(member.size for member in members.values()), tempfile.gettempdir()
    if need > shutil.disk_usage(folder).free:
        raise RuntimeError(
            f"{path} unpacks to {need} bytes, but {folder} has not so many left: set TMPDIR to a larger folder"
        )


def _check_target(target: object) -> None:
    """NeMo 2 would import whatever an archive names; NeMo 3 has this check too."""
    from nemo.core.classes.common import ALLOWED_TARGET_PREFIXES

    if target is not None and not str(target).startswith(tuple(ALLOWED_TARGET_PREFIXES)):
        raise ArchiveError(f"it names the class {target}, which NeMo does not allow")
