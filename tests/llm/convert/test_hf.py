# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face LLMs of each family answer here, in every layout, as they do there."""

import json
import math
import re

import pytest
import torch
from hf_models import LLM, hf_model
from safetensors.torch import load_file, save_file

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import weight_shapes
from nemo_mtbi.llm.convert.hf import FAMILIES, HFWeights, architecture_of, read_hf_config, segments
from nemo_mtbi.planning.memory import decoder_parameters

COMMON = {**LLM, "vocab_size": 97, "max_position_embeddings": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that tiny sequences have short, middle and long wavelengths
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {  # name: model_type, and what it has beside COMMON
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    "llama3_tied": ("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-6}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, **EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_wide": ("qwen3_moe", {**EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": False}),
}
LAYOUTS = {
    "tp2": ParallelConfig(2),
    "tp2_sp": ParallelConfig(2, sequence_parallel=True),  # what Megatron asks for with experts
    "pp2": ParallelConfig(1, 2),
}
DENSE, SPARSE = ([name for name in MODELS if ("moe" in name) == sparse] for sparse in (False, True))
CHOSEN = {"single": list(MODELS), "tp2": DENSE, "tp2_sp": SPARSE, "pp2": list(MODELS)}
PROMPTS, NEW = 200, 64


def build(name):
    family, own = MODELS[name]
    return hf_model(family, **{**COMMON, **own})


def prompts():
    """200 random prompts of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 31, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(0, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def expected(model):
    """Logits at the last position of each prompt, and greedy answers to some."""
    rows = [torch.tensor([prompt]) for prompt in prompts()]
    logits = torch.cat([model(row).logits[:, -1] for row in rows])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answers = [
        model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :] for row in rows[:8]
    ]
    return {"logits": logits, "answers": torch.stack(answers)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for each model, in shards, with what it answers."""
    folder = tmp_path_factory.mktemp("hf")
    for name in MODELS:
        model = build(name)
        model.save_pretrained(folder / name, max_shard_size="80KB" if name != "llama2" else "1GB")
        torch.save(expected(model), folder / f"{name}.pt")
    return folder


def compare(folder, layout):
    """Worker: logits and answers of all models under a layout."""
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.generate import generate
    from nemo_mtbi.llm.decoder import build_decoder
    from nemo_mtbi.llm.weights import load_weights
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder

    groups.initialize(LAYOUTS.get(layout))
    for name in CHOSEN[layout]:
        source = HFWeights(f"{folder}/{name}")
        model = LayoutDecoder(build_decoder(source.architecture))
        load_weights(model.chunks, source)
        wanted = torch.load(f"{folder}/{name}.pt", weights_only=True)
        logits = last_logits(model, prompts())
        if logits is not None:
            torch.testing.assert_close(logits, wanted["logits"], rtol=0, atol=1e-4)
        found = generate(model, prompts()[:8], model.no_frames(), -1, GenerationConfig(NEW))
        assert [answer.ids for answer in found] == wanted["answers"].tolist(), f"{layout}, {name}"


def last_logits(model, rows):
    """``[rows, V]`` at the last position of each prompt, padded together; ``None`` off the last stage."""
    from nemo_mtbi.layouts.layout import MicroBatch, make_row
    from nemo_mtbi.parallel.cpu import megatron_device

    batch = MicroBatch.from_rows([make_row(row, [1]) for row in rows], [])
    states = model.response_states([batch], model.no_frames())
    if not states:
        return None
    order = batch.response_index.remainder(len(rows)).argsort()
    with megatron_device(model.device):
        logits = model.chunks[-1].logits(states[0][order], torch.arange(len(rows)), gather=True)
    return logits[:, : COMMON["vocab_size"]]


def test_parity_with_hugging_face(folder):
    compare(folder, "single")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_hugging_face_in_parallel(folder, layout, processes):
    processes(compare, folder, layout, count=2)


def test_the_answers_are_worth_comparing(folder):
    for name in MODELS:
        answers = torch.load(folder / f"{name}.pt", weights_only=True)["answers"].tolist()
        assert len({tuple(answer) for answer in answers}) == 8 and len({token for a in answers for token in a}) > 20


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_theirs_is_in_ours_once(folder, name):
    source = HFWeights(folder / name)
    files = {}
    for path in (folder / name).glob("*.safetensors"):
        files |= load_file(path)
    found = []
    for ours in source.names():
        whole = source.rows(ours, 0, 0, source.shape(ours)[0])
        assert tuple(whole.shape) == source.shape(ours)
        found += whole.reshape(len(whole), -1).sum(1).tolist()
    stored = [row for value in files.values() for row in value.reshape(len(value), -1).sum(1).tolist()]
    assert sorted(found) == sorted(stored)


def test_experts_are_counted(folder):
    """What a plan says of parameters, before anything is built."""
    for name in SPARSE:
        source = HFWeights(folder / name)
        stored = sum(math.prod(source.shape(one)) for one in source.names())
        assert decoder_parameters(source.architecture, ParallelConfig(), 0) == stored


def test_some_layers_without_experts_are_refused():
    config = {"model_type": "qwen3_moe", "hidden_act": "silu", **COMMON, **EXPERTS}
    assert architecture_of(config).num_experts == 6
    for change in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}):
        with pytest.raises(ValueError, match="some layers have no experts"):
            architecture_of({**config, **change})
    with pytest.raises(ValueError, match="num_experts is missing"):
        architecture_of({**config, "num_experts": None})


def test_parts_are_those_of_the_whole(folder):
    source = HFWeights(folder / "qwen2")
    for name in ("decoder.layers.1.self_attention.linear_qkv.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        whole = source.rows(name, 0, 0, source.shape(name)[0])
        for start, stop in ((0, 1), (11, 13), (5, 77), (23, 25), (60, 96)):
            assert torch.equal(source.rows(name, 0, start, stop), whole[start:stop])


def test_groups_of_queries_stand_with_their_key_and_value(folder):
    architecture = HFWeights(folder / "qwen3").architecture
    parts = segments("decoder.layers.2.self_attention.linear_qkv.weight", architecture, "qwen3")
    shown = [(part.name.split(".")[-2][0], part.start, part.stop) for part in parts]
    assert shown == [("q", 0, 32), ("k", 0, 16), ("v", 0, 16), ("q", 32, 64), ("k", 16, 32), ("v", 16, 32)]


# ---------------------------------------------------------------------------------------------------- what is refused


CONFIG = {"model_type": "llama", **COMMON, "hidden_act": "silu"}


def test_published_configs_of_both_styles():
    """Llama 3.1 as transformers 4 wrote it, rope_theta beside rope_scaling, and as transformers 5 does."""
    for style in (
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
    ):
        found = architecture_of({**CONFIG, **style})
        assert (found.rotary_base, found.rope_scaling.factor, found.kv_channels) == (500000.0, 8.0, 12)
    assert architecture_of({**CONFIG, "rope_theta": 1e6, "rope_scaling": None}).rotary_base == 1e6
    assert architecture_of({**CONFIG, "model_type": "mistral", "sliding_window": 40}).max_sequence_length == 40
    unused = {"sliding_window": 40, "use_sliding_window": False}
    assert architecture_of({**CONFIG, "model_type": "qwen2", **unused}).max_sequence_length == 96


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' is supported"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias is True.*; mlp_bias is True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "only whole heads are rotated"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling lacks 'low_freq_factor'"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_what_cannot_be_expressed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        architecture_of({**CONFIG, **change})


def test_other_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json can't be read.*give a directory with a Hugging Face causal LLM"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(ValueError, match="model_type is 'gemma2'; supported are llama, mistral, qwen2, qwen3"):
        read_hf_config(tmp_path)


def test_wrong_tensors_are_listed(folder, tmp_path):
    weights = load_file(folder / "llama2" / "model.safetensors")
    weights["model.layers.0.extra.weight"] = torch.zeros(2)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)  # of no use, and no error
    weights["model.norm.weight"] = torch.zeros(3)
    del weights["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((folder / "llama2" / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        HFWeights(tmp_path)
    for part in (
        "layers.1.mlp.up_proj.weight is missing",
        "layers.0.extra.weight is unknown",
        "model.norm.weight is [3] instead of [48]",
    ):
        assert part in str(raised.value)
    assert "inv_freq" not in str(raised.value)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="can't be read.*copy them again"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_must_be_the_embedding(family, tmp_path):
    """Written out it may be there; another one would be left out without a word."""
    values = EXPERTS if family == "qwen3_moe" else {}
    hf_model(family, **{**COMMON, **values, "num_hidden_layers": 1, "tie_word_embeddings": True}).save_pretrained(
        tmp_path
    )
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    other = embedding.clone()
    other[-1, -1] += 1
    for head, refused in ((embedding.clone(), False), (other, True), (embedding[:-1].clone(), True)):
        save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
        if refused:
            with pytest.raises(ValueError, match="lm_head.weight that is not model.embed_tokens.weight, .*tie_word"):
                HFWeights(tmp_path)
        else:
            assert "output_layer.weight" not in HFWeights(tmp_path).names()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file({**tensors, "lm_head.weight": other}, file, metadata={"format": "pt"})
    assert torch.equal(HFWeights(tmp_path).rows("output_layer.weight", 0, 0, len(other)), other)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        HFWeights(tmp_path)


def test_the_table_has_every_family():
    for name, (family, own) in MODELS.items():
        config = {"model_type": family, "hidden_act": "silu", **COMMON, **own}
        shapes = weight_shapes(architecture_of(config))
        layer = {name.removeprefix("decoder.layers.0.") for name in shapes if name.startswith("decoder.layers.0.")}
        assert {re.sub(r"experts\.\d+", "experts.{expert}", part) for part in layer} == set(FAMILIES[family]), name
    assert {family for family, _ in MODELS.values()} == set(FAMILIES)
