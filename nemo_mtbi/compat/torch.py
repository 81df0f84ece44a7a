# SPDX-License-Identifier: Apache-2.0
"""Internals of torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Class = TypeVar("Class", bound=type)

# What torch's pickle of a checkpoint's metadata names, as module and name; those with underscores are private. Torch
# has no reader of ``.metadata`` but ``pickle.load``, which builds anything. A file that is no pickle would replace it.
METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
}
# Names of collectives before torch 2.13, and now.
_RENAMED = {
    "_allgather_base": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
}


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which new tensors have shape, dtype and device, and no memory.

    Uses ``torch._subclasses.fake_tensor.FakeTensorMode``. The public device ``meta`` does not do: constructors that
    name the CPU take memory under it, and operations that mix both devices fail. A public name of the mode would
    replace it.
    """
    return FakeTensorMode()


def storage_id(value: torch.Tensor) -> int:
    """Return a number that tensors share if they share memory, and no others as long as both are alive.

    Uses ``UntypedStorage._cdata``: the public ``data_ptr`` is 0, or an error, for tensors without memory, which are
    counted here.
    """
    return value.untyped_storage()._cdata


def set_files(storage: Any, files: Any) -> None:
    """Let torch's reader or writer of checkpoints open files by another object.

    Sets ``fs`` of ``FileSystemReader`` or ``FileSystemWriter``, whose constructors take none. Such an argument would
    replace it.

    Args:
        storage: the reader or the writer.
        files: a ``FileSystem``.
    """
    storage.fs = files


def add_old_collectives(cls: Class) -> Class:
    """Add to a subclass of ``ProcessGroup`` its collectives by the names that torch before 2.13 calls.

    Two of those have an underscore (``_allgather_base``, ``_reduce_scatter_base``). To be removed when torch 2.13 is
    the oldest that is supported.
    """
    for old, new in _RENAMED.items():
        setattr(cls, old, getattr(cls, new))
    return cls
