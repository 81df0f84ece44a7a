# SPDX-License-Identifier: Apache-2.0
"""Tensors in files (the safetensors format), written and read one at a time, also inside of a larger file.

The safetensors library wants all tensors in memory, or a file of their own. An LLM in a ``.nemo`` has neither.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from nemo_mtbi.io.digests import CheckedFile, DamageError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
DIGEST_BLOCK = 2**20  # bytes with a digest of their own; of 140 GB the digests have 9 MB
_MAX_HEADER = 2**23  # the names of a hundred layers have 100 kB


class SupportsWrite(Protocol):
    """A file open for writing, or a writer before one."""

    def write(self, data: Any) -> Any:
        """Write a bytes-like object."""
        ...


class ArchiveError(ValueError, tarfile.TarError):
    """A file that is damaged or malicious. The message is one clause that says what is wrong."""


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor.

    Attributes:
        dtype: as stored.
        shape: of the whole tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


# ------------------------------------------------------------------------------------------------------------ reading


class StoredTensors:
    """Tensors of a safetensors file, or of one inside a larger file. Values are read on demand.

    A :class:`nemo_mtbi.llm.weights.WeightSource`.

    Args:
        file: open for reading as long as tensors are read.
        name: for messages.
        start: where the tensors' file begins, in bytes.
        size: its length in bytes.
        digests: SHA-256 of each of its blocks, which are compared when they are read; ``None``: it has none.

    Raises:
        ArchiveError: if the header does not describe exactly what follows it.
        DamageError: if the header is not as it was written; of what follows, when it is read.
    """

    def __init__(self, file: BinaryIO, name: str, start: int, size: int, digests: Sequence[str] | None = None):
        self._file, self._name = CheckedFile(file, name, start, size, digests, DIGEST_BLOCK), name
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ArchiveError(f"{name} is damaged: it is shorter than its header")
        self._entries = dict(self._parse(self._file.read(length)))
        position = 8 + length
        self._starts: dict[str, int] = {}
        for tensor, (spec, (first, last)) in sorted(self._entries.items(), key=lambda entry: entry[1][1]):
            if 8 + length + first != position or last - first != spec.bytes:
                raise ArchiveError(f"{name} is damaged: {tensor} does not lie where its shape says")
            self._starts[tensor] = position
            position += spec.bytes
        if position != size:
            raise ArchiveError(f"{name} is damaged: {position} bytes are described, but it has {size}")

    def _parse(self, text: bytes) -> Iterator[tuple[str, tuple[Spec, tuple[int, int]]]]:
        try:
            header = json.loads(text.decode(), object_pairs_hook=_once)
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                numbers = (*entry["shape"], *entry["data_offsets"])
                if not all(type(number) is int and number >= 0 for number in numbers):
                    raise ValueError(f"{name} has {numbers}")
                first, last = entry["data_offsets"]
                yield name, (Spec(_DTYPES[entry["dtype"]], tuple(entry["shape"])), (first, last))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArchiveError(f"{self._name} is damaged: its header can't be read ({error})") from error

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._entries.keys()

    def spec(self, name: str) -> Spec:
        """Return type and shape of a tensor."""
        return self._entries[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.spec(name).shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {name: self.shape(name) for name in self.names()}

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, in the dtype that is stored."""
        spec = self.spec(name)
        return self._read(name, 0, math.prod(spec.shape)).view(spec.shape)

    def rows(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return a tensor between two positions of one of its first two axes."""
        if axis:
            return self.tensor(name).narrow(axis, start, stop - start)
        shape = self.shape(name)
        row = math.prod(shape[1:])
        return self._read(name, start * row, (stop - start) * row).view(stop - start, *shape[1:])

    def _read(self, name: str, first: int, count: int) -> Tensor:
        """Return ``count`` numbers of a tensor from the ``first`` on, ``[count]``."""
        dtype = self.spec(name).dtype
        data = torch.empty(count, dtype=dtype)
        if not count:
            return data
        self._file.seek(self._starts[name] + first * dtype.itemsize)
        try:
            self._file.readinto(_as_bytes(data))
        except DamageError as error:
            raise DamageError(f"{error}, where {name} lies") from error
        return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse a key that stands twice, of which readers take different values."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def mismatches(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what is missing, unknown or of another shape, each named with why.

    Args:
        expected: shapes by name.
        stored: the shapes that are there.
    """
    wrong = [f"{name} is missing" for name in expected if name not in stored]
    wrong += [f"{name} is unknown" for name in stored if name not in expected]
    for name, shape in expected.items():
        if stored.get(name, shape) != shape:
            wrong.append(f"{name} is {list(stored[name])} instead of {list(shape)}")
    return sorted(wrong)


# ------------------------------------------------------------------------------------------------------------ writing


def exact_dtypes(values: Iterable[Tensor]) -> set[torch.dtype]:
    """Return the floating-point types of at most 32 bits that hold all ``values`` exactly."""
    exact = {torch.float16, torch.bfloat16, torch.float32}
    for value in values:
        for dtype in [dtype for dtype in exact if dtype != value.dtype]:
            if not value.is_floating_point() or not torch.equal(value.to(dtype).to(value.dtype), value):
                exact.discard(dtype)
    return exact


def shortest(own: torch.dtype, exact: set[torch.dtype]) -> torch.dtype:
    """Return the shortest dtype that stores numbers without loss.

    Args:
        own: their dtype.
        exact: see :func:`exact_dtypes`.
    """
    smaller = (torch.float16, torch.bfloat16, torch.float32)
    return next((dtype for dtype in smaller if dtype in exact and dtype.itemsize < own.itemsize), own)


def ordered(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return tensors in the order of the file: long numbers first, so that all are aligned, and then by name."""
    return dict(sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def file_header(specs: Mapping[str, Spec]) -> bytes:
    """Return the header of the file: its length, and JSON."""
    entries, position = {}, 0
    for name, spec in specs.items():
        end = position + spec.bytes
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(specs: Mapping[str, Spec]) -> int:
    """Return the bytes of the whole file."""
    return len(file_header(specs)) + sum(spec.bytes for spec in specs.values())


def write_tensors(file: SupportsWrite, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as they come, so that one of them is in memory at a time.

    Args:
        file: gets :func:`file_size` bytes.
        specs: of all tensors; those of one dtype stand together, long ones first (see :func:`ordered`).
        tensors: in the order of ``specs``; they are converted to its dtypes.

    Raises:
        RuntimeError: if ``tensors`` are not those of ``specs``.
    """
    file.write(file_header(specs))
    missing = list(specs)
    for name, value in tensors:
        if missing[:1] != [name] or tuple(value.shape) != specs[name].shape:
            raise RuntimeError(f"the tensor {name} {list(value.shape)} was not announced: the file would be damaged")
        missing.pop(0)
        value = value.detach().to("cpu", specs[name].dtype).contiguous().view(-1)
        if len(value):
            file.write(_as_bytes(value))
    if missing:
        raise RuntimeError(f"{len(missing)} tensors are missing, such as {missing[0]}: the file would be damaged")


def _as_bytes(flat: Tensor) -> memoryview:
    """Return the memory of a tensor of one axis."""
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers; hints of 3.12 on
