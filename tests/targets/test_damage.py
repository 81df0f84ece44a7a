# SPDX-License-Identifier: Apache-2.0
"""Targets that are not as they were written: refused by name, or asked again."""

import json
import os
import shutil

import pytest
import target_fakes as fakes

from nemo_mtbi.targets.store import INDEX_FILE, JOINED, check_published, join_shards, read_targets, seal

FakeLLM, content, generate = fakes.FakeLLM, fakes.content, fakes.generate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of three shards, the file that joins them, and an index of all."""
    folder = tmp_path_factory.mktemp("made")
    generate(folder)
    join_shards(folder)
    seal(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def swap(path, other):
    path.rename(path.with_suffix(".x")), other.rename(path), path.with_suffix(".x").rename(other)


HARMS = {
    "a flipped bit": lambda path: flip(path, path.stat().st_size // 2),
    "a flipped bit of the gzip header": lambda path: flip(path, 4),
    "a flipped bit of the checksum": lambda path: flip(path, -6),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 9),
    "empty": lambda path: os.truncate(path, 0),
    "bytes behind": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 7),
    "twice": lambda path: path.write_bytes(path.read_bytes() * 2),
    "another shard": lambda path: swap(path, path.with_name("cuts-00002.jsonl.gz")),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_shard_is_refused(folder, harm):
    path = folder / "cuts-00001.jsonl.gz"
    HARMS[harm](path)
    with pytest.raises(RuntimeError, match=r"cuts-0000[12].jsonl.gz is not as targets.json says: it is damaged"):
        read_targets(folder)


def test_the_joined_file_is_compared_before_training(folder):
    check_published(folder / JOINED)
    whole = (folder / JOINED).read_bytes()
    first = len((folder / "cuts-00000.jsonl.gz").read_bytes())
    for harmed in (whole[:first], whole[first:], whole + whole[:first]):  # each is a whole gzip file
        (folder / JOINED).write_bytes(harmed)
        with pytest.raises(RuntimeError, match=f"{JOINED} is not as targets.json says"):
            check_published(folder / JOINED)


def test_no_flipped_bit_of_the_index_is_read(folder):
    index = folder / INDEX_FILE
    whole, expected = index.read_bytes(), [cut.to_dict() for cut in read_targets(folder)]
    for bit in range(0, 8 * len(whole), 11):
        flip(index, bit // 8, 1 << bit % 8)
        try:
            found = [cut.to_dict() for cut in read_targets(folder)]
        except RuntimeError as error:
            assert str(index) in str(error)
        else:  # white space
            assert found == expected
        index.write_bytes(whole)


def test_targets_of_before_have_no_digests_and_are_read(folder):
    expected = [cut.to_dict() for cut in read_targets(folder)]
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["files"], index["sha256"]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert [cut.to_dict() for cut in read_targets(folder)] == expected
    check_published(folder / JOINED)
    os.truncate(folder / "cuts-00001.jsonl.gz", 9)
    with pytest.raises(RuntimeError, match="cuts-00001.jsonl.gz can't be read: delete it"):
        read_targets(folder)


def test_a_run_that_is_started_again_replaces_nothing_that_is_whole(folder):
    expected = content(folder)
    generate(folder)
    join_shards(folder)
    seal(folder)
    assert content(folder) == expected


def test_a_damaged_batch_is_asked_again(made, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, FakeLLM(fatal=2))
    (partial,) = tmp_path.glob("*.partial.jsonl")
    data = partial.read_bytes()
    assert data.count(b"\n") == 3
    flip(partial, data.index(b'[["') + 3)  # the first letter of an answer: still JSON
    assert json.loads(partial.read_bytes().split(b"\n")[1])
    llm = FakeLLM()
    generate(tmp_path, llm)
    for path in tmp_path.glob("cuts-*.gz"):
        assert path.read_bytes() == (made / path.name).read_bytes()
