# SPDX-License-Identifier: Apache-2.0
"""Counts of a plan against what is really built, kept by autograd, in flight and cached."""

import weakref
from dataclasses import replace

import pytest
import torch
from lora_values import ALL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.layouts.layout import collate, make_row, speech
from nemo_mtbi.llm.architecture import DecoderConfig
from nemo_mtbi.llm.decoder import GPTDecoder, build_decoder
from nemo_mtbi.llm.full_finetune import unfreeze
from nemo_mtbi.llm.lora import add_lora
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device
from nemo_mtbi.parallel.rank_layout import rank_places
from nemo_mtbi.planning import memory
from nemo_mtbi.planning.memory import Load, SpeechParts, Term
from nemo_mtbi.planning.trained import adapted_memory, trained_memory

LLM = DecoderConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=129,  # no multiple of 2
    max_sequence_length=128,
)
LLMS = {
    "tied": LLM,
    "untied": replace(LLM, tie_embeddings=False),
    "norms_and_bias": replace(LLM, qk_layernorm=True, add_qkv_bias=True),
    "wide_heads": replace(LLM, kv_channels=16, num_query_groups=4),
}
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(2),
    "tp2_sp": ParallelConfig(2, sequence_parallel=True),
    "pp2": ParallelConfig(1, 2),
    "pp4": ParallelConfig(1, 4),
    "pp2_vp2": ParallelConfig(1, 2, 2),
    "tp2_pp2": ParallelConfig(2, 2),
    "tp2_pp2_vp2": ParallelConfig(2, 2, 2),
}
RECOMPUTE = {
    None: {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
NO_SPEECH = SpeechParts(0, 0, 0, 2)


# ----------------------------------------------------------------------------------------------- places and parameters


@pytest.mark.parametrize(
    "layers, hidden, heads, ffn, parameters",
    [(32, 4096, 32, 14336, 8_030_261_248), (80, 8192, 64, 28672, 70_553_706_496)],  # Llama 3 8B and 70B
)
def test_published_sizes(layers, hidden, heads, ffn, parameters):
    config = DecoderConfig(layers, hidden, heads, 8, ffn, 128256, 8192, tie_embeddings=False)
    assert memory.decoder_parameters(config, ParallelConfig(), 0) == parameters
    # over processes: norms stand on each tensor-parallel process
    layout = ParallelConfig(8, 4)
    counts = [memory.decoder_parameters(config, layout, stage) for stage in range(4)]
    assert 8 * sum(counts) == parameters + 7 * hidden * (2 * layers + 1)


def test_one_process_holds_what_is_counted():
    groups.initialize()
    for config in LLMS.values():
        built = sum(value.numel() for value in GPTDecoder(config).parameters())
        assert memory.decoder_parameters(config, ParallelConfig(), 0) == built


def compare_with_built(name):
    """Worker: this process's place, layers and parameters."""
    layout = LAYOUTS[name]
    groups.initialize(layout)
    world, rank = groups.dist.get_world_size(), groups.dist.get_rank()
    for config in LLMS.values():
        chunks = build_decoder(config)
        place = rank_places(layout, config.num_layers, world)[rank]
        here = (groups.data_parallel_rank(), groups.tensor_parallel_rank(), groups.pipeline_parallel_rank())
        assert (place.data, place.tensor, place.stage) == here
        assert place.runs == tuple(tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in chunks)
        built = sum(value.numel() for chunk in chunks for value in chunk.parameters())
        assert memory.decoder_parameters(config, layout, place.stage) == built, (name, rank, config)


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("tp2", 2), ("pp2", 2), ("pp2_vp2", 2), ("tp2_pp2", 4), ("tp2_pp2_vp2", 4)])
def test_every_process_holds_what_is_counted(name, count, processes):
    processes(compare_with_built, name, count=count, timeout=120)


@pytest.mark.slow
def test_replicas_stand_where_they_are_counted(processes):
    processes(compare_with_built, "tp2", count=4, timeout=120)
    processes(compare_with_built, "pp2", count=4, timeout=120)


# --------------------------------------------------------------------------------------------------------- activations


