# SPDX-License-Identifier: Apache-2.0
"""Layers of the text LLM, of Transformer Engine or of Megatron with our norm and attention, and their settings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.parallel import groups

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) in float32 or better, with the constructor that a layer spec calls."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel  # each process sees its own positions only

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x [T, R, H]`` normed and scaled, in its dtype."""
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
        """Attend.

        Args:
            query: ``[Tq, R, heads, D]``.
            key: ``[Tk, R, groups, D]``.
            value: like ``key``.
            attention_mask: ``[R, 1, Tq, Tk]``, true where attention is forbidden; without it attention is causal if
                ``Tq == Tk`` and free if the queries are the last positions of a cache.
            attn_mask_type: ``no_mask`` once a cache is in use.
            **unused: other arguments of Megatron's core attention.

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
    """Return layers of Transformer Engine where it can be imported; else Megatron's own with our norm and SDPA."""
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
    """Return this stage's layers and final norm. Megatron would use torch's norm for the latter, always in float32."""
    if transformer_engine:
        return layer_spec(config, True)
    layers = [layer_spec(config, False)] * get_num_layers_to_build(megatron, chunk)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def transformer_config(
    config: DecoderConfig, dtype: torch.dtype, layout: ParallelConfig | None = None, **overrides: Any
) -> TransformerConfig:
    """Return Megatron's configuration under a layout (``None``: the one in force).

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
        calculate_per_token_loss=True,  # we divide the loss by the global number of tokens, not by microbatches
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
