# SPDX-License-Identifier: Apache-2.0
"""Tar archives that nobody should unpack."""

import json
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch

BLOCK, GIANT = tarfile.BLOCKSIZE, 10 * 2**30


def member(name: str, content: bytes = b"", form: int = tarfile.GNU_FORMAT, **changes) -> bytes:
    """One member: its header, and its content in whole blocks; ``changes`` are fields of the header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(form) + content + bytes(-len(content) % BLOCK)


def _sparse() -> bytes:
    """A header in the old GNU form whose file would have 10 GB when unpacked."""
    header = bytearray(member("./sparse", type=tarfile.GNUTYPE_SPARSE))
    header[483:495] = b"%011o\0" % GIANT
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _pax_sparse() -> bytes:
    fields = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(GIANT), "GNU.sparse.name": "./sparse"}
    return member("./sparse", b"x", tarfile.PAX_FORMAT, pax_headers=fields)


def _long_name(target: str) -> bytes:
    """A name that stands in a header of its own."""
    return member("././@LongLink", target.encode() + b"\0", type=tarfile.GNUTYPE_LONGNAME) + member("./short")


# What to plant in front of an archive, and what we say of it.
TRICKS: dict[str, tuple[bytes, str]] = {
    "parent": (member("../evil", b"x"), "'../evil' in it leads outside"),
    "parent within": (member("./a/../../evil", b"x"), "leads outside"),
    "parent in a long name": (_long_name("a/" * 80 + "../" * 90 + "evil"), "leads outside"),
    "absolute": (member("/tmp/evil", b"x"), "'/tmp/evil' in it leads outside"),
    "backslash": (member("..\\evil", b"x"), "leads outside"),
    "symbolic link": (member("./a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'./a' in it is a symbolic link"),
    "hard link": (member("./a", type=tarfile.LNKTYPE, linkname="./b"), "'./a' in it is a hard link"),
    "device": (member("./a", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "'./a' in it is not a plain file"),
    "disk": (member("./a", type=tarfile.BLKTYPE), "'./a' in it is not a plain file"),
    "pipe": (member("./a", type=tarfile.FIFOTYPE), "'./a' in it is not a plain file"),
    "sparse": (_sparse(), "in it is a sparse file"),
    "sparse in other words": (_pax_sparse(), "in it is a sparse file"),
    "claims 10 GB": (member("./a", size=GIANT), "a claims more bytes than there are"),
    "header of 10 GB": (member("./a", type=tarfile.XHDTYPE, size=GIANT), "one of its headers has 10737418240 bytes"),
    "name of 10 GB": (member("./a", type=tarfile.GNUTYPE_LONGNAME, size=GIANT), "one of its headers has"),
    "size below zero": (
        member("./a", form=tarfile.PAX_FORMAT, pax_headers={"size": "-512"}),
        "a claims more bytes than there are",
    ),
    "headers without end": (
        b"".join(member("././@LongLink", b"a\0", type=tarfile.GNUTYPE_LONGNAME) for _ in range(3000)),
        "recursion",
    ),
    "twice": (member("./model_config.yaml", b"a: 1"), "it holds model_config.yaml twice"),
    "twice by another name": (member("model_config.yaml", b"a: 1"), "it holds model_config.yaml twice"),
}


def _digests(files: dict[str, bytes]) -> bytes:
    entries = {
        name: {
            "size": len(content),
            "sha256": [sha256(content[at : at + 2**20]).hexdigest() for at in range(0, len(content), 2**20)],
        }
        for name, content in files.items()
    }
    return json.dumps({"block": 2**20, "members": entries}).encode()


def planted(source: Path, path: Path, content: bytes) -> Path:
    """A copy of an archive with something in front."""
    path.write_bytes(content + source.read_bytes())
    return path


def repacked(source: Path, path: Path, change: Callable[[dict[str, bytes]], None], digests: bool = True) -> Path:
    """A copy of an archive whose files ``change`` alters, by name without ``./``.

    Its digests are those of what it holds then, as who has crafted it would see to, or with ``digests=False`` as they
    were.
    """
    with tarfile.open(source) as tar:
        files = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
    stored = files.get("digests.json")
    change(files)
    if digests and stored is not None and files.get("digests.json") == stored:
        files["digests.json"] = _digests({name: files[name] for name in files if name != "digests.json"})
    path.write_bytes(b"".join(member(f"./{n}", content) for n, content in files.items()) + bytes(2 * BLOCK))
    return path


def same(one, other):
    """Whether two mappings of names to tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
