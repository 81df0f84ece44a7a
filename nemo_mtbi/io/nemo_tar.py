# SPDX-License-Identifier: Apache-2.0
"""``.nemo`` archives: read with care, since they come from others, and written whole or not at all.

A ``.nemo`` is a tar file. NeMo unpacks it before it looks at it; here all headers are checked first, and weights are
tensors only (safetensors), never a pickle. Its last member holds the SHA-256 of each block of all others: a block is
compared when it is read, before anything is made of it.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from torch import Tensor

from nemo_mtbi.io.digests import CheckedFile, DamageError, HashingWriter
from nemo_mtbi.io.tensor_file import DIGEST_BLOCK, ArchiveError, Spec, StoredTensors, file_size, write_tensors
from nemo_mtbi.io.untrusted_yaml import TEXT_LIMIT, read_yaml

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.safetensors"
DIGESTS = "digests.json"
_HEADER_LIMIT = 2**20  # bytes of one header of a tar file, with its long names
_MAX_MEMBERS = 10_000


# ------------------------------------------------------------------------------------------------------------ headers


@dataclass(frozen=True)
class Member:
    """Place of a file in an archive.

    Attributes:
        start: of its content, in bytes.
        size: of its content, in bytes.
    """

    start: int
    size: int


class _Headers:
    """File for tarfile, which reads headers only; a header that claims gigabytes is refused."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _HEADER_LIMIT:
            raise ArchiveError(f"one of its headers has {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_members(file: BinaryIO, limit: int, whole: bool = True) -> dict[str, Member]:
    """Return the files of a tar archive by name; nothing but headers is read.

    Args:
        file: an uncompressed archive.
        limit: bytes that all files together may have.
        whole: whether they must also end within ``limit`` bytes of the archive.

    Raises:
        ArchiveError: for a name that leads outside, twice the same name, a link, device or sparse file, more bytes
            than ``limit``, or a damaged archive.
    """
    members: dict[str, Member] = {}
    total = 0
    try:
        with tarfile.TarFile(fileobj=cast(BinaryIO, _Headers(file))) as tar:
            for member in tar:
                name = _checked_name(member)
                total += member.size
                if member.size < 0 or total > limit or (whole and member.offset_data + member.size > limit):
                    raise ArchiveError(f"it is cut off, or {name} claims more bytes than there are")
                if len(members) > _MAX_MEMBERS:
                    raise ArchiveError(f"it holds more than {_MAX_MEMBERS} files")
                if member.isdir():
                    continue
                if name in members:
                    raise ArchiveError(f"it holds {name} twice")
                members[name] = Member(member.offset_data, member.size)
    except ArchiveError:
        raise
    except (
        tarfile.TarError,
        ValueError,
        IndexError,
        OverflowError,
        EOFError,
        OSError,
        zlib.error,
        RecursionError,
    ) as error:
        raise ArchiveError(str(error) or type(error).__name__) from error
    return members


def _checked_name(member: tarfile.TarInfo) -> str:
    """Return the path of a member inside the archive."""
    path, shown = PurePosixPath(member.name), member.name[:100]
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        raise ArchiveError(f"{shown!r} in it leads outside")
    kinds = {
        "a symbolic link": member.issym(),
        "a hard link": member.islnk(),
        "a sparse file": member.issparse(),
        "not a plain file": not (member.isreg() or member.isdir()),
    }
    for kind, applies in kinds.items():
        if applies:
            raise ArchiveError(f"{shown!r} in it is {kind}")
    return str(path)


# ------------------------------------------------------------------------------------------------------------ reading


class NemoFile:
    """Reader of a ``.nemo`` file, or of the directory it was unpacked to. It reads in place: nothing is unpacked.

    To be used in ``with``, or closed.

    Raises:
        ArchiveError: if it is not a ``.nemo``, see :func:`read_members`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._open: dict[str, BinaryIO] = {}
        self._members: dict[str, Member] | None = None  # of a file; a directory is looked up by name
        self._digests: Mapping[str, Any] | None = None
        if not self.path.is_dir():
            self._open_file()
        if DIGESTS in self:
            try:
                self._digests = self._read_digests()
            except ValueError:
                self.close()
                raise

    def _open_file(self) -> None:
        if not self.path.is_file():
            raise ArchiveError("it is not a file" if self.path.exists() else "it does not exist")
        try:
            file = self._open[""] = open(self.path, "rb")
            self._members = read_members(file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ArchiveError(error.strerror or str(error)) from error
        except ArchiveError:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._members if self._members is not None else (self.path / name).is_file()

    def unknown(self, known: Iterable[str]) -> list[str]:
        """Return the names of members that are not ``known``; other files of a directory are never read."""
        return sorted(set(self._members or ()) - set(known))

    def _find(self, name: str) -> tuple[BinaryIO, Member]:
        """Return the open file that holds a member, and where in it."""
        if name not in self:
            raise ArchiveError(f"{name} is missing")
        if self._members is not None:
            return self._open[""], self._members[name]
        path = self.path / name
        if path.resolve() != self.path.resolve() / name:
            raise ArchiveError(f"{name!r} in it is a symbolic link")
        if name not in self._open:
            self._open[name] = open(path, "rb")
        return self._open[name], Member(0, os.fstat(self._open[name].fileno()).st_size)

    def _read_digests(self) -> dict[str, Any]:
        """Return the size and the SHA-256 of each block of all members.

        Raises:
            DamageError: if they can't be read.
        """
        file, member = self._find(DIGESTS)
        described = sum(other.size for other in self._members.values()) if self._members else 2**40
        if member.size > TEXT_LIMIT + 100 * (described // DIGEST_BLOCK):
            raise ArchiveError(f"{DIGESTS} has {member.size} bytes, more than it can need")
        file.seek(member.start)
        try:
            content = json.loads(file.read(member.size))
            if content["block"] != DIGEST_BLOCK:
                raise ValueError(f"block is {content['block']!r}")
            return {name: (entry["size"], list(entry["sha256"])) for name, entry in content["members"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamageError(f"{DIGESTS} can't be read ({error})") from error

    def _digests_of(self, name: str, size: int) -> Sequence[str] | None:
        """Return the SHA-256 of each block of a member; ``None`` in an archive of an older format, which has none.

        Raises:
            DamageError: if there are no digests of this member, or its size is another.
        """
        if self._digests is None:
            return None
        if name not in self._digests:
            raise DamageError(f"{DIGESTS} has nothing of {name}")
        wanted, digests = self._digests[name]
        if wanted != size or not all(isinstance(digest, str) for digest in digests):
            raise DamageError(f"{name} has {size} bytes, but {wanted} were written")
        return digests

    def read(self, name: str, limit: int = TEXT_LIMIT) -> bytes:
        """Return the content of a small file.

        Raises:
            DamageError: if it is not what was written.
        """
        file, member = self._find(name)
        if member.size > limit:
            raise ArchiveError(f"{name} has {member.size} bytes, more than it can need")
        digests = self._digests_of(name, member.size)
        return CheckedFile(file, name, member.start, member.size, digests, DIGEST_BLOCK).read()

    def settings(self, name: str) -> dict[str, Any]:
        """Return the content of a YAML file with keys and values."""
        return read_yaml(self.read(name), name)

    def tensors(self, name: str) -> StoredTensors:
        """Return the tensors of a safetensors file; they can be read until this archive is closed."""
        file, member = self._find(name)
        return StoredTensors(file, name, member.start, member.size, self._digests_of(name, member.size))

    def close(self) -> None:
        """Close the file, or all files of the directory."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __enter__(self) -> NemoFile:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------------ writing


class NemoWriter:
    """Writer of the members of a ``.nemo``, one after the other, and behind them the digests of all.

    Equal content gives equal archives.

    Args:
        file: open for writing.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digests: dict[str, dict[str, Any]] = {}

    @contextmanager
    def _member(self, name: str, size: int) -> Iterator[HashingWriter]:
        """Write a member, header and padding, around the content that the body of the ``with`` statement writes."""
        entry = tarfile.TarInfo(f"./{name}")
        entry.size, entry.mode = size, 0o644
        self._file.write(entry.tobuf(tarfile.GNU_FORMAT))
        hashed = HashingWriter(self._file, DIGEST_BLOCK)
        yield hashed
        self._file.write(bytes(-size % tarfile.BLOCKSIZE))
        self._digests[name] = {"size": hashed.size, "sha256": hashed.digests()}

    def add(self, name: str, content: bytes) -> None:
        """Append a file."""
        with self._member(name, len(content)) as file:
            file.write(content)

    def add_tensors(self, name: str, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Append tensors as they come; see :func:`nemo_mtbi.io.tensor_file.write_tensors`."""
        with self._member(name, file_size(specs)) as file:
            write_tensors(file, specs, tensors)

    def end(self) -> None:
        """Write the digests and mark the end of the archive."""
        self.add(DIGESTS, json.dumps({"block": DIGEST_BLOCK, "members": self._digests}, indent=1).encode())
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
