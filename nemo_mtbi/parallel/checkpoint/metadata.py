# SPDX-License-Identifier: Apache-2.0
"""``.metadata``: which tensors a checkpoint holds, and where. Torch pickles it, so it is read with care."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_mtbi.compat.torch import METADATA_CLASSES


class _Unread:
    """Placeholder for objects that Megatron's writer stores to speed up its next save; they are not read."""

    def __init__(self, *args: Any): ...

    def __setstate__(self, state: Any) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles descriptions of tensors only, so that a checkpoint cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        if is_dtype or (module, name) in METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch.distributed.checkpoint.planner" or module.startswith("megatron.core.dist_checkpointing."):
            return _Unread
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint has")


def unpickle_metadata(folder: Path, content: bytes | None = None) -> Metadata:
    """Return the content of ``.metadata``, if it is nothing but a description of tensors and objects.

    Args:
        folder: of the checkpoint.
        content: of the file, where that was read already.

    Raises:
        ValueError: if it is more than that, or damaged.
    """
    if content is None:
        content = (folder / ".metadata").read_bytes()
    try:
        return _MetadataUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{folder / '.metadata'} is not loaded: {error}") from error


def read_metadata(folder: Path, files: Collection[str], content: bytes | None = None) -> Metadata:
    """Return which tensors a checkpoint holds.

    Args:
        folder: the checkpoint.
        files: the files that its marker names.
        content: of ``.metadata``, where that was read already.

    Raises:
        ValueError: if it holds anything but tensors, or refers to other files.
    """
    metadata = unpickle_metadata(folder, content)
    try:
        foreign = {info.relative_path for info in metadata.storage_data.values()} - set(files)
        others = [
            key for key, value in metadata.state_dict_metadata.items() if not isinstance(value, TensorStorageMetadata)
        ]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{folder / '.metadata'} is not loaded: {error}") from error
    if foreign or others:
        raise ValueError(
            f"{folder / '.metadata'} is not loaded: it refers to {', '.join(sorted({*foreign, *others})[:5])}"
        )
    return metadata
