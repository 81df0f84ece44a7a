# SPDX-License-Identifier: Apache-2.0
"""The frozen text LLM: Megatron-core's GPT, cut in two where loss and generation need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
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

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False


@dataclass
class DecoderConfig:
    """Architecture of a Llama-like GPT (RoPE, RMSNorm, SwiGLU, grouped queries). Stored beside its weights."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    max_sequence_length: int
    kv_channels: int | None = None
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    tie_embeddings: bool = True


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
            query, key, value = (
                query.float(),
                key.float(),
                value.float(),
            )  # the CPU kernel is 3 times faster in float32
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [R, heads, T, D]
        mask = None if attention_mask is None else ~attention_mask
        causal = mask is None and attn_mask_type != AttnMaskType.no_mask
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1).to(dtype)


def layer_spec(config: DecoderConfig, transformer_engine: bool = HAVE_TE) -> ModuleSpec:
    """Layers of Transformer Engine where it can be imported; else Megatron's own with our norm and SDPA."""
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def block_spec(config: DecoderConfig, megatron: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """This stage's layers and final norm. Megatron would take torch's norm for the latter, always in float32."""
    if HAVE_TE:
        return layer_spec(config)
    layers = [layer_spec(config)] * get_num_layers_to_build(megatron)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def transformer_config(config: DecoderConfig, dtype: torch.dtype, **parallel) -> TransformerConfig:
    """Megatron's configuration. ``parallel`` holds its own parallelism keys."""
    return TransformerConfig(
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
        **parallel,
    )


class GPTDecoder(GPTModel):
    """``GPTModel`` whose forward ends at the hidden states; :meth:`logits` applies the head where it is needed.

    The head over a 150k vocabulary at every position would cost gigabytes; loss and generation read a few positions.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype = torch.float32, **parallel):
        megatron = transformer_config(config, dtype, **parallel)
        with megatron_device("cuda" if torch.cuda.is_available() else "cpu"):
            super().__init__(
                config=megatron,
                transformer_layer_spec=block_spec(config, megatron),
                vocab_size=config.vocab_size,
                max_sequence_length=config.max_sequence_length,
                pre_process=groups.is_first_stage(),
                post_process=groups.is_last_stage(),
                position_embedding_type="rope",
                rotary_base=config.rotary_base,
                share_embeddings_and_output_weights=config.tie_embeddings,
                scatter_embedding_sequence_parallel=False,
            )
        self.architecture = config

    def _postprocess(self, hidden_states: Tensor, **unused) -> Tensor:
        return hidden_states

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embedding rows of ``tokens``: ``[R, T]`` to ``[R, T, H]``. First stage only."""
        return self.embedding.word_embeddings(tokens)

    def hidden(
        self, embeddings: Tensor | None, attention_mask: Tensor | None = None, inference_context=None
    ) -> Tensor:
        """Runs this stage's layers.

        Args:
            embeddings: ``[T, R, H]`` on the first stage, ``None`` on the others (they take ``set_input_tensor``).
            attention_mask: ``[R, 1, Tq, Tk]``, true where forbidden. Causal rows padded on the right need none.
            inference_context: Megatron's key-value cache, in ``eval()`` only.

        Returns:
            ``[T, R, H]``; on the last stage after the final norm.
        """
        with megatron_device(self.device):
            return self(
                input_ids=None,
                position_ids=None,
                attention_mask=attention_mask,
                decoder_input=embeddings,
                inference_context=inference_context,
            )

    def logits(self, hidden: Tensor, index: Tensor, gather: bool = False) -> Tensor:
        """Applies the head at some positions. Last stage only.

        Args:
            hidden: ``[T, R, H]``.
            index: ``[n]`` positions, as ``t * R + r``.
            gather: whether every tensor-parallel rank gets the whole vocabulary.

        Returns:
            ``[n, V / tp]``, or ``[n, V]`` with ``gather``.
        """
        chosen = hidden.reshape(-1, 1, hidden.shape[-1]).index_select(0, index)  # [n, 1, H]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        out, _ = self.output_layer(chosen, weight=weight, runtime_gather_output=gather)
        return out.squeeze(1)
