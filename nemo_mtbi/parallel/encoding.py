# SPDX-License-Identifier: Apache-2.0
"""Encoding split by utterance over the tensor-parallel processes, which all need its output."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_mtbi.parallel import groups


class _Gather(torch.autograd.Function):
    """All-gather of equal shares; backward keeps this process's share of the gradient, which is whole on each."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size, ctx.rank = group.size(), group.rank()
        whole = own.new_empty(ctx.size * len(own), *own.shape[1:])
        dist.all_gather(list(whole.chunk(ctx.size)), own.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.size)[ctx.rank], None


def encode_shared(
    encoder: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], audio: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode each utterance on one tensor-parallel process, and gather the frames on all of them.

    Every share is padded to the longest utterance of the whole batch, as it would be in a single process, so that an
    utterance gets the same frames wherever it is encoded. What trains in it gets the gradient of the own utterances,
    which is to be summed over these processes.

    Args:
        encoder: ``[U, N]`` samples and ``[U]`` lengths to ``[U, E, D]`` frames and ``[U]`` lengths.
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
    encoded = F.pad(encoded, (0, 0, 0, 0, 0, missing))  # [share, E, D]
    encoded_lengths = F.pad(encoded_lengths, (0, missing))
    return _Gather.apply(encoded, group)[:count], _Gather.apply(encoded_lengths, group)[:count]
