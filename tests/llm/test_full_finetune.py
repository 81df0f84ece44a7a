# SPDX-License-Identifier: Apache-2.0
"""An LLM that trains itself, by Megatron's distributed optimizer, against torch's AdamW on one plain graph."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from llm_steps import microbatches, run
from matrix import with_core

from nemo_mtbi.config.llm import LlmConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.full_finetune import trained_names
from nemo_mtbi.planning import memory
from nemo_mtbi.planning.trained import trained_memory
from nemo_mtbi.testing import ARCHITECTURE, tiny_text_llm

LAYOUTS = {
    "single": (ParallelConfig(), 1),
    "tp2_sp": (ParallelConfig(2, sequence_parallel=True), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp2_dp2": (ParallelConfig(1, 2), 2),
    "tp2_pp2_sp": (ParallelConfig(2, 2, sequence_parallel=True), 1),
    "dp4": (ParallelConfig(), 4),
}
ALWAYS = ("single", "tp2_sp", "pp2_dp2")
MODELS = {  # what is special in the LLM, and what stays frozen
    "tied": (dict(), False),
    "untied": (dict(tie_embeddings=False, vocab_size=129, add_qkv_bias=True), False),  # does not divide by TP
    "qk_norm": (dict(qk_layernorm=True, kv_channels=16, tie_embeddings=False), False),
    "late": (dict(tie_embeddings=False), ["embedding", r"layers\.[01]\.", "output_layer"]),  # a stage learns nothing
}
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
CLIP, DECAY = 5.0, (1.0, 0.5, 0.25)


def build(folder, name):
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    text = load_text_llm(f"{folder}/{name}")
    return LayoutDecoder(text.chunks, llm=LlmConfig(freeze=MODELS[name][1])).train()


def step(model, batches):
    """The loss of a step over all processes; its gradients are left on the weights."""
    from nemo_mtbi.parallel import groups

    loss = run(model, batches)
    loss = torch.zeros(()) if loss is None else loss
    return groups.data_parallel_sum(groups.pipeline_sum(loss)).item()


def reference(folder):
    """Worker: a single process, with torch's optimizer and torch's clipping."""
    from nemo_mtbi.llm.full_finetune import trained_weights
    from nemo_mtbi.parallel import groups

    groups.initialize()
    for name in MODELS:
        tiny_text_llm(f"{folder}/{name}", num_layers=4, **MODELS[name][0])
        model = build(folder, name)
        weights = trained_weights(model.chunks)
        first = {key: value.detach().clone() for key, value in weights.items()}
        optimizer = torch.optim.AdamW(weights.values(), **OPTIONS)
        losses, norms = [], []
        for decay in DECAY:
            optimizer.param_groups[0]["lr"] = OPTIONS["lr"] * decay
            optimizer.zero_grad()
            losses.append(step(model, microbatches()))
            norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), CLIP).item())
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0] and min(norms) > CLIP
        moved = {key: (value - first[key]).abs().max().item() for key, value in weights.items()}
        assert min(moved.values()) > 1e-4, moved
        torch.save({"losses": losses, "norms": norms, "weights": weights}, f"{folder}/{name}.pt")


def compare(folder, layout):
    """Worker: losses, norms, and every weight's share after the last step; what does not train stays."""
    from nemo_mtbi.llm.full_finetune import trained_weights
    from nemo_mtbi.llm.weights import MemoryWeights, load_shares, named_weights
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.gradients import clip_factor
    from nemo_mtbi.parallel.llm_optimizer import AdamOptions, LlmOptimizer

    groups.initialize(LAYOUTS[layout][0])
    report = {}
    for name in MODELS:
        expected = torch.load(f"{folder}/{name}.pt", weights_only=False)
        model = build(folder, name)
        weights = trained_weights(model.chunks)
        frozen = [x for chunk in model.chunks for key, x in named_weights(chunk) if key not in weights]
        before = [value.clone() for value in frozen]
        optimizer = LlmOptimizer(model.chunks, weights, AdamOptions(**OPTIONS))
        losses, norms = [], []
        for decay in DECAY:
            optimizer.zero_grad()
            losses.append(step(model, microbatches(groups.data_parallel_rank(), groups.data_parallel_size())))
            optimizer.reduce()
            norms.append(optimizer.norm())
            optimizer.scale(clip_factor(norms[-1], CLIP))
            optimizer.step(decay)
        torch.testing.assert_close(losses, expected["losses"], rtol=2e-5, atol=0, msg=f"{layout} {name} losses")
        norms = torch.stack(norms).tolist()
        torch.testing.assert_close(norms, expected["norms"], rtol=1e-4, atol=0, msg=f"{layout} {name} norms")
        own = {key: torch.empty_like(value) for key, value in weights.items()}
        load_shares(own.items(), MemoryWeights(expected["weights"]))
        for key, value in weights.items():
            torch.testing.assert_close(value.detach(), own[key], rtol=0, atol=1e-5, msg=f"{layout} {name} {key}")
        assert all(torch.equal(*pair) for pair in zip(frozen, before, strict=True))
        held = sum(len(kind) for one in optimizer.fragments() for kind in one.values.values())
        report[name] = {"weights": sum(value.numel() for value in weights.values()), "moments": held}
        optimizer.close()
    Path(f"{folder}/{layout}.{os.environ['RANK']}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm_training")
    reference(str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(LAYOUTS, ALWAYS))
