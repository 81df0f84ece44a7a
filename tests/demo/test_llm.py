# SPDX-License-Identifier: Apache-2.0
"""The pre-training of the demo's text LLM: its words, its rows and its steps."""

import random
from itertools import groupby, islice

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.demo import llm
from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.layouts.layout import IGNORE
from nemo_mtbi.speech_llm.pretrained import DEMO, load_text_llm
from nemo_mtbi.targets.tasks import TaskPool
from nemo_mtbi.testing import ARCHITECTURE, scale_weights

POOL = TaskPool.from_yaml(DEMO / "tasks.yaml")


@pytest.fixture(scope="module")
def tokenizer_model():
    return llm.build_tokenizer(POOL)


@pytest.fixture(scope="module")
def chat(tokenizer_model, tmp_path_factory):
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_model)
    return ChatFormat(tuple(llm.TURN), llm.END, SentencePieceTokenizer(str(path)))


# Tokens ------------------------------------------------------------


def test_every_word_of_the_world_is_one_piece(tokenizer_model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    assert processor.get_piece_size() == llm.VOCABULARY
    assert [processor.id_to_piece(i) for i in range(3)] == ["<pad>", "<s>", "</s>"]
    split = [word for word in grammar.grammar_words() if len(processor.encode(word)) != 1]
    assert split == []
    for token in ("<sep>", "<ans>", llm.FILL, *llm.MARKS):
        assert processor.piece_to_id(token) != processor.unk_id()


def test_prompts_and_answers_come_back_as_they_were(chat):
    rng = random.Random(5)
    texts = {prompt for task in POOL.tasks for prompt in task.prompts + task.heldout_prompts}
    for _ in range(50):
        sentence = grammar.sample_sentence(rng)
        texts |= {" ".join(sentence.words), *(answer(sentence) for answer in grammar.ANSWERS.values())}
    assert {text: chat.decode(chat.encode(text)) for text in texts} == {text: text for text in texts}


def test_the_answers_fit_the_demos_length_limit(chat):
    """`conf/mtbi_demo.yaml` says 40 new tokens."""
    rng = random.Random(1)
    longest = max(
        len(chat.response(answer(grammar.sample_sentence(rng))))
        for _ in range(500)
        for answer in grammar.ANSWERS.values()
    )
    assert longest <= 40


# Rows ------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers())
def test_stretched_words_can_be_told_apart_and_come_back(words, seed):
    stretched = llm.stretch(words, random.Random(seed))
    assert [word for word, _ in groupby(stretched) if word != llm.FILL] == words


def test_stretching_ranges_from_one_filler_to_many():
    words = ["a", "b", "c", "d"] * 4
    stretched = [llm.stretch(words, random.Random(seed)) for seed in range(300)]
    lengths = [len(row) for row in stretched]
    assert min(lengths) == len(words) + 1 and max(lengths) > 2.5 * len(words)
    assert {row[0] for row in stretched} == {llm.FILL}  # it tells a stretched transcript from a plain one


def test_a_row_holds_the_right_answer(chat):
    words = set()
    for seed in range(200):
        row = llm.sample_row(POOL, chat, random.Random(seed), lambda word: llm_id(chat, word))
        prompt, rest = row.layout[1:], chat.tokenizer.token_to_id("<sep>")
        said = prompt[prompt.index(rest) + 1 :]
        said = said[: said.index(chat.tokenizer.token_to_id("<ans>"))]
        filler = chat.tokenizer.token_to_id(llm.FILL)
        stretched = chat.decode([token for token, _ in groupby(said) if token != filler])
        plain = chat.decode([token for token in said if token != filler])
        transcripts = {stretched} | ({plain} if filler not in said else set())  # no filler: both may be meant
        right = {answer for text in transcripts for answer in answers_about(text)}
        response = [label for label in row.labels if label != IGNORE]
        assert chat.decode(response) in right and response[-1] == chat.end_id
        assert len(row.layout) <= llm.ARCHITECTURE["max_sequence_length"]
        words.update(stretched.split())
    assert len(words) > 60


def answers_about(text):
    try:
        return set(grammar.references(text).values())
    except ValueError:  # read the other way it is no sentence
        return set()


def llm_id(chat, word):
    (token,) = [chat.tokenizer.token_to_id(llm.FILL)] if word == llm.FILL else chat.encode(word)
    return token


def test_batches_depend_on_the_seed_alone(chat):
    def first(seed):
        return [batch.layout.tolist() for batch in islice(llm.batches(POOL, chat, 6, seed), 3)]

    assert first(0) == first(0) != first(1)
    assert all(len(layout) == 6 for layout in first(0))


def test_every_task_and_wording_is_trained_on(chat):
    """Also those that are held out from the connector: the LLM itself must know them."""
    seen = set()
    for batch in islice(llm.batches(POOL, chat, 64, 0), 60):
        for layout in batch.layout.tolist():
            seen.add(chat.decode(layout[1 : layout.index(chat.tokenizer.token_to_id("<sep>"))]))
    assert seen == {prompt for task in POOL.tasks for prompt in task.prompts + task.heldout_prompts}


# Steps ------------------------------------------------------------


def test_master_weights_take_the_steps_of_adamw():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7, bias=False)
    reference = layer.weight.detach().clone().requires_grad_()
    ours = llm.MasterWeights(layer, peak_lr=0.1, clip=1.0)
    (weight,) = layer.parameters()
    assert weight.dtype == torch.bfloat16 and torch.equal(ours.named_weights()["weight"], reference)
    adam = torch.optim.AdamW([reference], 0.1, weight_decay=0.01, betas=(0.9, 0.98))
    for scale in (0.5, 1.0, 0.25):
        gradient = 3 * torch.randn(7, 5).bfloat16()
        weight.grad, reference.grad = gradient.clone(), gradient.float()
        torch.nn.utils.clip_grad_norm_([reference], 1.0)
        adam.param_groups[0]["lr"] = 0.1 * scale
        adam.step()
        ours.step(scale)
        assert torch.equal(ours.masters[0], reference) and weight.grad is None
        assert torch.equal(weight, reference.bfloat16())


