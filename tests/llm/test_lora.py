# SPDX-License-Identifier: Apache-2.0
"""Adapters against the weights that they stand for, in every layout."""

import json
import os
from pathlib import Path

import pytest
import torch
from llm_steps import frames, microbatches, run
from lora_values import ALL, draw_adapters
from matrix import with_core

from nemo_mtbi.config.llm import LoraConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.layouts.layout import MicroBatch, make_row
from nemo_mtbi.llm.lora import adapted_modules, adapter_shapes, adapters, add_lora, set_merged, without_lora
from nemo_mtbi.llm.weights import load_shares, sharing_of
from nemo_mtbi.testing import ARCHITECTURE, tiny_text_llm

LAYOUTS = {
    "tp2": (ParallelConfig(2), 1),
    "tp2_sp": (ParallelConfig(2, sequence_parallel=True), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_pp2_sp": (ParallelConfig(2, 2, sequence_parallel=True), 1),
    "tp2_dp2": (ParallelConfig(2), 2),
}
CONFIGS = {
    "all": dict(rank=3, alpha=6.0, target_modules=ALL),
    "speech_only": dict(rank=3, alpha=6.0, target_modules=ALL, speech_only=True),
    "late": dict(rank=2, alpha=2.0, target_modules=[r"layers\.3\..*linear_(qkv|fc2)"]),
}
STEPS = 3


def build(folder, config, values=True):
    """A text LLM with adapters, whose values no layout changes."""
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    text = load_text_llm(folder, torch.float64)
    model = LayoutDecoder(text.chunks, LoraConfig(**config)).train()
    if values:
        draw_adapters(model.chunks)
    return model


def train(model, batches):
    """Losses of all steps and the norm of each gradient."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.gradients import clip_gradients, gradient_norm, sum_gradients

    parameters = list(adapters(model.chunks).values())
    optimizer = torch.optim.AdamW(parameters, 1e-2) if parameters else None
    losses, norms = [], []
    for _ in range(STEPS):
        for value in parameters:
            value.grad = None
        loss = run(model, batches)
        loss = torch.zeros((), dtype=torch.float64) if loss is None else loss
        losses.append(groups.data_parallel_sum(groups.pipeline_sum(loss)).item())
        sum_gradients(parameters)
        norms.append(gradient_norm(parameters, torch.device("cpu")).item())
        clip_gradients(parameters, norms[-1] * torch.ones(()), 0.5)
        if optimizer:
            optimizer.step()
    return {"losses": losses, "norms": norms}


# ------------------------------------------------------------------------------------------------------ one process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_text_llm(tmp_path_factory.mktemp("lora"), num_layers=4, tie_embeddings=False)


def states(model, rows):
    batch = MicroBatch.from_rows(rows, [])
    return torch.cat(model.response_states([batch], frames(model.decoder.config.hidden_size)))


ROWS = [make_row([3, 4, -1, -2, 5], [7, 8]), make_row([9, 4, 3], [7])]


def test_at_first_adapters_add_nothing(folder):
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    plain = LayoutDecoder(load_text_llm(folder, torch.float64).chunks).train()
    model = build(folder, CONFIGS["all"], values=False)
    assert torch.equal(states(model, ROWS), states(plain, ROWS))
    assert {value.requires_grad for value in adapters(model.chunks).values()} == {True}
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained and all(".lora." in name for name in trained)


def test_adapters_are_the_weights_that_they_stand_for(folder):
    """The textbook: W + alpha / rank B A in the place of W."""
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    model, plain = build(folder, CONFIGS["all"]), LayoutDecoder(load_text_llm(folder, torch.float64).chunks).train()
    before = states(plain, ROWS)
    found = adapters(model.chunks)
    with torch.no_grad():
        for name, weight in plain.decoder.named_parameters():
            linear = name.removesuffix(".weight")
            if f"{linear}.lora.a" in found:
                weight += 2.0 * found[f"{linear}.lora.b"] @ found[f"{linear}.lora.a"]
    expected = states(plain, ROWS)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(states(model, ROWS), expected, rtol=0, atol=1e-12)
    with without_lora(model.chunks):
        assert torch.equal(states(model, ROWS), before)
    torch.testing.assert_close(states(model, ROWS), expected, rtol=0, atol=1e-12)


def test_merged_equals_unmerged(folder):
    model = build(folder, CONFIGS["all"])
    before, weights = states(model, ROWS), [value.clone() for value in model.parameters()]
    set_merged(model.chunks, True)
    torch.testing.assert_close(states(model, ROWS), before, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="unmerge them first"), without_lora(model.chunks):
        pass
    set_merged(model.chunks, True)  # once is enough
    set_merged(model.chunks, False)
    for value, first in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(value, first, rtol=0, atol=1e-12)


def test_text_stays_what_it_was_with_speech_only(folder):
    model = build(folder, CONFIGS["speech_only"])
    text, mixed = [make_row([3, 4, 5], [7, 8])], [make_row([3, 4, -1, 5], [7, 8])]
    with without_lora(model.chunks):
        plain, heard = states(model, text), states(model, mixed)
    assert torch.equal(states(model, text), plain)
    assert (states(model, mixed) - heard).abs().max() > 1e-3
    # positions before the first speech do not hear of it
    both = [make_row([3, 4, -1, 5], [7, 8])]
    batch = MicroBatch.from_rows(both, [])
    hidden = model.decoder.hidden(
        model.embed(batch.layout, frames(model.decoder.config.hidden_size)), speech=(batch.layout < 0).t()
    )
    with without_lora(model.chunks):
        other = model.decoder.hidden(model.embed(batch.layout, frames(model.decoder.config.hidden_size)))
    changed = (hidden - other).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False, False] + [True] * (len(changed) - 2)
    with pytest.raises(ValueError, match="speech_only can't be merged"):
        set_merged(model.chunks, True)


def test_generation_sees_speech_as_training_does(folder):
    """Greedy answers from the cache are those of the whole sequence."""
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.generate import generate

    model = build(folder, CONFIGS["speech_only"])
    prompt, given = [3, 4, -1, -2, 5], frames(model.decoder.config.hidden_size)
    answer = generate(model, [prompt, [3, 4, 5]], given, -1, GenerationConfig(6))[0].ids
    whole = states(model, [make_row(prompt, answer)])
    logits = model.decoder.logits(whole[:, None], torch.arange(len(answer)))
    assert logits.argmax(-1).tolist() == answer


def test_shapes_are_known_before_anything_is_built(folder):
    model = build(folder, CONFIGS["all"])
    found = {name: tuple(value.shape) for name, value in adapters(model.chunks).items()}
    assert found == adapter_shapes(model.decoder.architecture, LoraConfig(**CONFIGS["all"]))
    assert sharing_of("decoder.layers.1.mlp.linear_fc1.lora.b") == (0, 2)
    assert sharing_of("decoder.layers.1.mlp.linear_fc1.lora.a") is None
    assert sharing_of("decoder.layers.1.mlp.linear_fc2.lora.a") == (1, 1)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rank": 0}, "model.lora.rank is 0; it must be at least 1"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["("]}, "which is not a regular expression"),
        ({"target_modules": ["linear_qkv", "q_proj"]}, "'q_proj', which matches no layer: names are like decoder"),
    ],
)
def test_what_does_not_fit_is_refused(folder, values, message):
    with pytest.raises(ValueError, match=message):
        build(folder, values, values=False)


def test_recomputation_would_mix_up_microbatches(folder):
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    chunks = load_text_llm(folder, **full).chunks
    with pytest.raises(ValueError, match="speech_only does not go with .*=full: choose selective"):
        add_lora(chunks, LoraConfig(speech_only=True))


def test_targets_are_found_by_pattern():
    from nemo_mtbi.llm.architecture import DecoderConfig

    config = LoraConfig(target_modules=[r"layers\.0\.", "linear_fc2"])
    names = adapted_modules(DecoderConfig(**{**ARCHITECTURE, "num_layers": 2}), config)
    assert [name.removeprefix("decoder.layers.") for name in names] == [
        "0.self_attention.linear_qkv",
        "0.self_attention.linear_proj",
        "0.mlp.linear_fc1",
        "0.mlp.linear_fc2",
        "1.mlp.linear_fc2",
    ]


# ------------------------------------------------------------------------------------------------- several processes


def reference(folder):
    """Worker: what a single process makes of each configuration."""
    from nemo_mtbi.parallel import groups

    groups.initialize()
    for name, config in CONFIGS.items():
        model = build(folder, config)
        found = train(model, microbatches())
        torch.save({**found, "weights": adapters(model.chunks)}, f"{folder}/{name}.pt")


def compare(folder, layout):
    """Worker: loss, norm and every adapter's share after the last step."""
    from nemo_mtbi.llm.weights import MemoryWeights
    from nemo_mtbi.parallel import groups

    groups.initialize(LAYOUTS[layout][0])
    report = {}
    for name, config in CONFIGS.items():
        expected = torch.load(f"{folder}/{name}.pt", weights_only=False)
        model = build(folder, config)
        found = train(model, microbatches(groups.data_parallel_rank(), groups.data_parallel_size()))
        for key in ("losses", "norms"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=0, msg=f"{layout} {name} {key}")
        own = {name: torch.empty_like(value) for name, value in adapters(model.chunks).items()}
        load_shares(own.items(), MemoryWeights(expected["weights"]))
        for part, value in adapters(model.chunks).items():
            torch.testing.assert_close(value.detach(), own[part], rtol=0, atol=1e-9, msg=f"{layout} {name} {part}")
        report[name] = len(own)
    Path(f"{folder}/{layout}.{os.environ['RANK']}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def trained(folder):
    reference(str(folder))
    return folder


def test_the_reference_learns(trained):
    for name in CONFIGS:
        found = torch.load(trained / f"{name}.pt", weights_only=False)
        assert found["losses"][-1] < found["losses"][0] and min(found["norms"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(LAYOUTS, ["tp2_sp", "pp2_vp2", "tp2_dp2"]))
def test_parity_of_adapters(trained, layout, processes):
    config, replicas = LAYOUTS[layout]
    count = config.model_parallel_size * replicas
    processes(compare, trained, layout, count=count)
    reports = [json.loads((trained / f"{layout}.{rank}.json").read_text()) for rank in range(count)]
    assert max(report["late"] for report in reports) == 4 and all(report["all"] for report in reports)
    assert min(report["late"] for report in reports) == (0 if config.pipeline_model_parallel_size > 1 else 4)
