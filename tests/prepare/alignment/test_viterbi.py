# SPDX-License-Identifier: Apache-2.0
"""The best path against all paths, against NeMo's own for CTC, and alone against in a batch."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.prepare.alignment.viterbi import IMPOSSIBLE, best_path


def all_paths(frames, states, may_skip):
    """Every legal way, by definition."""
    for path in product(range(states), repeat=frames):
        steps = [b - a for a, b in zip(path, path[1:], strict=False)]
        legal = all(step in (0, 1) or (step == 2 and may_skip[b]) for step, b in zip(steps, path[1:], strict=True))
        if path[0] < 2 and path[-1] >= states - 2 and legal:
            yield path


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5))
def test_no_legal_way_is_better(seed, frames, states):
    generator = torch.Generator().manual_seed(seed)
    emissions = torch.randn(1, frames, states, generator=generator, dtype=torch.float64)
    may_skip = torch.rand(1, states, generator=generator) < 0.5
    (found,) = best_path(emissions, may_skip, torch.tensor([frames]), torch.tensor([states])).tolist()
    ways = list(all_paths(frames, states, may_skip[0].tolist()))
    if not ways:
        assert set(found) == {IMPOSSIBLE}
    else:

        def score(path):
            return sum(float(emissions[0, t, u]) for t, u in enumerate(path))

        assert tuple(found) in ways
        assert score(found) == pytest.approx(max(map(score, ways)), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_a_batch_is_its_utterances(seed):
    generator = torch.Generator().manual_seed(seed)
    frames, states = (torch.randint(1, 9, (4,), generator=generator) for _ in range(2))
    emissions = torch.randn(4, 8, 8, generator=generator)
    may_skip = torch.rand(4, 8, generator=generator) < 0.5
    together = best_path(emissions, may_skip, frames, states)
    for row in range(4):
        t, u = int(frames[row]), int(states[row])
        alone = best_path(
            emissions[row : row + 1, :t, :u], may_skip[row : row + 1, :u], frames[row : row + 1], states[row : row + 1]
        )
        assert together[row, :t].tolist() == alone[0].tolist()
        assert (together[row, t:] == IMPOSSIBLE).all()


def test_ctc_paths_are_those_of_nemo():
    from nemo.collections.asr.parts.utils.aligner_utils import viterbi_decoding

    generator = torch.Generator().manual_seed(3)
    blank, frames = 5, torch.tensor([30, 24, 17])
    log_probs = torch.randn(3, 30, 6, generator=generator).log_softmax(-1)
    tokens = [[0, 1, 1, 2, 4], [3, 3, 3], [2]]
    chains = [[blank, *(entry for token in row for entry in (token, blank))] for row in tokens]
    states = torch.tensor([len(chain) for chain in chains])
    padded = torch.tensor([chain + [blank] * (int(states.max()) - len(chain)) for chain in chains])
    may_skip = torch.zeros_like(padded, dtype=torch.bool)
    may_skip[:, 2:] = (padded[:, 2:] != blank) & (padded[:, 2:] != padded[:, :-2])
    emissions = log_probs.gather(2, padded[:, None].expand(-1, 30, -1))
    ours = best_path(emissions, may_skip, frames, states)
    theirs = viterbi_decoding(log_probs, padded, frames, states)
    for row, length in enumerate(frames.tolist()):
        assert ours[row, :length].tolist() == list(theirs[row])
