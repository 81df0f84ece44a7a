# SPDX-License-Identifier: Apache-2.0
from itertools import product

import pytest

from nemo_mtbi.llm.state import LlmState


@pytest.mark.parametrize("adapters, weights_train, was_trained", product([False, True], repeat=3))
def test_a_state_answers_from_how_the_llm_was_built(adapters, weights_train, was_trained):
    state = LlmState.of(adapters=adapters, weights_train=weights_train, was_trained=was_trained)
    assert state.needs_gradients == (adapters or weights_train)
    assert state.weights_train == weights_train
    assert state.has_original_weights == (not weights_train and not was_trained)


def test_every_state_is_reached():
    built = [LlmState.of(adapters=a, weights_train=w, was_trained=t) for a, w, t in product([False, True], repeat=3)]
    assert set(built) == set(LlmState)
