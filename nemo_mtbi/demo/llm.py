# SPDX-License-Identifier: Apache-2.0
"""Pre-trains the demo's text LLM: a 2 M-parameter GPT that answers every demo task about a sentence of the grammar.

What makes so small an LLM usable with speech is measured in its pre-training: rotary positions, and transcripts in
which words are repeated and a filler token is strewn between them, since speech has more frames than words.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.chat.train_tokenizer import train_tokenizer
from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.layouts.layout import MicroBatch, Row, make_row
from nemo_mtbi.targets.tasks import TaskPool

TURN, END, FILL = ["<s>", "{prompt}", "<sep>", "{audio}", "<ans>"], "</s>", "<fill>"
ARCHITECTURE: dict[str, Any] = dict(
    num_layers=4,
    hidden_size=192,
    num_attention_heads=6,
    num_query_groups=2,
    ffn_hidden_size=512,
    max_sequence_length=256,
)
VOCABULARY = 2000
PEAK_LR = 2e-3
# Tasks that rewrite the whole sentence take longer to learn: they are drawn more often.
LONG_TASKS, LONG = ("transcribe", "translate", "upper", "quoted", "reverse", "title", "ending", "count"), 3
DIGITS = 0.4  # share of digit strings beyond their natural one: words that recur anywhere are the hardest to copy
MARKS = ('"', "{", "}", ",", ":", "*", "?")


def build_tokenizer(pool: TaskPool) -> bytes:
    """Train a SentencePiece model in which every word of the demo world is one piece."""
    rng = random.Random(0)
    words: set[str] = set(grammar.SPANISH.values())
    for task in pool.tasks:
        for prompt in task.prompts + task.heldout_prompts:
            words.update(prompt.split())
    for _ in range(3000):
        sentence = grammar.sample_sentence(rng)
        for answer in grammar.ANSWERS.values():
            words.update(answer(sentence).split())
    strip = str.maketrans({mark: " " for mark in MARKS})
    plain = {piece for word in words for piece in word.translate(strip).split()}
    quoted = {f'"{piece}' for word in words if '"' in word for piece in word.translate(strip).split()}
    return train_tokenizer(plain | quoted, VOCABULARY, symbols=["<sep>", "<ans>", FILL, *MARKS])


def stretch(words: list[str], rng: random.Random) -> list[str]:
    """Repeat words and strew fillers as speech frames would, with a strength drawn for the sentence.

    A stretched transcript begins with a filler, as speech begins with silence, and a word said twice has one in
    between: so two equal words side by side are one word in a stretched transcript, and two in a plain one.
    """
    strength, stretched = rng.random(), [FILL] * (1 + rng.randrange(2))
    for word in words:
        if stretched[-1:] == [word]:
            stretched.append(FILL)
        stretched += [word] * (1 + (rng.random() < 0.6 * strength)) + [FILL] * int(rng.random() * 3 * strength)
    return stretched


def sample_row(pool: TaskPool, chat: ChatFormat, rng: random.Random, ids: Callable[[str], int]) -> Row:
    """Draw one pre-training row; 70% of the transcripts are stretched."""
    sentence = grammar.sample_sentence(rng, "digits" if rng.random() < DIGITS else None)
    task = rng.choices(pool.tasks, [LONG if task.name in LONG_TASKS else 1 for task in pool.tasks])[0]
    prompt = rng.choice(task.prompts + task.heldout_prompts)
    words = list(sentence.words)
    if rng.random() < 0.7:
        words = stretch(words, rng)
    transcript = [ids(word) for word in words]
    return make_row(chat.prompt(prompt, transcript), chat.response(grammar.ANSWERS[task.name](sentence)))


def batches(pool: TaskPool, chat: ChatFormat, rows: int, seed: int) -> Iterator[MicroBatch]:
    """Yield pre-training batches without end."""
    rng = random.Random(seed)
    cache: dict[str, int] = {}

    def ids(word: str) -> int:
        if word not in cache:
            fill = chat.tokenizer.token_to_id(FILL) if word == FILL else None
            (cache[word],) = chat.encode(word) if fill is None else [fill]
        return cache[word]

    while True:
        yield MicroBatch.from_rows([sample_row(pool, chat, rng, ids) for _ in range(rows)], [])


def build(out: Path, pool: TaskPool, steps: int, seed: int, resume: bool = False, rows: int = 64) -> None:
    """Train the LLM and write it to ``out``; ``resume`` goes on from there, at half the learning rate."""
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    from nemo_mtbi.llm.architecture import DecoderConfig
    from nemo_mtbi.llm.decoder import GPTDecoder
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.speech_llm.pretrained import load_text_llm, save_text_llm

    groups.initialize()
    torch.manual_seed(seed)
    tokenizer_model = build_tokenizer(pool)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = SentencePieceTokenizer(str(out / "tokenizer.model"))
    chat = ChatFormat(tuple(TURN), END, tokenizer)
    if resume:
        decoder = load_text_llm(out).decoder
    else:
        decoder = GPTDecoder(DecoderConfig(vocab_size=tokenizer.vocab_size, **ARCHITECTURE))
    optimizer = MasterWeights(decoder, PEAK_LR / 2 if resume else PEAK_LR)
    print(f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.2f} M parameters", flush=True)
    source, start, average = batches(pool, chat, rows, seed + resume), time.time(), None
    for step in range(steps):
        loss = batch_loss(decoder, next(source))
        loss.backward()
        optimizer.step(min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {average:.4f} {time.time() - start:.0f}s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save_text_llm(out, decoder.architecture, optimizer.named_weights(), tokenizer_model, TURN, END)


class MasterWeights:
    """AdamW on float32 copies of bfloat16 weights: matrix products in bfloat16 are far faster on new CPUs."""

    def __init__(self, module: torch.nn.Module, peak_lr: float, clip: float = 1.0):
        self.names = [name for name, _ in module.named_parameters()]
        self.masters = [weight.detach().float().clone().requires_grad_() for weight in module.parameters()]
        self.weights = list(module.to(torch.bfloat16).parameters())
        self.peak_lr, self.clip = peak_lr, clip
        self.adam = torch.optim.AdamW(self.masters, peak_lr, weight_decay=0.01, betas=(0.9, 0.98))

    def named_weights(self) -> dict[str, Tensor]:
        """Return the float32 weights by their names in the module."""
        return dict(zip(self.names, self.masters, strict=True))

    def step(self, scale: float) -> None:
        """Make one update at ``peak_lr * scale`` from the gradients of the bfloat16 weights, which are cleared."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is None:
                raise RuntimeError("a weight has no gradient: call backward() before each step")
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        for group in self.adam.param_groups:
            group["lr"] = self.peak_lr * scale
        self.adam.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


def batch_loss(decoder, batch: MicroBatch) -> Tensor:
    """Return the mean cross entropy of the response tokens.

    Embeddings get a little noise, so that near misses mean the word.
    """
    from nemo_mtbi.speech_llm.losses import response_cross_entropy

    embeddings = decoder.embed_tokens(batch.layout).transpose(0, 1)  # [T, R, H]
    scale = 0.2 * torch.rand(1, embeddings.shape[1], 1, dtype=embeddings.dtype) * embeddings.detach().std()
    hidden = decoder.hidden(embeddings + scale * torch.randn_like(embeddings))
    logits = decoder.logits(hidden, batch.response_index)
    return response_cross_entropy(logits, batch.targets) / len(batch.targets)
