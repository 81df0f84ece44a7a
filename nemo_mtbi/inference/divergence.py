# SPDX-License-Identifier: Apache-2.0
"""Divergence of the LLM's predictions from speech and from the transcript, at each token of a response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_mtbi.layouts.layout import MicroBatch, Row, group_by_length
from nemo_mtbi.llm.lora import without_lora
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.losses import response_divergence


@torch.no_grad()
def twin_divergences(model: LayoutDecoder, rows: Sequence[Row], frames: Tensor, batch_tokens: int) -> list[float]:
    """Return KL(text || speech) of each row from its text twin, the measure that ``model.loss.kl_weight`` minimizes.

    All processes of a model replica call it together, and each gets all values.

    Args:
        model: the speech LLM; a `LayoutDecoder` alone compares rows of text.
        rows: each with a twin; their layouts point into ``frames``.
        frames: ``[F, H]`` connector frames. Read on the first stage.
        batch_tokens: bound on rows x positions that go through the LLM at once.

    Returns:
        For each row the mean over its response tokens, in nats.

    Raises:
        ValueError: if a row has no twin, or one with other response tokens.
    """
    twins = []
    for row in rows:
        if row.twin is None or row.twin.response != row.response:
            raise ValueError("each row needs a text twin with its own response: make both from the same answer")
        twins.append(row.twin)
    lengths = [max(len(row.layout), len(twin.layout)) for row, twin in zip(rows, twins, strict=True)]
    members = group_by_length(lengths, batch_tokens)
    values = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
    speech_states = _response_states(model, [[rows[i] for i in group] for group in members], frames)
    with without_lora(model.chunks):  # the LLM itself
        text_states = _response_states(model, [[twins[i] for i in group] for group in members], model.no_frames())
    with megatron_device(model.device):
        # off the last stage there are no states
        for group, *states in zip(members, speech_states, text_states, strict=False):
            counts = [len(rows[i].response) for i in group]
            for i, *pair in zip(group, *(part.split(counts) for part in states), strict=True):
                index = torch.arange(len(pair[0]), device=model.device)
                student, teacher = (model.chunks[-1].logits(part, index) for part in pair)  # [n, V / tp]
                values[i] = response_divergence(student, teacher, group=groups.tensor_parallel_group()) / len(index)
    return groups.pipeline_broadcast(values, -1).tolist()


def _response_states(model: LayoutDecoder, batches: Sequence[Sequence[Row]], frames: Tensor) -> list[Tensor]:
    """Return hidden states ``[n, H]`` at the response tokens of each batch, row after row; on the last stage."""
    microbatches = [MicroBatch.from_rows(batch, []).to(model.device) for batch in batches]
    all_states = model.response_states(microbatches, frames)
    orders = [m.response_index.remainder(len(m.lengths)).argsort(stable=True) for m in microbatches]
    return [states[order] for states, order in zip(all_states, orders, strict=False)]
