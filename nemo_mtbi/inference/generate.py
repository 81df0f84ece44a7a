# SPDX-License-Identifier: Apache-2.0
"""Batched greedy generation from layouts with Megatron's key-value cache, under every parallel layout.

Rows of different lengths are padded on the left and masked; rotary positions are relative, so a row answers in a batch
as it answers alone. Under pipeline parallelism positions travel from stage to stage, the last stage picks the tokens
and broadcasts them, and every process of a model replica returns the same answers. Replicas share nothing.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.layouts.layout import group_by_length
from nemo_mtbi.llm.decoder import whole_sequences
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder, speech_positions


@dataclass(frozen=True)
class Generated:
    """One answer: token ids without the token that ended it, and whether the length limit cut it."""

    ids: list[int]
    truncated: bool


def left_pad(layouts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad layouts on the left with token 0.

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


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in ``eval()`` for the body and back into the mode that each was in."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.eval()
        yield
    finally:
        for module, training in modes:
            module.train(training)


def _run_layers(
    model: LayoutDecoder, embeddings: Tensor | None, layout: Tensor, attention: Tensor, context, has_speech: bool
) -> Tensor | None:
    """Send positions through all layers of the pipeline; each process runs its own.

    Args:
        model: the speech LLM.
        embeddings: ``[T, R, H]`` on the first stage, ``None`` on the others.
        layout: ``[R, T]``, from which each process knows the shape.
        attention: mask ``[R, 1, T, keys]``.
        context: the cache of all layers of this process, which are numbered over the whole pipeline.
        has_speech: whether there may be speech among the positions.

    Returns:
        ``[T, R, H]`` on the last stage, ``None`` on the others.
    """
    group, config = groups.pipeline_parallel_group(), model.decoder.config
    # the runs of layers of all processes take turns: the first of each stage, then the second of each
    for chunk in model.chunks:
        if not chunk.pre_process:
            source = dist.get_global_rank(group, (group.rank() - 1) % group.size())
            received = torch.empty(
                *layout.t().shape, config.hidden_size, dtype=config.pipeline_dtype, device=model.device
            )
            dist.recv(received, source, group=group)
            chunk.set_input_tensor(received)
        speech = speech_positions(chunk, layout) if has_speech else None
        hidden = chunk.hidden(embeddings if chunk.pre_process else None, attention, context, speech)
        if chunk.post_process:
            return hidden
        dist.send(hidden.contiguous(), dist.get_global_rank(group, (group.rank() + 1) % group.size()), group=group)
    return None


@torch.no_grad()
def _generate_batch(
    model: LayoutDecoder, layouts: Sequence[Sequence[int]], frames: Tensor, ends: frozenset[int], max_new_tokens: int
) -> list[Generated]:
    """Answers one batch. The decoder must be in ``eval()``, its sequence parallelism off."""
    device, first = model.device, model.chunks[0].pre_process
    layout, mask = (x.to(device) for x in left_pad(layouts))
    rows, longest = layout.shape
    context = StaticInferenceContext(rows, longest + max_new_tokens)
    last_row = torch.arange(rows, device=device)
    embeddings, attention, length = model.embed(layout, frames) if first else None, mask, longest
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    last_tokens = torch.tensor(sorted(ends), device=device)
    answers: list[Tensor] = []
    for step in range(max_new_tokens):
        hidden = _run_layers(model, embeddings, layout, attention, context, step == 0)  # [T, R, H], then [1, R, H]
        context.increment_sequence_len_offset(length)
        if hidden is None:
            token = torch.empty(rows, dtype=torch.int64, device=device)
        else:  # the same on all tensor-parallel processes: each has gathered the same logits
            index = (length - 1) * rows + last_row
            token = model.chunks[-1].logits(hidden, index, gather=True).argmax(-1)  # [R]
        token = groups.pipeline_broadcast(token, -1)
        answers.append(token)
        finished |= torch.isin(token, last_tokens)
        if finished.all():
            break
        layout = token[:, None]
        embeddings = model.embed(layout, frames[:0]) if first else None  # [1, R, H]
        seen = mask[:, :, -1:, :]  # keys that the last prompt position may see, and all generated ones
        attention, length = torch.nn.functional.pad(seen, (0, step + 1), value=False), 1
    results = []
    for row in torch.stack(answers, dim=1).tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        results.append(Generated(row[:stop], truncated=stop == len(row)))
    return results


def check_prompts(
    model: LayoutDecoder, layouts: Sequence[Sequence[int]], num_frames: int, config: GenerationConfig
) -> None:
    """Check prompt layouts before work is spent on them.

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


def _agree_on_prompts(
    model: LayoutDecoder,
    layouts: Sequence[Sequence[int]],
    frames: Tensor,
    ends: frozenset[int],
    config: GenerationConfig,
) -> int:
    """Return the number of the first stage's frames; refuse prompts that differ between processes of a replica.

    Raises:
        ValueError: if they were not: they would wait for each other for ever, or answer a mixture of two prompts.
    """
    if groups.layout().model_parallel_size == 1:
        return len(frames)
    checksum = zlib.crc32(repr(([list(layout) for layout in layouts], sorted(ends), config)).encode())
    reports = groups.gather_objects((checksum, len(frames) if model.chunks[0].pre_process else None), "replica")
    counts = {count for _, count in reports if count is not None}
    if len({checksum for checksum, _ in reports}) > 1 or len(counts) > 1:
        raise ValueError(
            "the processes of a model replica were given different prompts, frames or decoding parameters: call "
            "generate with the same ones on all tensor x pipeline parallel processes"
        )
    return counts.pop()


def generate(
    model: LayoutDecoder,
    layouts: Sequence[Sequence[int]],
    frames: Tensor,
    end_ids: int | Collection[int],
    config: GenerationConfig,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Return greedy answers to prompt layouts, in the order given.

    Under tensor or pipeline parallelism all processes of a model replica call it with the same arguments (except for
    ``frames``), and each returns all answers. Other replicas may get other prompts, or none.

    Args:
        model: the speech LLM; put in ``eval()`` for the duration, with sequence parallelism off.
        layouts: prompts; negative values point into ``frames``.
        frames: ``[F, H]`` connector frames, ``[0, H]`` for text only. Read on the first stage; the others have none.
        end_ids: the token that ends an answer, or all that do.
        config: decoding parameters.
        progress: called with the number of rows answered, after each batch.

    Raises:
        ValueError: if a prompt and its answer could pass the LLM's longest sequence, it points past ``frames``, or
            the processes of a replica were given different arguments. All of them raise.
    """
    ends = frozenset([end_ids] if isinstance(end_ids, int) else end_ids)
    check_prompts(model, layouts, _agree_on_prompts(model, layouts, frames, ends, config), config)
    results: dict[int, Generated] = {}
    costs = [len(layout) + config.max_new_tokens for layout in layouts]
    with evaluating(model.chunks), whole_sequences(model.chunks), megatron_device(model.device):
        for group in group_by_length(costs, config.batch_tokens):
            batch = [layouts[i] for i in group]
            answers = _generate_batch(model, batch, frames, ends, config.max_new_tokens)
            results.update(zip(group, answers, strict=True))
            if progress:
                progress(len(group))
    return [results[i] for i in range(len(layouts))]
