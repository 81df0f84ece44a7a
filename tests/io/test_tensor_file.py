# SPDX-License-Identifier: Apache-2.0
"""Our reader and writer of safetensors against the library's own."""

import io
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.io.tensor_file import (
    ArchiveError,
    Spec,
    StoredTensors,
    exact_dtypes,
    file_size,
    mismatches,
    ordered,
    shortest,
    write_tensors,
)

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "cube": torch.arange(24.0).view(2, 3, 4).to(torch.bfloat16),
    "half": torch.tensor([0.5, -2.0]).half(),
    "double": torch.tensor([[1e-300]], dtype=torch.float64),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "small": torch.tensor([1, -1], dtype=torch.int8),
    "none": torch.zeros(0, 5),
}
SPECS = ordered({name: Spec(value.dtype, tuple(value.shape)) for name, value in TENSORS.items()})


def read(content, start=0):
    return StoredTensors(io.BytesIO(content), "weights", start, len(content) - start)


def written(specs=SPECS, tensors=TENSORS):
    file = io.BytesIO()
    write_tensors(file, specs, ((name, tensors[name]) for name in specs))
    return file.getvalue()


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_the_library_reads_what_we_write(tmp_path):
    content = written()
    assert len(content) == file_size(SPECS)
    (tmp_path / "ours.safetensors").write_bytes(content)
    found = load_file(tmp_path / "ours.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], value) for name, value in TENSORS.items())


def test_our_files_are_the_librarys_byte_for_byte(tmp_path):
    """So that an LLM inside an archive has the fingerprint of the one it was loaded from."""
    tensors = {name: torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).half() for name in "bca"}
    save_file(tensors, tmp_path / "theirs.safetensors")
    specs = ordered({name: Spec(value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    assert written(specs, tensors) == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("start", [0, 3, 512])
def test_we_read_what_the_library_writes_also_inside_of_another_file(start):
    stored = read(bytes(start) + save(TENSORS), start)
    assert set(stored.names()) == TENSORS.keys()
    for name, value in TENSORS.items():
        assert same(stored.tensor(name), value)
        assert stored.shapes[name] == tuple(value.shape)


def test_parts_of_a_tensor():
    stored = read(written())
    for name in ("matrix", "cube"):
        for axis in (0, 1):
            assert same(stored.rows(name, axis, 1, 3 if axis else 2), TENSORS[name].narrow(axis, 1, 2 if axis else 1))
    assert stored.rows("matrix", 0, 1, 1).shape == (0, 4)


def test_transposed_and_partial_tensors_are_written_as_they_look():
    wide = torch.arange(6.0).view(2, 3)
    tensors = {"part": wide[:, 1:], "turned": wide.t()}
    specs = {name: Spec(torch.float32, tuple(value.shape)) for name, value in tensors.items()}
    stored = read(written(specs, tensors))
    assert all(same(stored.tensor(name), value) for name, value in tensors.items())


def test_only_the_tensors_that_were_announced_are_written():
    specs = {name: SPECS[name] for name in ("matrix", "half")}
    for given in (["half"], ["half", "matrix"], ["matrix", "half", "count"], ["matrix"]):
        with pytest.raises(RuntimeError, match="the file would be damaged"):
            write_tensors(io.BytesIO(), specs, ((name, TENSORS[name]) for name in given))


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HEADERS = {
    "beyond the end": {"a": entry(data_offsets=[0, 16], shape=[4])},
    "shape that is larger": {"a": entry(shape=[1000])},
    "gap": {"a": entry(data_offsets=[4, 8], shape=[1])},
    "overlap": {"a": entry(), "b": entry()},
    "negative shape": {"a": entry(shape=[-2])},
    "negative offset": {"a": entry(data_offsets=[-8, 0])},
    "no number": {"a": entry(shape=["2"])},
    "fraction": {"a": entry(shape=[2.0])},
    "truth value": {"a": entry(shape=[True, 2])},
    "unknown dtype": {"a": entry(dtype="O")},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "three offsets": {"a": entry(data_offsets=[0, 4, 8])},
    "list": [1, 2],
    "text": "a",
}


def damaged(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie_are_refused(kind):
    with pytest.raises(ArchiveError, match="^weights is damaged: "):
        read(damaged(HEADERS[kind]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (2**63).to_bytes(8, "little") + bytes(100),
        damaged(b"\xff\xfe"),
        damaged(b"[" * 100_000),
        damaged(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"),
        damaged({"a": entry()}) + b"x",
        damaged({"a": entry()})[:-1],
    ],
    ids=["empty", "short", "long header", "no text", "deep", "twice", "too long", "cut off"],
)
def test_files_that_are_none_are_refused(content):
    with pytest.raises(ArchiveError, match="^weights is damaged: "):
        read(content)


def test_a_file_that_shrinks_while_it_is_read_is_an_error():
    content = written()
    file = io.BytesIO(content)
    stored = StoredTensors(file, "weights", 0, len(content))
    file.truncate(len(content) - 60)
    with pytest.raises(DamageError, match="weights ends at byte 557 of 617, where matrix lies"):
        [stored.tensor(name) for name in stored.names()]


def test_no_flipped_bit_of_a_header_gets_past_us():
    """Each either is an error or leaves names, shapes and lengths that fit the file."""
    content, rng = written(), random.Random(0)
    length = int.from_bytes(content[:8], "little")
    outcomes = set()
    for _ in range(2000):
        spot = rng.randrange(8 + length)
        flipped = bytearray(content)
        flipped[spot] ^= 1 << rng.randrange(8)
        try:
            stored = read(bytes(flipped))
            assert sum(stored.tensor(name).nbytes for name in stored.names()) == len(content) - 8 - length
            outcomes.add("read")
        except ArchiveError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_misfits_name_what_is_wrong():
    expected, found = {"a": (2, 3), "b": (1,), "d": ()}, {"a": (3, 2), "c": (1,), "d": ()}
    assert mismatches(expected, found) == ["a is [3, 2] instead of [2, 3]", "b is missing", "c is unknown"]
    assert mismatches(expected, expected) == []


def test_numbers_are_shortened_only_where_nothing_is_lost():
    exact = torch.tensor([1.5, -0.25])
    cases = {
        torch.float16: exact,
        torch.bfloat16: torch.tensor([2.0**100]),
        torch.float32: torch.tensor([1 / 3]),
        torch.float64: torch.tensor([1 / 3], dtype=torch.float64),
        torch.int64: torch.tensor([1]),
    }
    for dtype, value in cases.items():
        assert shortest(value.dtype, exact_dtypes([value])) == dtype
    assert shortest(torch.float32, exact_dtypes([exact, cases[torch.bfloat16]])) == torch.bfloat16
    assert shortest(torch.float64, exact_dtypes([exact.double(), cases[torch.float32].double()])) == torch.float32
    assert shortest(torch.float32, exact_dtypes([torch.tensor([float("nan")])])) == torch.float32
    assert shortest(torch.bfloat16, exact_dtypes([exact.bfloat16()])) == torch.bfloat16
