# SPDX-License-Identifier: Apache-2.0
"""The frozen encoder's work, shared by the tensor-parallel processes that all need its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_mtbi.parallel import groups


@torch.no_grad()
def encode_shared(
    encoder: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], audio: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Encodes each utterance on one tensor-parallel process, and gathers the frames on all of them.

    Every share is padded to the longest utterance of the whole batch, as it would be in a single process, so that an
    utterance gets the same frames wherever it is encoded.

    Args:
        encoder: frozen: ``[U, N]`` samples and ``[U]`` lengths to ``[U, E, D]`` frames and ``[U]`` lengths.
        audio: ``[U, N]``, the same on all of these processes.
        lengths: ``[U]``.

    Returns:
        ``[U, E, D]`` and ``[U]``, the same on all of these processes.
    """
    group = groups.tensor_parallel_group()
    size, rank, count = group.size(), group.rank(), len(audio)
    if size == 1:
        return encoder(audio, lengths)
    share = -(-count // size)
    mine = slice(min(rank * share, count), min((rank + 1) * share, count))
    if mine.stop > mine.start:
        encoded, encoded_lengths = encoder(audio[mine], lengths[mine])
    else:  # fewer utterances than processes: its share is thrown away below
        encoded, encoded_lengths = encoder(audio[:1], lengths[:1])
        encoded, encoded_lengths = encoded[:0], encoded_lengths[:0]
    missing = share - len(encoded)
    encoded = F.pad(encoded, (0, 0, 0, 0, 0, missing)).contiguous()  # [share, E, D]
    encoded_lengths = F.pad(encoded_lengths, (0, missing)).contiguous()
    all_encoded = encoded.new_empty(size * share, *encoded.shape[1:])
    all_lengths = encoded_lengths.new_empty(size * share)
    dist.all_gather(list(all_encoded.chunk(size)), encoded, group=group)
    dist.all_gather(list(all_lengths.chunk(size)), encoded_lengths, group=group)
    return all_encoded[:count], all_lengths[:count]
