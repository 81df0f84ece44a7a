# SPDX-License-Identifier: Apache-2.0
"""Target generation of this project against batched generation of Hugging Face with the same weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_mtbi.commands.convert import main as convert
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.demo.corpora.grammar import sample_sentence
from nemo_mtbi.demo.recipe import load_pool
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import load_text_llm, resolve

NEW_TOKENS = 40
BATCHES = (32, 64, 256)  # of Hugging Face: its best one counts
TASKS = 8  # asked about each transcript


class Answering:
    """The demo's text LLM, whose answers end, in this project and in Hugging Face."""

    def __init__(self, folder: Path):
        from transformers import LlamaForCausalLM

        path = folder / "demo-llm"
        if not path.is_dir() and convert(["to-hf", str(resolve("demo", "model.pretrained_llm", "llm")), str(path)]):
            raise RuntimeError(f"the demo's LLM was not converted to {path}: its message stands above")
        self.theirs: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        text = load_text_llm("demo", torch.float32)
        self.chat = text.chat
        self.ours = Responder(LayoutDecoder(text.chunks), text.chat, GenerationConfig(max_new_tokens=NEW_TOKENS))

    def prompts(self, rng: random.Random, transcripts: int) -> list[list[int]]:
        """Draw prompts: :data:`TASKS` tasks about each of some sentences of the demo's grammar."""
        tasks, prompts = list(load_pool("demo").train), []
        for _ in range(transcripts):
            transcript = self.chat.encode(sample_sentence(rng).text)
            prompts += [self.chat.prompt(rng.choice(task.prompts), transcript) for task in rng.sample(tasks, TASKS)]
        return prompts

    def systems(self) -> dict[str, Callable[[Sequence[list[int]]], Callable[[], list[list[int]]]]]:
        """Return this project and each batch size of Hugging Face: prompts → what answers them."""
        others = {f"hf_{size}": lambda prompts, size=size: lambda: self.batched(prompts, size) for size in BATCHES}
        return {"project": lambda prompts: lambda: self.own(prompts), **others}

    def own(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return the answers of this project."""
        return [list(answer.ids) for answer in self.ours.layouts(prompts)]

    @torch.no_grad()
    def batched(self, prompts: Sequence[list[int]], size: int) -> list[list[int]]:
        """Return the answers of Hugging Face, in batches of prompts of like length."""
        from transformers import GenerationConfig as HFGenerationConfig

        end = self.chat.end_id
        config = HFGenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=0)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        answers: dict[int, list[int]] = {}
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            longest = max(len(prompts[index]) for index in batch)
            ids = torch.tensor([[0] * (longest - len(prompts[index])) + prompts[index] for index in batch])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            made = self.theirs.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for index, answer in zip(batch, made[:, longest:].tolist(), strict=True):
                answers[index] = answer[: answer.index(end)] if end in answer else answer
        return [answers[index] for index in range(len(prompts))]
