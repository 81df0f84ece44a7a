# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch

from nemo_mtbi.parallel import random_states


@pytest.fixture(autouse=True)
def generators():
    """As they were, afterwards."""
    kept = random_states.capture()
    yield
    random_states.restore(kept)


def draw():
    """Numbers of all generators; of normal ones, each second one is kept by the generator."""
    normal = [random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]
    return [*normal, random.random(), np.random.rand(), torch.rand(1).item(), random.getrandbits(70)]


@pytest.mark.parametrize("before", range(3))
def test_restored_generators_repeat_themselves(before):
    for _ in range(before):
        draw()
    states = random_states.capture()
    expected = [draw() for _ in range(3)]
    draw()
    random_states.restore(states)
    assert [draw() for _ in range(3)] == expected


def test_states_are_tensors_that_nothing_changes():
    states = random_states.capture()
    copies = {name: value.clone() for name, value in states.items()}
    draw()
    assert {"python", "numpy", "torch"} <= states.keys()
    assert all(value.device.type == "cpu" and torch.equal(value, copies[name]) for name, value in states.items())


def test_seeded_states_depend_on_all_parts_and_touch_nothing():
    before = random_states.capture()
    states = random_states.seeded(7, 30, 1)
    assert all(torch.equal(value, before[name]) for name, value in random_states.capture().items())

    def drawn(*parts):
        random_states.restore(random_states.seeded(*parts))
        return tuple(draw())

    random_states.restore(states)
    assert tuple(draw()) == drawn(7, 30, 1)
    assert len({drawn(7, 30, 1), drawn(8, 30, 1), drawn(7, 31, 1), drawn(7, 30, 0), drawn(7, 30, 1, 0)}) == 5
    first = drawn(7, 30, 1)
    assert len({first[3], first[4], first[5]}) == 3  # and each generator has its own


def test_a_missing_state_is_refused():
    states = random_states.capture()
    del states["numpy"]
    with pytest.raises(ValueError, match="no state for the random generators numpy"):
        random_states.restore(states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    from nemo_mtbi.parallel import groups

    def drawn():
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(3, device="cuda")
        return torch.cat([tracked, torch.rand(3, device="cuda")]).tolist()

    groups.initialize()
    model_parallel_cuda_manual_seed(5)
    states = random_states.capture()
    expected = drawn()
    random_states.restore(states)
    assert drawn() == expected
    random_states.restore(random_states.seeded(1, 2))
    assert drawn() != expected
