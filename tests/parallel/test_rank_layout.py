# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a model lie."""

import pytest

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel.rank_layout import RankPlace, rank_places


def test_ranks_are_in_megatrons_order():
    found = rank_places(ParallelConfig(2, 2, 2), num_layers=8, world=8)
    early, late = ((0, 1), (4, 5)), ((2, 3), (6, 7))
    assert found == [
        RankPlace(0, 0, 0, 0, early),
        RankPlace(1, 0, 1, 0, early),
        RankPlace(2, 1, 0, 0, early),
        RankPlace(3, 1, 1, 0, early),
        RankPlace(4, 0, 0, 1, late),
        RankPlace(5, 0, 1, 1, late),
        RankPlace(6, 1, 0, 1, late),
        RankPlace(7, 1, 1, 1, late),
    ]


@pytest.mark.parametrize("world", [0, 6])
def test_a_world_that_does_not_divide(world):
    with pytest.raises(ValueError, match=f"{world} processes do not divide .* start a multiple of 4"):
        rank_places(ParallelConfig(2, 2), 4, world)
