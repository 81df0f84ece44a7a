# SPDX-License-Identifier: Apache-2.0
"""The text LLM: Megatron-core's GPT, cut in two where loss and generation need it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from nemo_mtbi.compat.megatron import define_optional_gemm, scale_rotary_frequencies
from nemo_mtbi.compat.megatron_gpt import HiddenStatesGPT
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.llm.layers import HAVE_TE, block_spec, transformer_config
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device


def check_training(config: DecoderConfig, layout: ParallelConfig) -> None:
    """Check whether a model with this LLM can be trained under a layout; it generates under any.

    Raises:
        ValueError: for experts that Megatron trains with sequence parallelism only.
    """
    if config.num_experts and layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise ValueError(
            "an LLM with experts is trained with model.sequence_parallel=true where "
            "model.tensor_model_parallel_size is above 1"
        )


class GPTDecoder(HiddenStatesGPT):
    """One run of the layers of a ``GPTModel``: all of them, or those of a stage of the pipeline.

    Its forward ends at the hidden states; :meth:`logits` applies the head where it is needed. The head over a 150k
    vocabulary at every position would cost gigabytes; loss and generation read a few positions.

    Args:
        config: architecture.
        dtype: of the weights.
        chunk: number of this run of layers in its process, under virtual pipeline stages.
        transformer_engine: whether its layers are used; they fuse norms with linear layers, and take no adapters.
        **overrides: keys of Megatron's ``TransformerConfig``.

    Raises:
        ValueError: if the layout in force can't split this architecture.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype = torch.float32,
        chunk: int | None = None,
        transformer_engine: bool = HAVE_TE,
        **overrides: Any,
    ):
        layout = groups.layout()
        layout.check_architecture(
            config.num_layers, config.num_attention_heads, config.num_query_groups, config.ffn_hidden_size
        )
        if config.num_experts:
            define_optional_gemm()
        megatron = transformer_config(config, dtype, layout, **overrides)
        with megatron_device("cuda" if torch.cuda.is_available() else "cpu"):
            super().__init__(
                config=megatron,
                transformer_layer_spec=block_spec(config, megatron, chunk, transformer_engine),
                vocab_size=padded_vocabulary(config.vocab_size, layout.tensor_model_parallel_size),
                max_sequence_length=config.max_sequence_length,
                pre_process=groups.is_first_stage(chunk or 0),
                post_process=groups.is_last_stage(chunk or 0),
                position_embedding_type="rope",
                rotary_base=config.rotary_base,
                share_embeddings_and_output_weights=config.tie_embeddings,
                scatter_embedding_sequence_parallel=False,
                vp_stage=chunk,
            )
        self.architecture = config
        self.lora: Any = None  # see nemo_mtbi.llm.lora
        self.trained_names: frozenset[str] = frozenset()  # canonical, of the weights of the whole LLM that train
        if config.rope_scaling is not None:  # Megatron's own arguments hold the factor alone
            scale_rotary_frequencies(self.rotary_pos_emb, vars(config.rope_scaling))
        if self.post_process:
            # ``hidden`` gathers the positions already, since the head reads a few of them only
            self.output_layer.sequence_parallel = False

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return embedding rows ``[R, T, H]`` of ``tokens [R, T]``. First stage only."""
        return self.embedding.word_embeddings(tokens)

    def hidden(
        self,
        embeddings: Tensor | None,
        attention_mask: Tensor | None = None,
        inference_context=None,
        speech: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's layers.

        Args:
            embeddings: ``[T, R, H]`` on the first stage, ``None`` on the others (they take ``set_input_tensor``).
            attention_mask: ``[R, 1, Tq, Tk]``, true where forbidden. Causal rows padded on the right need none.
            inference_context: Megatron's key-value cache, in ``eval()`` only.
            speech: ``[T, R]``, true where positions are speech, for adapters that see nothing else.

        Returns:
            ``[T, R, H]``; on the last stage after the final norm. With sequence parallelism ``T`` is padded to a
            multiple of the tensor-parallel size, and only the last stage holds all of it.
        """
        split = self.config.sequence_parallel
        if split and embeddings is not None:
            embeddings = self._padded(embeddings)
            # [T / tp, R, H]; a copy, since what Megatron returns is a view that keeps all positions alive
            embeddings = scatter_to_sequence_parallel_region(embeddings).clone()
        marked = self._padded(speech[..., None]) if speech is not None else None  # [T, R, 1]
        with megatron_device(self.device), self.lora.positions(marked) if self.lora else contextlib.nullcontext():
            hidden = self(
                input_ids=None,
                position_ids=None,
                attention_mask=attention_mask,
                decoder_input=embeddings,
                inference_context=inference_context,
            )
        if split and self.post_process:
            # The head's gradient is whole on each process (its column-parallel input sums it), so that each takes its
            # own positions of it; Megatron's default would sum it once more.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def _padded(self, positions: Tensor) -> Tensor:
        """Return ``[T, R, n]`` with positions added until tensor-parallel processes can share them, if they do."""
        missing = -len(positions) % self.config.tensor_model_parallel_size if self.config.sequence_parallel else 0
        return F.pad(positions, (0, 0, 0, 0, 0, missing))

    def logits(self, hidden: Tensor, index: Tensor, gather: bool = False) -> Tensor:
        """Apply the head at some positions. Last stage only.

        Args:
            hidden: ``[T, R, H]``.
            index: ``[n]`` positions, as ``t * R + r``.
            gather: whether every tensor-parallel rank gets the whole vocabulary.

        Returns:
            ``[n, V / tp]``, or ``[n, V]`` with ``gather``. Entries that only pad the vocabulary are ``-inf``.
        """
        chosen = hidden.reshape(-1, 1, hidden.shape[-1]).index_select(0, index)  # [n, 1, H]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        out, _ = self.output_layer(chosen, weight=weight, runtime_gather_output=gather)
        out = out.squeeze(1)
        first = 0 if gather else groups.tensor_parallel_rank() * out.shape[-1]
        real = self.architecture.vocab_size - first
        if real < out.shape[-1]:
            out = out.masked_fill(torch.arange(out.shape[-1], device=out.device) >= real, float("-inf"))
        return out


def padded_vocabulary(size: int, tensor_parallel: int) -> int:
    """Return the rows of the embedding table, of which every tensor-parallel process has the same number."""
    return -(-size // tensor_parallel) * tensor_parallel


def build_decoder(
    config: DecoderConfig, dtype: torch.dtype = torch.float32, transformer_engine: bool = HAVE_TE, **overrides: Any
) -> list[GPTDecoder]:
    """Return this process's runs of layers under the layout in force: one, or several with virtual stages."""
    virtual = groups.layout().virtual_pipeline_model_parallel_size
    chunks = [None] if virtual is None else range(virtual)
    return [GPTDecoder(config, dtype, chunk, transformer_engine, **overrides) for chunk in chunks]


@contextlib.contextmanager
def whole_sequences(chunks: Sequence[GPTDecoder]) -> Iterator[None]:
    """Turn sequence parallelism off for the body: generation adds one position at a time, which can't be split."""
    switched = [
        module
        for chunk in chunks
        for module in (chunk.config, *chunk.modules())
        if getattr(module, "sequence_parallel", False) is True
    ]
    for module in switched:
        module.sequence_parallel = False
    try:
        yield
    finally:
        for module in switched:
            module.sequence_parallel = True
