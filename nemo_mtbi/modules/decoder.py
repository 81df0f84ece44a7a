# SPDX-License-Identifier: Apache-2.0
"""The frozen text LLM: Megatron-core's GPT, cut in two where loss and generation need it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device
from nemo_mtbi.parallel.groups import ParallelConfig

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False


@dataclass
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1 and later: long wavelengths are stretched, for longer sequences.

    Attributes:
        factor: by which the longest are stretched.
        low_freq_factor: wavelengths above the original length divided by it are stretched whole.
        high_freq_factor: wavelengths below the original length divided by it stay; those between, in part.
        original_max_position_embeddings: the original length.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass
class DecoderConfig:
    """Architecture of a Llama-like GPT (RoPE, RMSNorm, SwiGLU, grouped queries). Stored beside its weights.

    With ``num_experts`` each layer has as many feed-forward networks of ``ffn_hidden_size``, of which each position
    goes through ``experts_per_token``, weighted by the router's probabilities: over all experts, or with
    ``normalize_experts`` over those that were chosen.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    max_sequence_length: int
    kv_channels: int | None = None
    rotary_base: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    layernorm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    tie_embeddings: bool = True
    num_experts: int | None = None
    experts_per_token: int = 1
    normalize_experts: bool = True

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):  # as YAML has it
            self.rope_scaling = Llama3Scaling(**self.rope_scaling)
        elif not isinstance(self.rope_scaling, Llama3Scaling | None):
            raise TypeError(f"rope_scaling is {self.rope_scaling!r}; it must hold the keys of Llama3Scaling")


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) in float32 or better, with the constructor that a layer spec calls."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


class SDPACoreAttention(MegatronModule):
    """PyTorch's scaled dot product attention in the place of Megatron's unfused core attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, *args, **kwargs):
        super().__init__(config=config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **unused,
    ) -> Tensor:
        """
        Args:
            query: ``[Tq, R, heads, D]``.
            key: ``[Tk, R, groups, D]``.
            value: like ``key``.
            attention_mask: ``[R, 1, Tq, Tk]``, true where attention is forbidden; without it attention is causal if
                ``Tq == Tk`` and free if the queries are the last positions of a cache.
            attn_mask_type: ``no_mask`` once a cache is in use.

        Returns:
            ``[Tq, R, heads * D]``.
        """
        dtype = query.dtype
        if query.device.type == "cpu" and dtype == torch.bfloat16:
            # the CPU kernel is 3 times faster in float32
            query, key, value = query.float(), key.float(), value.float()
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [R, heads, T, D]
        mask = None if attention_mask is None else ~attention_mask
        causal = mask is None and attn_mask_type != AttnMaskType.no_mask
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1).to(dtype)


def layer_spec(config: DecoderConfig, transformer_engine: bool = HAVE_TE) -> ModuleSpec:
    """Layers of Transformer Engine where it can be imported; else Megatron's own with our norm and SDPA."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(config.num_experts, qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(config.num_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def block_spec(
    config: DecoderConfig, megatron: TransformerConfig, chunk: int | None, transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """This stage's layers and final norm. Megatron would take torch's norm for the latter, always in float32."""
    if transformer_engine:
        return layer_spec(config, True)
    layers = [layer_spec(config, False)] * get_num_layers_to_build(megatron, chunk)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def transformer_config(
    config: DecoderConfig, dtype: torch.dtype, layout: ParallelConfig | None = None, **overrides: Any
) -> TransformerConfig:
    """Megatron's configuration under a layout (``None``: the one in force).

    ``overrides`` are keys of Megatron's own, such as those of recomputation.
    """
    layout = layout or groups.layout()
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    values = dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        ffn_hidden_size=config.ffn_hidden_size,
        kv_channels=config.kv_channels,
        layernorm_epsilon=config.layernorm_epsilon,
        qk_layernorm=config.qk_layernorm,
        add_qkv_bias=config.add_qkv_bias,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,  # the loss is divided by the global number of tokens by us, not by microbatches
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # Megatron asks for it beside variable lengths, in dense models too
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        # with batched transfers the interleaved schedule gives wrong gradients when lengths vary
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )
    if config.num_experts is not None:
        values |= dict(
            num_moe_experts=config.num_experts,
            moe_ffn_hidden_size=config.ffn_hidden_size,
            moe_router_topk=config.experts_per_token,
            moe_router_pre_softmax=not config.normalize_experts,
            moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
            moe_router_load_balancing_type="none",
        )
    return TransformerConfig(**{**values, **overrides})


