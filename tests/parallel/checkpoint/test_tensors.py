# SPDX-License-Identifier: Apache-2.0
"""Which part of a tensor a process holds, in every layout."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.parallel.checkpoint.tensors import Place, fragments, partition, random_origin, random_shard, shards


def shared(shape, axis, parts):
    tensor = torch.zeros(shape)
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = True, axis, parts
    return tensor


def test_megatrons_attributes_say_how_a_parameter_is_shared():
    assert partition(torch.zeros(2)) is None
    assert partition(shared((2, 4), 1, 2)) == (1, 2)
    tensor = shared((2, 4), 1, 2)
    tensor.tensor_model_parallel = False
    assert partition(tensor) is None


@pytest.mark.parametrize("axis, parts", [(0, 1), (1, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_fill_the_whole_tensor_once(axis, parts, size):
    whole = torch.arange(64).reshape(8, 8)
    filled, writers = torch.full((8, 8), -1), torch.zeros(8, 8)
    for data in range(2):
        for rank in range(size):
            mine = torch.cat([part.chunk(size, axis)[rank] for part in whole.chunk(parts, axis)], axis)
            like = shared(mine.shape, axis, parts)
            for shard in shards("x", mine, like, Place(data=data, data_size=2, tensor=rank, tensor_size=size)):
                assert shard.key == "x" and shard.global_shape == (8, 8)
                if shard.replica_id == (0, 0):
                    filled[shard.global_slice()] = shard.data
                    writers[shard.global_slice()] += 1
    assert torch.equal(filled, whole) and bool((writers == 1).all())


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_fragments_of_all_replicas_fill_the_whole_tensor_once(data):
    """Whatever the sizes are: rows that pad a vocabulary are left out, and no box lies in two parts."""
    size, sharing = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([None, (0, 1), (1, 1), (0, 2)]))
    axis, parts = sharing or (None, 1)
    flat = sharing in (None, (0, 1)) and data.draw(st.booleans())
    shape = [data.draw(st.integers(1, 5)) for _ in range(1 if flat else 2)]
    if sharing is not None:
        shape[axis] *= size * parts
    missing = data.draw(st.integers(0, size - 1)) if sharing == (0, 1) else 0
    shape, padded = (max(shape[0] - missing, 1), *shape[1:]), tuple(shape)
    whole = torch.arange(float(math.prod(shape))).reshape(shape) + 1
    wide = torch.zeros(padded)
    wide[: shape[0]] = whole
    filled, writers = torch.zeros(shape), torch.zeros(shape)
    for rank in range(size):
        mine = wide
        if sharing is not None:
            mine = torch.cat([part.chunk(size, axis)[rank] for part in wide.chunk(parts, axis)], axis)
        like = torch.zeros(mine.shape) if sharing is None else shared(mine.shape, axis, parts)
        like.whole_shape = shape
        place, read = Place(tensor=rank, tensor_size=size), torch.zeros(mine.numel())
        cuts = sorted({0, mine.numel(), *data.draw(st.lists(st.integers(0, mine.numel()), max_size=3))})
        for start, stop in itertools.pairwise(cuts):
            flattened = mine.reshape(-1)[start:stop].clone()
            for shard in fragments("x", flattened, start, like, place):
                assert shard.data.untyped_storage().data_ptr() == flattened.untyped_storage().data_ptr()  # fills it
                if not any(shard.replica_id):
                    filled[shard.global_slice()] = shard.data
                    writers[shard.global_slice()] += 1
            for shard in fragments("x", read[start:stop], start, like, place):
                shard.data.copy_(whole[shard.global_slice()])
        assert torch.equal(read, mine.reshape(-1))
    assert torch.equal(filled, whole) and bool((writers == 1).all())


def test_a_copy_of_a_tied_table_is_not_written():
    table = shared((4, 2), 0, 1)
    table.whole_shape = (4, 2)
    assert [shard.replica_id for shard in shards("x", torch.zeros(4, 2), table, Place(1, 2))] == [(0, 1, 0)]
    table.shared = True  # Megatron's word for the head of the last stage
    assert [shard.replica_id for shard in fragments("x", torch.zeros(8), 0, table, Place())] == [(0, 0, 1)]


def test_what_every_process_has_is_written_once():
    places = [Place(data, 2, 0, 1, tensor, 2) for data in range(2) for tensor in range(2)]
    found = [shards("x", torch.zeros(3), torch.zeros(3), place) for place in places]
    assert [len(of_one) for of_one in found] == [1] * 4
    assert len({shard.replica_id for (shard,) in found}) == 4
    assert {shard.global_shape for (shard,) in found} == {(3,)}


def test_random_states_of_all_processes_stand_in_one_tensor():
    filled = torch.full((2, 2, 2, 3), -1.0)
    for number in range(8):
        place = Place(number // 4, 2, number // 2 % 2, 2, number % 2, 2)
        shard = random_shard("torch", torch.full((3,), float(number)), place)
        assert shard.global_shape == (2, 2, 2, 3)
        filled[shard.global_slice()] = shard.data
    assert filled[..., 0].flatten().tolist() == list(range(8))


@pytest.mark.parametrize(
    ("place", "saved", "expected"),
    [  # (data, pipeline, tensor) of the process, sizes then -> whose states it takes
        (Place(1, 2, 1, 2, 1, 2), Place(0, 2, 0, 2, 0, 2), (1, 1, 1)),
        (Place(0, 1, 0, 1, 0, 1), Place(0, 1, 0, 2, 0, 2), (0, 0, 0)),
        (Place(1, 2, 3, 4, 0, 1), Place(0, 2, 0, 2, 0, 2), (1, 0, 0)),
        (Place(1, 2, 1, 4, 1, 2), Place(0, 2, 0, 2, 0, 1), (1, 1, 0)),
        (Place(0, 1, 0, 1, 0, 1), Place(0, 2, 0, 1, 0, 1), None),
        (Place(1, 2, 0, 1, 0, 1), Place(0, 1, 0, 1, 0, 1), None),
    ],
)
def test_whose_random_states_a_process_takes(place, saved, expected):
    found = random_origin(place, saved)
    assert (found and (found.data, found.pipeline, found.tensor)) == expected
    assert found is None or found.sizes == saved.sizes
