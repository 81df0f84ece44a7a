# SPDX-License-Identifier: Apache-2.0
"""Models and utterances of the benchmark: random weights and noise, made once in a folder."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLE_RATE = 16000
VOCABULARY = 32000
HIDDEN, FEED_FORWARD, LAYERS, HEADS = 512, 1536, 8, 8  # of the LLM
ENCODER_LAYERS, ENCODER_SIZE = 12, 256
FIRST_ID = 300  # ids below belong to single bytes and special tokens


@dataclass(frozen=True)
class Assets:
    """Paths of the models.

    Attributes:
        llm: Hugging Face directory of a Llama.
        asr: ``.nemo`` of a FastConformer with a CTC head.
    """

    llm: Path
    asr: Path


@dataclass(frozen=True)
class Utterance:
    """An utterance with its rows.

    Attributes:
        samples: ``[n]`` float32 at :data:`SAMPLE_RATE`.
        rows: of each row the token ids before the audio, behind it, and of the response.
    """

    samples: Tensor
    rows: list[tuple[list[int], list[int], list[int]]]


def make_assets(folder: Path) -> Assets:
    """Make the models that ``folder`` does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    assets = Assets(folder / "llm", folder / "asr.nemo")
    if not (assets.llm / "config.json").is_file():
        _make_llm(assets.llm)
    if not assets.asr.is_file():
        _make_asr(assets.asr, folder / "asr-tokenizer")
    return assets


def draw_utterances(
    rng: random.Random,
    count: int,
    rows: int,
    seconds: tuple[float, float] = (4.0, 16.0),
    prompt: tuple[int, int] = (8, 32),
    response: tuple[int, int] = (8, 64),
) -> list[Utterance]:
    """Draw utterances of uniform length with ``rows`` rows each.

    Args:
        rng: generator.
        count: number of utterances.
        rows: of each.
        seconds: shortest and longest audio.
        prompt: fewest and most tokens before the audio; 6 stand behind it.
        response: fewest and most tokens.
    """

    def ids(length: int) -> list[int]:
        return [rng.randrange(FIRST_ID, VOCABULARY - 10) for _ in range(length)]

    utterances = []
    for _ in range(count):
        samples = int(rng.uniform(*seconds) * SAMPLE_RATE)
        drawn = [(ids(rng.randint(*prompt)), ids(6), ids(rng.randint(*response))) for _ in range(rows)]
        noise = torch.randn(samples, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        utterances.append(Utterance(0.1 * noise, drawn))
    return utterances


def words(count: int, seed: int = 0) -> list[str]:
    """Return ``count`` made-up words of one to four syllables."""
    rng = random.Random(seed)
    syllables = [a + v + e for a in "bcdfghjklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s")]
    return ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(count)]


def _make_llm(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _make_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    vocabulary, rng = words(60000), random.Random(1)
    texts = (" ".join(rng.choice(vocabulary) for _ in range(20)) for _ in range(20000))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return fast


def _make_asr(path: Path, tokenizer_folder: Path) -> None:
    from nemo.collections.asr.models import EncDecCTCModelBPE

    from nemo_mtbi.demo.encoder import configuration
    from nemo_mtbi.encoders.ctc import write_tokenizer

    tokenizer = write_tokenizer(str(tokenizer_folder), sorted(set(words(400)))[:300], 128)
    config = configuration(tokenizer)
    config.encoder.update(n_layers=ENCODER_LAYERS, d_model=ENCODER_SIZE, n_heads=4, subsampling_conv_channels=256)
    torch.manual_seed(0)
    EncDecCTCModelBPE(config).eval().save_to(str(path))  # as NeMo writes it: SALM reads nothing else