def kept_of_one_row(decoder, length, dtype):
    """Bytes that autograd keeps of a forward, apart from weights and from the tables that recomputation is given."""
    own = {value.untyped_storage()._cdata for value in decoder.parameters()}
    kept = []
    embeddings = torch.randn(length, 1, decoder.architecture.hidden_size, dtype=dtype, requires_grad=True) * 1
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value)
    with hooks, megatron_device("cpu"):
        decoder.hidden(embeddings)
    sizes = {}
    for value in kept:
        if value.numel() > 1:  # one number is the state of recomputation
            split = 2 * len(value) == length  # by sequence parallelism: at first a view of all positions
            storage = value.untyped_storage()
            sizes[storage._cdata] = value.numel() * value.element_size() if split else storage.nbytes()
    return sum(size for key, size in sizes.items() if key not in own)


def check_kept(name="one"):
    """Worker: what is counted for each way of recomputation is what autograd keeps, to the byte."""
    layout, length = LAYOUTS[name], 40
    groups.initialize(layout)
    for config in LLMS.values():
        for granularity, overrides in RECOMPUTE.items():
            decoder = GPTDecoder(config, torch.float32, **overrides).requires_grad_(False).train()
            terms = memory.activation_terms(config, layout, 0, Load(length, 1, 1, 1, 1), 4, granularity)
            counted = sum(term.size for term in terms if term.name in ("kept", "final norm"))
            if granularity == "full":  # the rotary table, which all layers share
                counted += length * 4 * (config.kv_channels or config.hidden_size // config.num_attention_heads)
            if layout.sequence_parallel:  # here the positions of the final norm stay split, too
                assert {term.share for term in terms if term.name == "final norm"} == {2}
            assert counted == kept_of_one_row(decoder, length, torch.float32), (config, granularity)


def test_autograd_keeps_what_is_counted():
    check_kept()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "tp2_sp"])
def test_autograd_keeps_what_is_counted_under_tensor_parallelism(name, processes):
    processes(check_kept, name, timeout=120)


def check_kept_with_adapters(name="one"):
    """Worker: so it is with adapters behind each linear layer, and where all weights train."""
    layout, length = LAYOUTS[name], 40
    groups.initialize(layout)
    lora = LoraConfig(rank=3, target_modules=ALL)
    for granularity in (None, "selective"):
        decoder = GPTDecoder(LLM, torch.float32, **RECOMPUTE[granularity]).requires_grad_(False).train()
        add_lora([decoder], lora)
        adapted = adapted_memory(LLM, lora, layout)
        assert adapted.parameters[0] == sum(value.numel() for value in decoder.parameters() if value.requires_grad)
        terms = memory.activation_terms(LLM, layout, 0, Load(length, 1, 1, 1, 1), 4, granularity, adapted)
        counted = sum(term.size for term in terms if term.name in ("kept", "final norm"))
        assert counted == kept_of_one_row(decoder, length, torch.float32), granularity

        for architecture in LLMS.values():
            if not architecture.num_experts:
                check_kept_where_all_trains(architecture, layout, length, granularity)


def check_kept_where_all_trains(architecture, layout, length, granularity):
    decoder = GPTDecoder(architecture, torch.float32, **RECOMPUTE[granularity]).requires_grad_(False).train()
    unfreeze([decoder], LlmConfig(freeze=False))
    learning, kept = trained_memory(architecture, LlmConfig(freeze=False), layout)
    sizes = [value.numel() for value in decoder.parameters()]
    assert learning.parameters == (sum(sizes),) and learning.largest == (max(sizes),)
    terms = memory.activation_terms(architecture, layout, 0, Load(length, 1, 1, 1, 1), 4, granularity, kept)
    counted = sum(term.size for term in terms if term.name in ("kept", "final norm"))
    assert counted == kept_of_one_row(decoder, length, torch.float32), (architecture, granularity)


def test_autograd_keeps_what_is_counted_with_adapters():
    check_kept_with_adapters()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "tp2_sp"])
def test_adapters_are_counted_under_tensor_parallelism(name, processes):
    processes(check_kept_with_adapters, name, timeout=120)


