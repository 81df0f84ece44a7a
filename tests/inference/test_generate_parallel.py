# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout answers as a single process does, token for token, and on every process."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from matrix import with_core

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.parallel import ParallelConfig

LAYOUTS = {  # name: layout and data-parallel size
    "tp2": (ParallelConfig(2), 1),
    "tp2_sp": (ParallelConfig(2, sequence_parallel=True), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "pp4": (ParallelConfig(1, 4), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_pp2_sp": (ParallelConfig(2, 2, sequence_parallel=True), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp2_dp2": (ParallelConfig(1, 2), 2),
}
# The others combine what these have, and run with --full.
ALWAYS = ("pp2_vp2", "tp2_pp2_sp")
MODELS = {"tied": True, "untied": False}
VOCABULARY = 129  # two processes can't share it evenly
FRAMES, NEW = 12, 10
PROMPTS = ("say it", "first word", "count it", "")
SECONDS = (0.8, 1.5, 0.5, 1.5, 0.7)  # utterances


class Ids(ChatFormat):
    """Answers as numbers: the tokenizer does not know the last word of the LLM's vocabulary."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def build(folder, model, dtype=torch.float64):
    """The model of a folder under the layout in force, and its chat format."""
    from nemo_mtbi.config.connector import ConnectorConfig
    from nemo_mtbi.speech_llm.pretrained import load_speech_llm

    torch.manual_seed(3)
    connector = ConnectorConfig(hidden_size=24)
    speech_llm, text = load_speech_llm(f"{folder}/asr.nemo", f"{folder}/{model}", connector, dtype=dtype)
    if speech_llm.encoder is not None and dtype == torch.float64:
        speech_llm.encoder.encoder.to(dtype)
        speech_llm.connector.to(dtype)
    return speech_llm.train(), Ids(text.chat.turn, text.chat.end, text.chat.tokenizer)


def given_frames(model):
    """Speech frames, on the first stage only."""
    if model.encoder is None:
        return model.no_frames()
    generator = torch.Generator().manual_seed(1)
    shape = (FRAMES, model.decoder.config.hidden_size)
    return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def utterances():
    generator = torch.Generator().manual_seed(2)
    return [0.1 * torch.randn(int(16000 * seconds), generator=generator) for seconds in SECONDS]


def draw_prompts(seed, count):
    """Layouts of 1 to 30 positions: text alone, speech alone, both interleaved."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    kinds = [(0, VOCABULARY), (-FRAMES, 0), (-FRAMES, VOCABULARY)]
    lengths = draw(1, 30, count)
    return [draw(*kinds[index % 3], n) for index, n in enumerate(lengths)]


def ask(model, chat, case):
    """Answers to one case: lists of token ids and whether each was cut, or texts."""
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.generate import generate
    from nemo_mtbi.inference.respond import Responder

    if case["kind"] == "divergences":
        return distances(model, case["batch_tokens"])
    config = GenerationConfig(case["new"], case["batch_tokens"])
    if case["kind"] == "layouts":
        frames = given_frames(model) if case["frames"] else model.no_frames()
        answers = generate(model, case["layouts"], frames, case["end_id"], config)
        return [(answer.ids, answer.truncated) for answer in answers]
    responder = Responder(model, chat, config, encode_seconds=case["encode_seconds"])
    if case["kind"] == "text":
        return responder.text([(prompt, text) for prompt in PROMPTS for text in ("red cat runs", "one", "")])
    return responder.speech(utterances(), [(prompt, index) for index in range(len(SECONDS)) for prompt in PROMPTS])


def distances(model, batch_tokens):
    """Divergences of interleaved rows from text, to a precision that the order of sums does not touch."""
    from nemo_mtbi.inference.divergence import twin_divergences
    from nemo_mtbi.layouts.layout import make_row

    drawn = draw_prompts(7, 10)
    heard, read = ([p for p in drawn if (min(p) < 0) == hears] for hears in (True, False))
    responses = [[4 + n, 60 + n, 2][: 1 + n % 3] for n in range(len(heard))]
    rows = [
        replace(make_row(prompt, response), twin=make_row(read[n % len(read)], response))
        for n, (prompt, response) in enumerate(zip(heard, responses, strict=True))
    ]
    return [round(value, 9) for value in twin_divergences(model, rows, given_frames(model), batch_tokens)]


def make_cases(model, chat):
    """Questions to one model with the answers of this process."""
    layouts, texts = draw_prompts(0, 9), [prompt for prompt in draw_prompts(5, 12) if min(prompt) >= 0]
    case = {"kind": "layouts", "layouts": layouts, "frames": True, "end_id": -1, "new": NEW, "batch_tokens": 10**6}
    free = [answer for answer, _ in ask(model, chat, case)]
    # a token that some answers hold and others don't, so that rows end at different steps, or none
    holders = Counter(token for answer in free for token in set(answer)).most_common()
    case["end_id"] = next(token for token, count in holders if count <= len(free) // 2)
    speech = {"kind": "speech", "new": 8, "batch_tokens": 400, "encode_seconds": 300.0}
    cases = [
        case,
        {**case, "batch_tokens": 1},
        {**case, "batch_tokens": 90, "new": 7},
        {**case, "layouts": texts, "frames": False},
        {**case, "new": 1},
        {**case, "layouts": layouts[:1], "end_id": free[0][0]},  # ends at the first step
        {**case, "end_id": [case["end_id"], *(answer[4] for answer in free)]},  # each row at its own
        {**case, "layouts": []},
        {"kind": "divergences", "batch_tokens": 70},
        speech,
        {**speech, "batch_tokens": 120, "encode_seconds": 1.0},
        {**speech, "kind": "text"},
    ]
    for case in cases:
        case["answers"] = ask(model, chat, case)
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, questions, and the answers of a single process."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

    groups.initialize()
    folder = tmp_path_factory.mktemp("generate")
    tiny_asr_nemo(folder / "asr.nemo")
    for name, tied in MODELS.items():
        tiny_text_llm(folder / name, num_layers=4, vocab_size=VOCABULARY, tie_embeddings=tied)
        torch.save(make_cases(*build(folder, name)), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_the_questions_are_worth_asking(folder, model):
    ragged, *_, speech, _, text = torch.load(folder / f"{model}.pt", weights_only=True)
    lengths = [len(ids) for ids, _ in ragged["answers"]]
    assert {cut for _, cut in ragged["answers"]} == {True, False}  # some rows end early, some are cut
    assert any(0 < length < NEW for length in lengths) and len(set(map(len, ragged["layouts"]))) > 5
    for answers in (speech["answers"], text["answers"], [tuple(ids) for ids, _ in ragged["answers"]]):
        assert len(set(answers)) > len(answers) // 2  # prompts matter


# ------------------------------------------------------------------------------------------------- the same answers


def compare(folder, name):
    """Worker: asks everything under a layout; replicas ask different questions, and not equally many."""
    from nemo_mtbi.parallel import groups

    layout, replicas = LAYOUTS[name]
    groups.initialize(layout)
    assert groups.data_parallel_size() == replicas
    for model_name in MODELS:
        model, chat = build(folder, model_name)
        cases = torch.load(f"{folder}/{model_name}.pt", weights_only=True)
        if replicas > 1:
            cases = [cases[:7], cases[7:]][groups.data_parallel_rank()]
        for number, case in enumerate(cases):
            assert ask(model, chat, case) == case["answers"], f"{name}, {model_name}, question {number}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(LAYOUTS, ALWAYS))
def test_parity_of_answers_with_a_single_process(layout, folder, processes):
    config, replicas = LAYOUTS[layout]
    processes(compare, folder, layout, count=config.model_parallel_size * replicas)


# ------------------------------------------------------------------------------------------------- training goes on


def make_step(model):
    """A step of two utterances with rows of several lengths."""
    from nemo_mtbi.layouts.layout import collate, make_row, speech

    audio = utterances()[:2]
    frames = [model.frame_counter(len(samples)) for samples in audio]
    rows = [make_row([1, 7, *speech(0, frames[u]), 5], [9, 11 + n, 2], u) for u in range(2) for n in range(2)]
    return collate(audio, frames, rows, 60)


def learn(model, batch):
    """Loss and gradients of a step."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    for value in parameters:
        value.grad = None
    loss = model.train_step(batch, batch.num_targets).loss
    return [loss.detach(), *(value.grad.clone() for value in parameters)]


def train_after(folder, name):
    """Worker: a training step before and after generation."""
    from nemo_mtbi.parallel import groups

    layout, _ = LAYOUTS[name]
    groups.initialize(layout)
    model, chat = build(folder, "untied")
    case = torch.load(f"{folder}/untied.pt", weights_only=True)[0]
    batch = make_step(model)
    before = learn(model, batch)
    flags = [copy.copy(vars(chunk.config)) for chunk in model.chunks]
    assert ask(model, chat, case) == case["answers"]
    assert [vars(chunk.config) for chunk in model.chunks] == flags
    assert all(module.training for chunk in model.chunks for module in chunk.modules())
    for expected, found in zip(before, learn(model, batch), strict=True):
        assert torch.equal(expected, found)
    assert ask(model, chat, case) == case["answers"]  # and generation after training


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(["tp2_sp", "pp2_vp2", "tp2_pp2_sp"], ["tp2_pp2_sp"]))
def test_a_training_step_after_generation_is_as_before(layout, folder, processes):
    processes(train_after, folder, layout, count=LAYOUTS[layout][0].model_parallel_size)


# ------------------------------------------------------------------------------------------------- the cache


def cached(folder, name):
    """Worker: what the cache of each process holds, and how many positions each step computes."""
    from nemo_mtbi.inference import generate as module
    from nemo_mtbi.parallel import groups

    layout, _ = LAYOUTS[name]
    groups.initialize(layout)
    model, chat = build(folder, "untied")
    case = torch.load(f"{folder}/untied.pt", weights_only=True)[0]
    contexts, lengths, original = [], [], module.StaticInferenceContext

    def remember(*args):
        contexts.append(original(*args))
        return contexts[-1]

    module.StaticInferenceContext = remember
    for chunk in model.chunks:
        chunk.decoder.register_forward_hook(lambda *args: lengths.append(len(args[-1])))
    try:
        ask(model, chat, case)
    finally:
        module.StaticInferenceContext = original
    (context,) = contexts  # one batch, one cache, whatever the number of runs of layers here
    layers = {layer.layer_number for chunk in model.chunks for layer in chunk.decoder.layers}
    assert context.key_value_memory_dict.keys() == layers
    everywhere = groups.gather_objects(sorted(layers), "replica")
    assert Counter(n for held in everywhere for n in held) == dict.fromkeys(
        range(1, 5), layout.tensor_model_parallel_size
    )
    longest, rows = max(map(len, case["layouts"])), len(case["layouts"])
    for keys, values in context.key_value_memory_dict.values():
        assert keys.shape == values.shape == (longest + NEW, rows, 2 // layout.tensor_model_parallel_size, 8)
    chunks = len(model.chunks)
    assert lengths == [longest] * chunks + [1] * (NEW - 1) * chunks
    assert all(chunk.decoder.input_tensor is None or len(chunk.decoder.input_tensor) == 1 for chunk in model.chunks)


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(["tp2_sp", "pp2_vp2", "tp2_pp2"], ["tp2_sp", "pp2_vp2"]))
def test_each_process_caches_its_own_layers(layout, folder, processes):
    processes(cached, folder, layout, count=LAYOUTS[layout][0].model_parallel_size)


# ------------------------------------------------------------------------------------------------ errors, precision


def refuse(folder, name):
    """Worker: whatever is wrong on some processes is an error on all, and the next question is answered."""
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.generate import generate
    from nemo_mtbi.inference.respond import Responder
    from nemo_mtbi.parallel import groups

    groups.initialize(LAYOUTS[name][0])
    rank, last = groups.control_group("replica").rank(), groups.control_group("replica").size() - 1
    model, chat = build(folder, "untied")
    case = torch.load(f"{folder}/untied.pt", weights_only=True)[0]
    frames, config = given_frames(model), GenerationConfig(2)
    responder, requests = Responder(model, chat, config), [("say it", 0)]

    def fails(kind, message, work):
        with pytest.raises(kind, match=message):
            work()
        assert ask(model, chat, case) == case["answers"]

    fails(ValueError, "127 positions", lambda: generate(model, [[1], [1] * 127], frames, 2, config))
    fails(ValueError, "speech frame 12, but there are 12", lambda: generate(model, [[1, -13]], frames, 2, config))
    fails(ValueError, "speech frame 0, but", lambda: generate(model, [[-1]], model.no_frames(), 2, config))
    other = "were given different prompts"
    fails(ValueError, other, lambda: generate(model, [[1, -1 - (rank == last)]], frames, 2, config))
    fails(ValueError, other, lambda: generate(model, [[1]] * (1 + (rank == 0)), frames, 2, config))
    fails(ValueError, other, lambda: generate(model, [[1]], frames, 2, GenerationConfig(2 + (rank == last))))
    fails(ValueError, "too short", lambda: responder.speech([torch.zeros(9)], requests))
    fails(ValueError, "use shorter audio", lambda: responder.speech([torch.randn(40 * 16000)], requests))
    if groups.tensor_parallel_group().size() > 1:
        some = frames[: len(frames) - groups.tensor_parallel_rank()]
        fails(ValueError, other, lambda: generate(model, [[1]], some, 2, config))
    if model.encoder is not None:
        model.encode_audio = lambda *args: too_much()
    fails(RuntimeError, "out of memory", lambda: responder.speech(utterances()[:1], requests))


def too_much():
    raise RuntimeError("out of memory")


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(["tp2", "pp2_vp2", "tp2_pp2_sp"], ["tp2", "pp2_vp2"]))
def test_every_process_raises_and_none_waits(layout, folder, processes):
    processes(refuse, folder, layout, count=LAYOUTS[layout][0].model_parallel_size)


def in_bfloat16(folder, name):
    """Worker: a frozen LLM in bfloat16 behind a connector in float32."""
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.respond import Responder
    from nemo_mtbi.parallel import groups

    groups.initialize(LAYOUTS[name][0])
    model, chat = build(folder, "untied", torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in model.parameters() if value.requires_grad)
    responder = Responder(model, chat, GenerationConfig(6, 400))
    answers = responder.speech(utterances(), [(prompt, index) for index in range(5) for prompt in PROMPTS])
    assert len(set(answers)) > 5
    assert all(0 <= int(token) < VOCABULARY for answer in answers for token in answer.split())
    assert groups.gather_objects(answers, "replica") == [answers] * LAYOUTS[name][0].model_parallel_size


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(["pp2_vp2", "tp2_pp2_sp"], ["tp2_pp2_sp"]))
def test_a_frozen_llm_in_bfloat16_answers_alike_on_all_processes(layout, folder, processes):
    processes(in_bfloat16, folder, layout, count=LAYOUTS[layout][0].model_parallel_size)