def test_steps_below_the_resolution_of_bfloat16_add_up():
    norm = torch.nn.RMSNorm(1)
    ours = llm.MasterWeights(norm, peak_lr=1e-4)
    for _ in range(100):
        norm.weight.grad = torch.ones(1).bfloat16()
        ours.step(1.0)
    assert norm.weight.item() < 0.993  # bfloat16 has no number between 0.996 and 1


@pytest.fixture
def decoder():
    from nemo_mtbi.llm.architecture import DecoderConfig
    from nemo_mtbi.llm.decoder import GPTDecoder
    from nemo_mtbi.parallel import groups

    groups.initialize()
    decoder = GPTDecoder(DecoderConfig(**{**ARCHITECTURE, "vocab_size": llm.VOCABULARY}))
    scale_weights(decoder)
    return decoder


def test_the_loss_is_that_of_the_response_tokens(decoder, chat, monkeypatch):
    batch = next(llm.batches(POOL, chat, 4, 0))
    monkeypatch.setattr(torch, "rand", torch.zeros)  # without the noise
    hidden = decoder.hidden(decoder.embed_tokens(batch.layout).transpose(0, 1))
    logits = decoder.logits(hidden, torch.arange(batch.layout.numel()))  # in the order of t * R + r
    expected = F.cross_entropy(logits, batch.labels.t().reshape(-1), ignore_index=IGNORE)
    torch.testing.assert_close(llm.batch_loss(decoder, batch), expected)


def test_the_noise_is_small_and_leaves_gradients(decoder, chat):
    torch.manual_seed(0)
    batch = next(llm.batches(POOL, chat, 4, 0))
    losses = [llm.batch_loss(decoder, batch) for _ in range(3)]
    assert len({loss.item() for loss in losses}) == 3
    assert max(losses) - min(losses) < 0.3 * losses[0]
    losses[0].backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in decoder.parameters())


def test_the_build_writes_an_llm_that_loads(tmp_path, monkeypatch, capsys):
    small = {**llm.ARCHITECTURE, "num_layers": 1, "hidden_size": 24, "ffn_hidden_size": 32}
    monkeypatch.setattr(llm, "ARCHITECTURE", small)
    for name in ("one", "two"):
        llm.build(tmp_path / name, POOL, steps=2, seed=0, rows=4)
    assert "step 0/2 loss" in capsys.readouterr().out
    built = load_text_llm(tmp_path / "one")
    assert built.decoder.architecture.num_layers == 1
    assert built.fingerprint == load_text_llm(tmp_path / "two").fingerprint  # the same seed, the same LLM
    assert built.chat.encode("translate into spanish")
    llm.build(tmp_path / "two", POOL, steps=1, seed=0, resume=True, rows=4)
    before, after = (dict(load_text_llm(tmp_path / name).decoder.named_parameters()) for name in ("one", "two"))
    moved = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.01  # it went on, and did not begin anew
