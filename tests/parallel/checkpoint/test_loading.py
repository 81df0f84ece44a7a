# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds under the name of a tensor must be one; whole checkpoints: test_plugin_loading.py."""

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.checkpoint import tensors
from nemo_mtbi.parallel.checkpoint.loading import _Loading
from nemo_mtbi.parallel.checkpoint.tensors import Place


def loading(folder, key, weights=None):
    groups.initialize()
    part = _Loading(folder, weights or {}, Place.here())
    part._metadata = Metadata({key: BytesStorageMetadata()})
    return part


def test_bytes_in_the_place_of_a_weight_are_refused(tmp_path):
    part = loading(tmp_path, "model.w", {"w": torch.nn.Parameter(torch.zeros(2))})
    with pytest.raises(ValueError, match="it holds model.w, but not as a tensor: resume from another checkpoint"):
        part._weight("w")


def test_bytes_in_the_place_of_a_random_state_are_refused(tmp_path):
    """And not taken for a generator that has no state, which is seeded anew."""
    part = loading(tmp_path, tensors.random_key("torch"))
    with pytest.raises(ValueError, match="it holds random.torch, but not as a tensor"):
        part._random(Place.here(), seed=0, step=0)
