# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.llm.decoder import GPTDecoder
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device
from nemo_mtbi.testing import ARCHITECTURE, scale_weights

VOCABULARY = 50


def architecture(**changes):
    return DecoderConfig(**{**ARCHITECTURE, "vocab_size": VOCABULARY, **changes})


def make_decoder(dtype=torch.float64, **changes):
    groups.initialize()
    decoder = GPTDecoder(architecture(**changes), dtype)
    scale_weights(decoder)
    return decoder


def full_logits(decoder, tokens):
    """Logits of every position: ``[R, T]`` to ``[R, T, V]``."""
    rows, length = tokens.shape
    hidden = decoder.hidden(decoder.embed_tokens(tokens).transpose(0, 1))
    return decoder.logits(hidden, torch.arange(rows * length)).view(length, rows, -1).transpose(0, 1)


def tokens(rows=3, length=17, seed=0):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face(family, config):
    """A model of transformers with the same architecture and random weights of a healthy scale."""
    import transformers

    shape = dict(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.layernorm_epsilon,
        rope_theta=config.rotary_base,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",  # the eager one has its softmax in float32
    )
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape))
    scale_weights(model, seed=1)
    return model.eval()


def megatron_weights(model, config):
    """The same weights under Megatron's names: queries, keys and values fused by group, gate on top of up."""
    groups, size = config.num_query_groups, config.kv_channels or config.hidden_size // config.num_attention_heads

    def fused(attention, kind):
        q, k, v = (getattr(getattr(attention, f"{x}_proj"), kind) for x in "qkv")
        parts = [x.reshape(groups, -1, size, *x.shape[1:]) for x in (q, k, v)]
        return torch.cat(parts, dim=1).flatten(0, 2)

    weights = {"embedding.word_embeddings.weight": model.model.embed_tokens.weight}
    weights["decoder.final_layernorm.weight"] = model.model.norm.weight
    if not config.tie_embeddings:
        weights["output_layer.weight"] = model.lm_head.weight
    for n, layer in enumerate(model.model.layers):
        name, attention = f"decoder.layers.{n}.", layer.self_attn
        weights[name + "input_layernorm.weight"] = layer.input_layernorm.weight
        weights[name + "self_attention.linear_qkv.weight"] = fused(attention, "weight")
        weights[name + "self_attention.linear_proj.weight"] = attention.o_proj.weight
        weights[name + "pre_mlp_layernorm.weight"] = layer.post_attention_layernorm.weight
        weights[name + "mlp.linear_fc1.weight"] = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        weights[name + "mlp.linear_fc2.weight"] = layer.mlp.down_proj.weight
        if config.add_qkv_bias:
            weights[name + "self_attention.linear_qkv.bias"] = fused(attention, "bias")
        if config.qk_layernorm:
            weights[name + "self_attention.q_layernorm.weight"] = attention.q_norm.weight
            weights[name + "self_attention.k_layernorm.weight"] = attention.k_norm.weight
    return weights


FAMILIES = [
    ("Llama", {}),
    ("Llama", {"tie_embeddings": False}),
    ("Llama", {"num_query_groups": 4, "rotary_base": 500.0, "layernorm_epsilon": 1e-2}),
    ("Llama", {"num_query_groups": 1, "kv_channels": 16}),
    ("Qwen2", {"add_qkv_bias": True, "tie_embeddings": False}),
    ("Qwen3", {"qk_layernorm": True, "kv_channels": 16}),
]


def pair(family, changes, dtype):
    from nemo_mtbi.llm.weights import MemoryWeights, load_weights

    config = architecture(**changes)
    theirs = hugging_face(family, config).to(dtype)
    if dtype == torch.float64:  # transformers norms in float32
        for module in list(theirs.modules()):
            for name, child in module.named_children():
                if type(child).__name__.endswith("RMSNorm"):
                    norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=dtype)
                    norm.weight = child.weight
                    setattr(module, name, norm)
    ours = GPTDecoder(config, dtype)
    load_weights([ours], MemoryWeights(megatron_weights(theirs, config)))
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family, changes", FAMILIES)
def test_logits_are_those_of_transformers(family, changes, dtype, tolerance):
    groups.initialize()
    ours, theirs = pair(family, changes, dtype)
    ids = tokens(rows=2, length=40)
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # otherwise the comparison would say little
    torch.testing.assert_close(full_logits(ours, ids), expected, rtol=0, atol=tolerance)


def test_gradients_of_embeddings_are_those_of_transformers():
    groups.initialize()
    ours, theirs = pair("Llama", {}, torch.float64)
    start = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = start.clone().requires_grad_(True), start.clone().requires_grad_(True)
    hidden = ours.hidden(a.transpose(0, 1))
    ours.logits(hidden, torch.arange(18)).square().sum().backward()
    theirs(inputs_embeds=b).logits.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------- the halves


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def decoder(request):
    return make_decoder(tie_embeddings=request.param)