@pytest.mark.parametrize("granularity", RECOMPUTE)
def test_a_bfloat16_model_keeps_about_what_is_counted(granularity):
    """The CPU's attention works on copies in float32, which CUDA does not need."""
    groups.initialize()
    decoder = GPTDecoder(LLM, torch.bfloat16, **RECOMPUTE[granularity]).requires_grad_(False).train()
    terms = memory.activation_terms(LLM, ParallelConfig(), 0, Load(40, 1, 1, 1, 1), 2, granularity)
    counted = sum(term.size for term in terms if term.name in ("kept", "final norm"))
    assert counted == pytest.approx(kept_of_one_row(decoder, 40, torch.bfloat16), rel=0.15)


@pytest.mark.parametrize(
    "name, stage, microbatches, expected",
    [
        ("one", 0, 9, 1),
        ("pp4", 0, 9, 4),
        ("pp4", 3, 9, 1),
        ("pp4", 0, 2, 2),
        ("pp2_vp2", 0, 8, 5),  # warm-up of 2 x 1 + 1 x 2, and the one under way
        ("pp2_vp2", 1, 8, 3),
        ("pp2_vp2", 0, 1, 4),  # one microbatch is filled up to two, each with two runs
    ],
)
def test_microbatches_in_flight(name, stage, microbatches, expected):
    assert memory.in_flight(LAYOUTS[name], stage, microbatches) == expected


def count_in_flight(name, microbatches):
    """Worker: passes through this process's runs of layers that were begun and not undone, at most."""
    layout = LAYOUTS[name]
    groups.initialize(layout)
    config = replace(LLM, vocab_size=128)
    chunks = build_decoder(config)
    running, most = 0, 0

    def watch(chunk):
        forward = chunk.hidden

        def hidden(embeddings, *args, **kwargs):
            nonlocal running, most
            output = forward(embeddings, *args, **kwargs)
            running += 1
            most = max(most, running)

            def undone(gradient):
                nonlocal running
                running -= 1

            output.register_hook(undone)
            return output

        chunk.hidden = hidden

    for chunk in chunks:
        watch(chunk)
    model = text_only_model(chunks)
    rows = [make_row([1, *speech(0, 2), 2], [3, 4]) for _ in range(int(microbatches))]
    batch = collate([torch.zeros(1)], [2], [replace(row, utterance=0) for row in rows], 5)
    assert len(batch.microbatches) == int(microbatches)
    model.train_step(batch, 10)
    assert running == 0
    assert most == memory.in_flight(layout, groups.pipeline_parallel_rank(), int(microbatches))


