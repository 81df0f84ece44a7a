# SPDX-License-Identifier: Apache-2.0
"""The LLM driven by layouts: embedding of tokens and speech frames, and Megatron's schedule over microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import tee
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.layouts.layout import IGNORE, MicroBatch
from nemo_mtbi.llm.decoder import GPTDecoder
from nemo_mtbi.llm.full_finetune import unfreeze
from nemo_mtbi.llm.lora import add_lora
from nemo_mtbi.llm.state import LlmState
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device

# What the last stage makes of a microbatch and its hidden states: what backward starts from, and what is kept.
Finish = Callable[[GPTDecoder, MicroBatch, Tensor], tuple[Tensor, Tensor]]


class LayoutDecoder(nn.Module):
    """The decoder behind layouts, frozen unless configured to train. Alone it is the text LLM: layouts hold token ids.

    Args:
        decoder: the LLM, or this process's runs of its layers.
        lora: adapters in it, which are trained; ``None``: none.
        llm: what trains of itself; ``None``: nothing.
        llm_was_trained: whether an earlier run has trained its weights.

    Attributes:
        chunks: this process's runs of layers.
        llm_state: what of the LLM trains, and whether its weights are the original ones.
    """

    chunks: Sequence[GPTDecoder]

    def __init__(
        self,
        decoder: GPTDecoder | Sequence[GPTDecoder],
        lora: LoraConfig | None = None,
        llm: LlmConfig | None = None,
        llm_was_trained: bool = False,
    ):
        super().__init__()
        chunks = [decoder] if isinstance(decoder, GPTDecoder) else decoder
        self.chunks = cast(Any, nn.ModuleList(chunks).requires_grad_(False))  # registered, and a sequence
        unfreeze(self.chunks, llm)
        if lora is not None:
            add_lora(self.chunks, lora)
        self.llm_state = LlmState.of(
            adapters=self.decoder.lora is not None,
            weights_train=bool(self.decoder.trained_names),
            was_trained=llm_was_trained,
        )

    @property
    def decoder(self) -> GPTDecoder:
        """The first run of layers, for what all of them share: configuration, dtype, device."""
        return self.chunks[0]

    @property
    def device(self) -> torch.device:
        """Device of the decoder."""
        return self.decoder.device

    def no_frames(self) -> Tensor:
        """Return ``[0, H]``: the speech of rows without speech."""
        return torch.zeros(0, self.decoder.config.hidden_size, device=self.device)

    def embed(self, layout: Tensor, frames: Tensor) -> Tensor:
        """Return the LLM's inputs ``[T, R, H]``: embeddings of token ids, frames for negative values. First stage.

        Args:
            layout: ``[R, T]``.
            frames: ``[F, H]``.

        Returns:
            ``[T, R, H]`` in the decoder's dtype.
        """
        tokens = self.decoder.embed_tokens(layout.clamp(min=0))  # [R, T, H]
        if len(frames):
            speech = F.embedding((-layout - 1).clamp(min=0), frames.to(tokens.dtype))  # [R, T, H]
            tokens = torch.where((layout < 0).unsqueeze(-1), speech, tokens)
        return tokens.transpose(0, 1).contiguous()

    def run_schedule(
        self, microbatches: list[MicroBatch], frames: Tensor, finish: Finish, forward_only: bool
    ) -> list[Tensor]:
        """Send microbatches through Megatron's schedule, which runs backward too unless ``forward_only``.

        Returns:
            On the last stage what ``finish`` keeps of each microbatch and of those that :func:`fill_schedule` adds;
            elsewhere nothing.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if not microbatches:  # a step whose cuts were all left out; the schedule would still ask for one microbatch
            return []

        def forward_step(iterator, decoder: GPTDecoder):
            microbatch = next(iterator)
            embeddings = self.embed(microbatch.layout, frames) if decoder.pre_process else None
            if self.llm_state.needs_gradients and embeddings is not None and not forward_only:
                embeddings.requires_grad_()  # text alone does, if nothing in these layers trains
            hidden = decoder.hidden(embeddings, speech=speech_positions(decoder, microbatch.layout))  # [T, R, H]
            if not decoder.post_process:
                return hidden, None
            output, kept = finish(decoder, microbatch, hidden)
            tokens = torch.tensor(len(microbatch.response_index), dtype=torch.int, device=output.device)
            return output, lambda output: (output, tokens, kept)

        microbatches = fill_schedule(microbatches, groups.layout())
        iterators = list(tee(microbatches, len(self.chunks)))
        single = len(self.chunks) == 1
        with megatron_device(self.device):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators[0] if single else iterators,
                model=self.decoder if single else list(self.chunks),
                num_microbatches=len(microbatches),
                seq_length=1,  # not read: lengths vary
                micro_batch_size=1,
                forward_only=forward_only,
            )

    @torch.no_grad()
    def response_states(self, microbatches: list[MicroBatch], frames: Tensor) -> list[Tensor]:
        """Return the LLM's hidden states where it predicts response tokens: a pass of the pipeline, without gradients.

        Kept are hidden states and not logits, which the last stage makes anew where it compares them: for a large
        vocabulary they are a hundred times larger.

        Args:
            microbatches: the rows.
            frames: ``[F, H]`` that their layouts point into.

        Returns:
            On the last stage ``[n, H]`` for each microbatch, after the final norm, in the order of its
            ``response_index``; elsewhere nothing.
        """

        def keep(decoder: GPTDecoder, microbatch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
            states = states_at(hidden, microbatch.response_index)
            return states, states

        # the schedule may have added microbatches, at the end
        return self.run_schedule(microbatches, frames, keep, forward_only=True)[: len(microbatches)]


def speech_positions(decoder: GPTDecoder, layout: Tensor) -> Tensor | None:
    """Return ``[T, R]`` of ``layout [R, T]``: where speech is, if the adapters of the decoder ask for it."""
    if decoder.lora is None or not decoder.lora.config.speech_only:
        return None
    return (layout < 0).t()


def states_at(hidden: Tensor, index: Tensor) -> Tensor:
    """Return ``[n, H]``: hidden states ``[T, R, H]`` at positions ``t * R + r``."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)


def fill_schedule(microbatches: list[MicroBatch], layout: groups.ParallelConfig) -> list[MicroBatch]:
    """Add microbatches of one position and no target until the interleaved schedule can take their number.

    It sends groups of as many microbatches as there are stages through each run of layers in turn, and the last group
    must be whole. They add exactly nothing to loss and gradients.
    """
    if layout.virtual_pipeline_model_parallel_size is None:
        return microbatches
    one = torch.zeros((1, 1), dtype=torch.int64, device=microbatches[0].layout.device)
    none = one[0, :0]
    empty = MicroBatch(one, torch.full_like(one, IGNORE), torch.ones_like(one[0]), none, none, none)
    return microbatches + [empty] * (-len(microbatches) % layout.pipeline_model_parallel_size)
