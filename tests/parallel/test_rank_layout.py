# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a model lie."""

import pytest

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel.rank_layout import Place, places


def test_ranks_are_in_megatrons_order():
    found = places(ParallelConfig(2, 2, 2), num_layers=8, world=8)
    early, late = ((0, 1), (4, 5)), ((2, 3), (6, 7))
    assert found == [
        Place(0, 0, 0, 0, early),
        Place(1, 0, 1, 0, early),
        Place(2, 1, 0, 0, early),
        Place(3, 1, 1, 0, early),
        Place(4, 0, 0, 1, late),
        Place(5, 0, 1, 1, late),
        Place(6, 1, 0, 1, late),
        Place(7, 1, 1, 1, late),
    ]


@pytest.mark.parametrize("world", [0, 6])
def test_a_world_that_does_not_divide(world):
    with pytest.raises(ValueError, match=f"{world} processes do not divide .* start a multiple of 4"):
        places(ParallelConfig(2, 2), 4, world)
