# SPDX-License-Identifier: Apache-2.0
import io
import os
from hashlib import sha256

import pytest

from nemo_mtbi.io.digests import CheckedFile, DamageError, HashingWriter

CONTENT = bytes(range(250)) * 2


def written(*pieces, block=64):
    file = io.BytesIO()
    writer = HashingWriter(file, block)
    assert [writer.write(piece) for piece in pieces] == [len(piece) for piece in pieces]
    return file.getvalue(), writer


@pytest.mark.parametrize("sizes", [[500], [1] * 500, [63, 1, 64, 65, 200, 107], [0, 128, 0, 372]])
def test_blocks_are_hashed_however_they_are_written(sizes):
    stream = io.BytesIO(CONTENT)
    content, writer = written(*(stream.read(size) for size in sizes))
    assert content == CONTENT and writer.size == 500 and writer.tell() == 500
    assert writer.digests() == [sha256(CONTENT[at : at + 64]).hexdigest() for at in range(0, 500, 64)]


def test_a_last_block_may_be_whole_and_a_file_empty():
    assert len(written(CONTENT[:128])[1].digests()) == 2 and written()[1].digests() == []
    assert CheckedFile(io.BytesIO(), "nothing", 0, 0, [], 64).read() == b""


def checked(content, digests, start=0):
    return CheckedFile(io.BytesIO(b"x" * start + content + b"behind"), "part", start, len(content), digests, 64)


@pytest.mark.parametrize("start", [0, 13])
def test_a_part_is_read_like_a_file(start):
    _, writer = written(CONTENT)
    file = checked(CONTENT, writer.digests(), start)
    assert file.read() == CONTENT and file.read() == b"" and file.seekable()
    for first, count in ((0, 64), (10, 20), (60, 10), (64, 128), (70, 300), (499, 9), (500, 1)):
        assert file.seek(first) == first
        assert file.read(count) == CONTENT[first : first + count] and file.tell() == min(first + count, 500)
    assert file.seek(-3, os.SEEK_END) == 497 and file.read() == CONTENT[-3:]


@pytest.mark.parametrize("position", [0, 63, 64, 300, 499])
def test_no_byte_of_a_block_that_has_changed_is_given_out(position):
    _, writer = written(CONTENT)
    damaged = bytearray(CONTENT)
    damaged[position] ^= 1
    file = checked(bytes(damaged), writer.digests())
    for first in range(0, 500, 50):
        hit = first // 64 <= position // 64 <= (first + 49) // 64
        file.seek(first)
        if hit:
            with pytest.raises(DamageError, match="part is not as it was written: the SHA-256 of its bytes"):
                file.read(50)
        else:
            assert file.read(50) == CONTENT[first : first + 50]


def test_without_digests_nothing_is_compared_but_the_length():
    assert checked(CONTENT, None).read() == CONTENT
    with pytest.raises(DamageError, match="part ends at byte 500 of 501"):
        CheckedFile(io.BytesIO(CONTENT), "part", 0, 501, None, 64).read()
    with pytest.raises(DamageError, match="500 bytes, and digests of 1 blocks"):
        checked(CONTENT, ["a"])