def test_parity_with_torch(folder, layout, processes):
    config, replicas = LAYOUTS[layout]
    count = config.model_parallel_size * replicas
    processes(compare, folder, layout, count=count)
    reports = [json.loads((folder / f"{layout}.{rank}.json").read_text()) for rank in range(count)]
    for name, (special, freeze) in MODELS.items():
        architecture = DecoderConfig(**{**ARCHITECTURE, "num_layers": 4, **special})
        counts = trained_memory(architecture, LlmConfig(freeze=freeze), config)[0].parameters
        held = [report[name]["weights"] for report in reports]
        # Megatron's order of ranks: tensor parallelism fastest, then data, then the pipeline
        assert held == [counts[rank * len(counts) // count] for rank in range(count)], name
        # ZeRO-1: the replicas share two moments of each number
        assert sum(report[name]["moments"] for report in reports) == 2 * sum(held) // replicas, name


def test_names_that_train():
    architecture = DecoderConfig(**{**ARCHITECTURE, "add_qkv_bias": True})
    names = set(weight_shapes(architecture))
    assert trained_names(architecture, None) == trained_names(architecture, LlmConfig()) == set()
    assert trained_names(architecture, LlmConfig(freeze=False)) == names
    chosen = trained_names(architecture, LlmConfig(freeze=["embedding", r"layers\.0\."]))
    assert chosen == {name for name in names if name.startswith(("decoder.layers.1.", "decoder.final"))}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"freeze": "embedding"}, "model.llm.freeze is 'embedding'; it must be true, false or a list"),
        ({"freeze": ["("]}, "model.llm.freeze is"),
        ({"lr": 0.0}, "model.llm.lr is 0.0; it must be above 0"),
        ({"weight_decay": -1.0}, "model.llm.weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_what_can_not_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        LlmConfig(**values)


def test_experts_learn_by_adapters_only():
    architecture = DecoderConfig(**{**ARCHITECTURE, "num_experts": 4, "experts_per_token": 2})
    with pytest.raises(ValueError, match="must be true for an LLM with experts: it trains by model.lora only"):
        trained_names(architecture, LlmConfig(freeze=False))


@pytest.mark.parametrize("special", [special for special, _ in MODELS.values()])
@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(2, 2), ParallelConfig(1, 2, 2)])
def test_all_weights_are_those_that_a_plan_counts(special, layout):
    architecture = DecoderConfig(**{**ARCHITECTURE, "num_layers": 4, **special})
    learning, kept = trained_memory(architecture, LlmConfig(freeze=False), layout)
    counts = learning.parameters
    stages = range(layout.pipeline_model_parallel_size)
    assert counts == tuple(memory.decoder_parameters(architecture, layout, stage) for stage in stages)
    heads = architecture.head_channels * architecture.num_attention_heads
    assert (kept.whole, kept.shared) == (2 * architecture.hidden_size, heads + architecture.ffn_hidden_size)
    assert sum(map(math.prod, weight_shapes(architecture).values())) == memory.decoder_parameters(
        architecture, ParallelConfig(), 0
    )
