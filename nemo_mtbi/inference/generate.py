# SPDX-License-Identifier: Apache-2.0
"""Batched greedy generation from layouts with Megatron's key-value cache.

Rows of different lengths are padded on the left and masked; rotary positions are relative, so a row answers in a batch
as it answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from nemo_mtbi.data.layout import group_by_length
from nemo_mtbi.modules.speech_llm import LayoutDecoder
from nemo_mtbi.parallel.cpu import megatron_device


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding parameters. They are part of a target's provenance.

    Attributes:
        max_new_tokens: longest answer; one that reaches it is marked as truncated.
        batch_tokens: bound on rows x (longest prompt + ``max_new_tokens``) of a batch; limits the cache's memory.
    """

    max_new_tokens: int = 64
    batch_tokens: int = 16384

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.batch_tokens < 1:
            raise ValueError(f"generation needs max_new_tokens and batch_tokens of at least 1, got {self}")


@dataclass(frozen=True)
class Generated:
    """One answer: token ids without the end token, and whether the length limit cut it."""

    ids: list[int]
    truncated: bool


def left_pad(layouts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pads layouts on the left with token 0.

    Returns:
        The layout ``[R, T]`` and a mask ``[R, 1, T, T]``, true where attention is forbidden. A padding position
        attends to itself alone: a row of the mask that forbids everything would give NaN.
    """
    longest = max(len(layout) for layout in layouts)
    padding = torch.tensor([longest - len(layout) for layout in layouts])
    padded = torch.tensor([[0] * (longest - len(layout)) + list(layout) for layout in layouts])
    position = torch.arange(longest)
    future = position[None, :] > position[:, None]  # [T, T]
    outside = position[None, :] < padding[:, None]  # [R, T] keys in the padding
    mask = future[None] | outside[:, None, :]
    mask[:, position, position] = False
    return padded, mask[:, None]


@torch.no_grad()
def _generate_batch(
    model: LayoutDecoder, layouts: Sequence[Sequence[int]], frames: Tensor, end_id: int, max_new_tokens: int
) -> list[Generated]:
    """Answers one batch. The decoder must be in ``eval()``."""
    device = model.device
    layout, mask = (x.to(device) for x in left_pad(layouts))
    rows, longest = layout.shape
    context = StaticInferenceContext(rows, longest + max_new_tokens)
    last_row = torch.arange(rows, device=device)
    embeddings, attention = model.embed(layout, frames), mask
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    answers: list[Tensor] = []
    for step in range(max_new_tokens):
        hidden = model.decoder.hidden(embeddings, attention, context)  # [T, R, H], then [1, R, H]
        context.increment_sequence_len_offset(hidden.shape[0])
        index = (hidden.shape[0] - 1) * rows + last_row
        token = model.decoder.logits(hidden, index, gather=True).argmax(-1)  # [R]
        answers.append(token)
        finished |= token == end_id
        if finished.all():
            break
        embeddings = model.embed(token[:, None], frames[:0])  # [1, R, H]
        seen = mask[:, :, -1:, :]  # keys that the last prompt position may see, and all generated ones
        attention = torch.nn.functional.pad(seen, (0, step + 1), value=False)
    results = []
    for row in torch.stack(answers, dim=1).tolist():
        stop = row.index(end_id) if end_id in row else len(row)
        results.append(Generated(row[:stop], truncated=stop == len(row)))
    return results


def check_prompts(
    model: LayoutDecoder, layouts: Sequence[Sequence[int]], num_frames: int, config: GenerationConfig
) -> None:
    """Checks prompt layouts before work is spent on them.

    Raises:
        ValueError: if a prompt and its answer could pass the LLM's longest sequence, or it points past the last frame.
    """
    limit = model.decoder.max_sequence_length - config.max_new_tokens
    for layout in layouts:
        if not 0 < len(layout) <= limit:
            raise ValueError(
                f"a prompt has {len(layout)} positions; with max_new_tokens={config.max_new_tokens} the LLM takes 1 "
                f"to {limit}: use shorter audio or fewer new tokens"
            )
        if -min(layout) > num_frames:
            raise ValueError(f"a prompt points at speech frame {-min(layout) - 1}, but there are {num_frames} frames")


def generate(
    model: LayoutDecoder,
    layouts: Sequence[Sequence[int]],
    frames: Tensor,
    end_id: int,
    config: GenerationConfig,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Greedy answers to prompt layouts, in the order given.

    Args:
        model: the speech LLM; put in ``eval()`` for the duration.
        layouts: prompts; negative values point into ``frames``.
        frames: ``[F, H]`` connector frames, ``[0, H]`` for text only.
        end_id: token that ends an answer.
        config: decoding parameters.
        progress: called with the number of rows answered, after each batch.

    Raises:
        ValueError: if a prompt and its answer could pass the LLM's longest sequence, or it points past ``frames``.
    """
    check_prompts(model, layouts, len(frames), config)
    results: list[Generated | None] = [None] * len(layouts)
    costs = [len(layout) + config.max_new_tokens for layout in layouts]
    training = model.decoder.training
    model.decoder.eval()
    try:
        with megatron_device(model.device):
            for group in group_by_length(costs, config.batch_tokens):
                batch = [layouts[i] for i in group]
                answers = _generate_batch(model, batch, frames, end_id, config.max_new_tokens)
                for i, answer in zip(group, answers, strict=True):
                    results[i] = answer
                if progress:
                    progress(len(group))
    finally:
        model.decoder.train(training)
    return results
