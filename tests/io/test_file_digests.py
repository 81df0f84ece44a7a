# SPDX-License-Identifier: Apache-2.0
"""Digests of whole files. Sampling is tested where it is used: in tests of LLM directories and of large files."""

import hashlib

import pytest

from nemo_mtbi.io.file_digests import _BLOCK, file_digest, files_digest


@pytest.mark.parametrize("size", [0, 1, _BLOCK - 1, _BLOCK, _BLOCK + 1, 300_000])
def test_a_digest_is_that_of_the_bytes(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert file_digest(tmp_path / "file") == f"sha256:{hashlib.sha256(content[:size]).hexdigest()}"


def test_a_digest_of_several_files_is_that_of_their_digests_in_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"a" * 10)
    second.write_bytes(b"b" * 10)
    both = hashlib.sha256(hashlib.sha256(b"a" * 10).digest() + hashlib.sha256(b"b" * 10).digest())
    assert files_digest([first, second]) == f"sha256:{both.hexdigest()}"
    assert files_digest([second, first]) != files_digest([first, second])