def check_training(config: DecoderConfig, layout: ParallelConfig) -> None:
    """Whether an LLM can be trained with under a layout; it answers under any.

    Raises:
        ValueError: for experts that Megatron trains with sequence parallelism only.
    """
    if config.num_experts and layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise ValueError(
            "an LLM with experts is trained with model.sequence_parallel=true where "
            "model.tensor_model_parallel_size is above 1"
        )


class GPTDecoder(GPTModel):
    """One run of the layers of a ``GPTModel``: all of them, or those of a stage of the pipeline.

    Its forward ends at the hidden states; :meth:`logits` applies the head where it is needed. The head over a 150k
    vocabulary at every position would cost gigabytes; loss and generation read a few positions.

    Args:
        config: architecture.
        dtype: of the weights.
        chunk: which run of layers of this process, under virtual pipeline stages.
        transformer_engine: whether its layers are used, which fuse the norm that an adapter stands behind.
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
        if config.num_experts and not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None  # Megatron reads it also where it could not import it
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
        self.lora: Any = None  # see nemo_mtbi.modules.lora
        if config.rope_scaling is not None:  # Megatron's own arguments hold the factor alone
            rotary = self.rotary_pos_emb
            rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, **vars(config.rope_scaling))
        if self.post_process:
            # ``hidden`` gathers the positions already, since the head reads a few of them only
            self.output_layer.sequence_parallel = False

    def _postprocess(self, hidden_states: Tensor, **unused) -> Tensor:
        return hidden_states

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embedding rows of ``tokens``: ``[R, T]`` to ``[R, T, H]``. First stage only."""
        return self.embedding.word_embeddings(tokens)

    def hidden(
        self,
        embeddings: Tensor | None,
        attention_mask: Tensor | None = None,
        inference_context=None,
        speech: Tensor | None = None,
    ) -> Tensor:
        """Runs this stage's layers.

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
        if self.lora is not None:
            self.lora.speech = self._padded(speech[..., None]) if speech is not None else None
        if split and embeddings is not None:
            embeddings = self._padded(embeddings)
            # [T / tp, R, H]; a copy, since what Megatron returns is a view that keeps all positions alive
            embeddings = scatter_to_sequence_parallel_region(embeddings).clone()
        with megatron_device(self.device):
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
        """``[T, R, n]`` with positions added until tensor-parallel processes can share them, if they do."""
        missing = -len(positions) % self.config.tensor_model_parallel_size if self.config.sequence_parallel else 0
        return F.pad(positions, (0, 0, 0, 0, 0, missing))

    def logits(self, hidden: Tensor, index: Tensor, gather: bool = False) -> Tensor:
        """Applies the head at some positions. Last stage only.

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
    """Rows of the embedding table: every tensor-parallel process has the same number."""
    return -(-size // tensor_parallel) * tensor_parallel


def build_decoder(
    config: DecoderConfig, dtype: torch.dtype = torch.float32, transformer_engine: bool = HAVE_TE, **overrides: Any
) -> list[GPTDecoder]:
    """This process's runs of layers under the layout in force: one, or several with virtual pipeline stages."""
    virtual = groups.layout().virtual_pipeline_model_parallel_size
    chunks = [None] if virtual is None else range(virtual)
    return [GPTDecoder(config, dtype, chunk, transformer_engine, **overrides) for chunk in chunks]


@contextlib.contextmanager
def whole_sequences(chunks: Sequence[GPTDecoder]) -> Iterator[None]:
    """Turns sequence parallelism off for the body: generation adds one position at a time, which can't be split."""
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