def text_only_model(chunks):
    """A speech LLM whose frames come from nowhere."""
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.model import SpeechLLM

    model = SpeechLLM.__new__(SpeechLLM)
    LayoutDecoder.__init__(model, chunks)
    model.loss = LossConfig()
    model.encode = lambda batch: torch.ones(batch.num_frames, 32, requires_grad=True) * 1
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("pp2", 2), ("pp4", 4), ("pp2_vp2", 2)])
@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_the_schedules_hold_as_many_microbatches(name, count, microbatches, processes):
    processes(count_in_flight, name, microbatches, count=count, timeout=120)


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made within have held at once."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._known = set()

    def _free(self, key, size):
        self.held -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            storage = value.untyped_storage() if isinstance(value, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out


@pytest.mark.parametrize("granularity, kl_weight", [*((one, 0.0) for one in RECOMPUTE), (None, 1.0), ("full", 1.0)])
def test_a_step_needs_at_most_what_is_estimated_and_not_much_less(granularity, kl_weight):
    groups.initialize()
    config = DecoderConfig(6, 128, 8, 4, 320, 2000, 512)
    model = text_only_model([GPTDecoder(config, **RECOMPUTE[granularity])])
    model.encode = lambda batch: torch.ones(batch.num_frames, 128, requires_grad=True) * 1
    model.loss = LossConfig(kl_weight=kl_weight)
    twin = make_row([1] * 80, [3] * 80)
    rows = [replace(make_row([1] * 60 + speech(0, 20), [3] * 80, 0), twin=twin if kl_weight else None)] * 4
    batch = collate([torch.zeros(1)], [20], rows, 320)
    with PeakMemory() as measured:
        model.train_step(batch, 100)
    positions = max(part.layout.numel() for part in batch.microbatches)
    responses = max(len(part.response_index) for part in batch.microbatches)
    load = Load(positions, len(batch.microbatches), responses, 1, 1, compared=batch.num_targets if kl_weight else 0)
    counted = memory.stage_memory(config, ParallelConfig(), 0, load=load, speech=NO_SPEECH, granularity=granularity)
    estimate = memory.total(counted.activations) + memory.total(counted.logits)
    assert measured.peak <= estimate <= 1.4 * measured.peak


def test_the_cache_of_generation_is_what_is_counted(monkeypatch):
    from nemo_mtbi.inference import generate as module
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder

    groups.initialize()
    contexts, make = [], module.StaticInferenceContext
    monkeypatch.setattr(module, "StaticInferenceContext", lambda *a: contexts.append(make(*a)) or contexts[-1])
    model = LayoutDecoder(GPTDecoder(LLM))
    config = module.GenerationConfig(max_new_tokens=4, batch_tokens=100)
    module.generate(model, [[1, 2, 3, 4, 5, 6]] * 3, model.no_frames(), 2, config)
    pairs = [pair for context in contexts for pair in context.key_value_memory_dict.values()]
    held = sum(value.numel() * value.element_size() for pair in pairs for value in pair)
    cache, _ = memory.generation_terms(LLM, ParallelConfig(), Load(1, 1, 1, cached=3 * (6 + 4), longest=10), 4)
    assert cache.name == "cache" and cache.size == held


# ---------------------------------------------------------------------------------------------------- sums by hand


def test_a_large_model_by_hand():
    """80 layers on TP 8 x PP 4 in bfloat16: numbers worked out on paper."""
    config = DecoderConfig(80, 8192, 64, 8, 28672, 128256, 8192, tie_embeddings=False)
    layout = ParallelConfig(8, 4, sequence_parallel=True)
    load = Load(positions=8192, microbatches=16, responses=4096, cached=16384, longest=8192)
    first, *_, last = (
        memory.stage_memory(config, layout, stage, load=load, speech=SpeechParts(7, 11, 5, 2), bytes_per_param=2)
        for stage in range(4)
    )
    # 2 norms x 8193 x 4 / 8, attention 3 x 72 x 128 x 2 / 8, tables 4 x 128 x 2, 4 x 28672 x 2 / 8, sums 64 x 4 / 8
    layer = 8193 + 6912 + 1024 + 28672 + 32
    sent = 2 * 4 * 8192 * 8192 * 2 // 8
    assert memory.total(first.activations) == 4 * 20 * 8192 * layer + 8192 * layer + sent
    assert memory.total(last.activations) == 21 * 8192 * layer + sent // 4 + 8192 * 8193 * 4 // 8
    assert first.logits == () and memory.total(last.logits) == 4096 * 16032 * (4 * 4 + 2)
    assert memory.total(first.generation) == 2 * 20 * 16384 * 1024 * 2 // 8 + 16384 * 8192 * 4
    assert memory.total(first.training) == 5 * 4 * 4 and last.training == ()
    assert first.trained == 5 and last.trained == 0
    assert memory.total(first.weights) == 2 * (first.frozen - 7) + 11
    assert last.peak == memory.total(last.weights) + memory.total(last.activations) + memory.total(last.logits)


def test_recomputation_and_sequence_parallelism_save_memory():
    kept = [
        memory.total(memory.layer_terms(LLM, ParallelConfig(2, sequence_parallel=split), 4, granularity))
        for split in (False, True)
        for granularity in RECOMPUTE
    ]
    assert kept == sorted(kept[:3], reverse=True) + sorted(kept[3:], reverse=True)
    assert all(whole > split for whole, split in zip(kept[:3], kept[3:], strict=True))


def test_what_is_shown_is_what_is_computed():
    term = Term("x", ((2, "norms"), (33, "channels"), (4, "B")), 2)
    assert term.size == 132
    assert str(term) == "2 norms x 33 channels x 4 B / 2"