@torch.no_grad()
def test_the_head_at_some_positions_is_the_whole_head_at_these(decoder):
    ids = tokens(rows=3, length=5)
    hidden = decoder.hidden(decoder.embed_tokens(ids).transpose(0, 1))  # [T, R, H]
    head = decoder.embedding.word_embeddings if decoder.share_embeddings_and_output_weights else decoder.output_layer
    by_hand = hidden @ head.weight.t()  # [T, R, V]
    index = torch.tensor([4 * 3 + 1, 0, 2 * 3 + 2, 0])
    expected = torch.stack([by_hand[4, 1], by_hand[0, 0], by_hand[2, 2], by_hand[0, 0]])
    for gather in (False, True):
        torch.testing.assert_close(decoder.logits(hidden, index, gather), expected, rtol=0, atol=1e-12)
    assert decoder.logits(hidden, index[:0]).shape == (0, VOCABULARY)


@torch.no_grad()
def test_embeddings_are_rows_of_the_table(decoder):
    ids = tokens()
    assert torch.equal(decoder.embed_tokens(ids), decoder.embedding.word_embeddings.weight[ids])


@torch.no_grad()
def test_padding_on_the_right_changes_no_row(decoder):
    ids = tokens(rows=3, length=12)
    lengths = [12, 7, 1]
    full = full_logits(decoder, ids)
    for row, length in enumerate(lengths):
        alone = full_logits(decoder, ids[row : row + 1, :length])
        torch.testing.assert_close(full[row, :length], alone[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it_and_much_after_it(decoder):
    ids = tokens(rows=1, length=10)
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCABULARY
    before, after = full_logits(decoder, ids)[0], full_logits(decoder, changed)[0]
    torch.testing.assert_close(before[:6], after[:6], rtol=0, atol=1e-12)
    assert ((before[6:] - after[6:]).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_a_causal_mask_is_the_default(decoder):
    embeddings = decoder.embed_tokens(tokens(rows=2, length=8)).transpose(0, 1)
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1).expand(2, 1, 8, 8)
    torch.testing.assert_close(decoder.hidden(embeddings, mask), decoder.hidden(embeddings), rtol=0, atol=1e-12)


@torch.no_grad()
def test_train_and_eval_give_the_same(decoder):
    """It stays in train() so that activations can be recomputed; nothing may be random in it."""
    ids = tokens()
    assert decoder.training
    trained = full_logits(decoder, ids)
    decoder.eval()
    try:
        torch.testing.assert_close(full_logits(decoder, ids), trained, rtol=0, atol=0)
    finally:
        decoder.train()


@torch.no_grad()
def test_bfloat16_is_near_float32():
    exact, half = make_decoder(torch.float32), make_decoder(torch.bfloat16)
    ids = tokens(rows=2, length=30)
    found, expected = full_logits(half, ids), full_logits(exact, ids)
    assert found.dtype == torch.bfloat16 == half.decoder.final_layernorm.weight.dtype
    assert (found.float() - expected).abs().mean() < 0.02 * expected.std()


# ------------------------------------------------------------------------------------------------------- recomputation


def recomputing(granularity, dtype):
    """A decoder with ``model.activations_checkpoint_granularity``, frozen, and a list of the layers that have run."""
    megatron = ModelConfig(activations_checkpoint_granularity=granularity).megatron
    groups.initialize()
    decoder = GPTDecoder(architecture(), dtype, **megatron).requires_grad_(False)
    scale_weights(decoder)
    layers, attentions = [], []
    for number, layer in enumerate(decoder.decoder.layers):
        layer.register_forward_hook(lambda *unused, number=number: layers.append(number))
        attention = layer.self_attention.core_attention
        attention.register_forward_hook(lambda *unused, number=number: attentions.append(number))
    return decoder, layers, attentions


def train_embeddings(decoder, dtype):
    """Hidden states, the gradient of the embeddings, and the bytes that autograd kept in between."""
    generator, kept = torch.Generator().manual_seed(3), {}
    embeddings = torch.randn(20, 2, 32, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(True)
    weights = {value.untyped_storage().data_ptr() for value in decoder.parameters()}

    def keep(value):
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage()  # alive, so that no address comes twice
        return value

    with megatron_device():  # where the schedule of a step runs backward too
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            hidden = decoder.hidden(embeddings)
        hidden.double().square().sum().backward()
    return hidden, embeddings.grad, sum(kept[place].nbytes() for place in kept.keys() - weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recomputation_keeps_less_and_changes_no_bit(dtype):
    sizes = {}
    for granularity, runs in ((None, (1, 1)), ("selective", (1, 2)), ("full", (2, 2))):
        decoder, layers, attentions = recomputing(granularity, dtype)
        hidden, gradient, sizes[granularity] = train_embeddings(decoder, dtype)
        assert (len(layers), len(attentions)) == (2 * runs[0], 2 * runs[1])
        if granularity is None:
            expected, expected_gradient = hidden, gradient
        assert torch.equal(hidden, expected) and torch.equal(gradient, expected_gradient)
    assert sizes["selective"] < 0.95 * sizes[None]
    assert sizes["full"] < 0.2 * sizes[None]


def test_nothing_is_recomputed_where_nothing_trains():
    """Rows of text alone in evaluation, with and without autograd."""
    decoder, layers, _ = recomputing("full", torch.float64)
    embeddings = decoder.embed_tokens(tokens()).transpose(0, 1)
    expected = make_decoder().hidden(embeddings)
    with megatron_device():
        assert not decoder.hidden(embeddings).requires_grad
        torch.testing.assert_close(decoder.hidden(embeddings), expected, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(decoder.hidden(embeddings), expected, rtol=0, atol=0)
    assert layers == [0, 1] * 3
