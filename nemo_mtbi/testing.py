# SPDX-License-Identifier: Apache-2.0
"""Tiny models and cuts for tests, ours and other people's. All is made here, from a seed: nothing is downloaded.

The models have random weights of a healthy scale, so that two different inputs give clearly different outputs and a
mistake of a mask or a position shows. Each word of a cut is a tone of its own, so a connector can learn to tell them
apart.

Example::

    llm, asr = tiny_text_llm(tmp_path / "llm"), tiny_asr_nemo(tmp_path / "asr.nemo")
    cuts = tiny_cuts(tmp_path / "cuts", 8, llm=llm)  # a manifest whose behaviors come "from" that LLM
"""

from __future__ import annotations

import io
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_mtbi.chat.format import ChatFormat

if TYPE_CHECKING:
    from nemo.collections.asr.models import EncDecCTCModelBPE

    from nemo_mtbi.config.connector import ConnectorConfig
    from nemo_mtbi.speech_llm.model import SpeechLLM

WORDS = ("red", "blue", "green", "cat", "dog", "bird", "runs", "sings")
NUMBERS = ("one", "two", "three", "four", "five")
# Task -> its wordings.
PROMPTS = {
    "repeat": ("say it", "repeat it"),
    "first": ("first word", "say the first"),
    "last": ("last word", "say the last"),
    "count": ("count it", "count the words"),
}
TURN, END = ("<s>", "{prompt}", "<sep>", "{audio}", "<ans>"), "</s>"
VOCABULARY = 128  # divides by every small number of tensor-parallel ranks

ARCHITECTURE = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=VOCABULARY,
    max_sequence_length=128,
)
ENCODER = dict(
    n_layers=1,
    d_model=16,
    n_heads=2,
    subsampling_conv_channels=8,
    ff_expansion_factor=2,
    conv_kernel_size=5,
)
_RATE, _WORD_SECONDS, _GAP_SECONDS = 16000, (0.2, 0.35), 0.05


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed``; afterwards the caller's own go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_tokenizer(folder: str | Path) -> Path:
    """Train a SentencePiece tokenizer of :data:`VOCABULARY` pieces; any text of lower-case letters can be encoded.

    Args:
        folder: made if it is missing.

    Returns:
        ``folder/tokenizer.model``.
    """
    import sentencepiece

    prompts = " ".join(wording for wordings in PROMPTS.values() for wording in wordings)
    words = sorted({*WORDS, *NUMBERS, *prompts.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*(word for word in words for _ in range(20)), *letters]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        character_coverage=1.0,
        normalization_rule_name="identity",
        user_defined_symbols=[part for part in TURN if part.startswith("<") and part != "<s>"],
        minloglevel=2,
    )
    path = Path(folder) / "tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def tiny_chat(tokenizer: str | Path) -> ChatFormat:
    """Return the chat format of the tiny LLM, with the tokenizer at a path (see :func:`tiny_tokenizer`)."""
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    return ChatFormat(TURN, END, SentencePieceTokenizer(str(tokenizer)))


def scale_weights(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill weights with random numbers of a healthy scale: matrices keep the size of their input, norms stay near 1.

    What a model's own initialization gives (a deviation of 0.02) leaves a tiny model close to the identity.
    """
    with _seeded(seed), torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim < 2:
                middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value.copy_(middle + 0.1 * torch.randn(value.shape))
            else:
                # the residual stream begins small: what a tiny LLM says must not hang on its last token alone
                scale = 0.3 if "embedding" in name else 1 / math.sqrt(math.prod(value.shape[1:]))
                value.copy_(scale * torch.randn(value.shape))


def tiny_text_llm(folder: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write the directory of a text LLM of about 20,000 random weights.

    Call it in a process without model parallelism; the directory may then be read in any other.

    Args:
        folder: made if it is missing.
        seed: of the weights.
        **overrides: keys of :class:`nemo_mtbi.llm.architecture.DecoderConfig`.

    Returns:
        ``folder``, for ``model.pretrained_llm``.
    """
    from nemo_mtbi.llm.architecture import DecoderConfig
    from nemo_mtbi.llm.decoder import GPTDecoder
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.speech_llm.pretrained import save_text_llm

    groups.initialize()
    tokenizer = tiny_tokenizer(folder)
    with _seeded(seed):
        decoder = GPTDecoder(DecoderConfig(**{**ARCHITECTURE, **overrides}))
    scale_weights(decoder, seed)
    save_text_llm(folder, decoder.architecture, dict(decoder.named_parameters()), tokenizer.read_bytes(), TURN, END)
    return Path(folder)


def tiny_asr_config(tokenizer_dir: str | Path, **encoder: Any):
    """Return NeMo's configuration of a FastConformer-CTC that gives 12.5 frames of 16 numbers per second.

    Args:
        tokenizer_dir: as :func:`nemo_mtbi.encoders.ctc.write_tokenizer` writes it.
        **encoder: overrides of the encoder's section.
    """
    from nemo_mtbi.demo.encoder import configuration

    config = configuration(Path(tokenizer_dir))
    config.preprocessor.features = config.encoder.feat_in = 16
    config.encoder.update({**ENCODER, **encoder})
    return config


def tiny_asr_model(folder: str | Path, seed: int = 0, **encoder: Any) -> EncDecCTCModelBPE:
    """Build an ASR model of about 6,000 random weights.

    Args:
        folder: of the model's tokenizer; must stand as long as the model may be saved.
        seed: of the weights.
        **encoder: overrides of the encoder's section of the configuration.
    """
    from nemo.collections.asr.models import EncDecCTCModelBPE

    from nemo_mtbi.encoders.ctc import write_tokenizer

    tokenizer = write_tokenizer(folder, WORDS, 64)
    with _seeded(seed):
        return EncDecCTCModelBPE(tiny_asr_config(tokenizer, **encoder)).eval()


def tiny_asr_nemo(path: str | Path, seed: int = 0, **encoder: Any) -> Path:
    """Save :func:`tiny_asr_model` as a ``.nemo`` in NeMo's own format.

    Returns:
        ``path``, for ``model.pretrained_asr``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny_asr_model(folder, seed, **encoder).save_to(str(path))
    return path


def tiny_speech_llm(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    connector: ConnectorConfig | None = None,
    **overrides: Any,
) -> SpeechLLM:
    """Build encoder, connector and LLM joined, with random weights.

    Args:
        seed: of all weights.
        dtype: of encoder, connector and LLM (the front end stays float32).
        connector: its shape; by default strided convolutions to 6.25 Hz.
        **overrides: keys of :class:`nemo_mtbi.llm.architecture.DecoderConfig`.
    """
    from nemo_mtbi.config.connector import ConnectorConfig
    from nemo_mtbi.encoders.nemo import NemoEncoder
    from nemo_mtbi.speech_llm.model import SpeechLLM
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    with tempfile.TemporaryDirectory() as folder, _seeded(seed):
        text = load_text_llm(tiny_text_llm(Path(folder) / "llm", seed, **overrides), dtype)
        encoder = NemoEncoder(tiny_asr_model(Path(folder) / "asr", seed))
        model = SpeechLLM(encoder, connector or ConnectorConfig(hidden_size=24), text.chunks)
    encoder.encoder.to(dtype)
    if model.connector is not None:  # it stands on the first stage of a pipeline
        model.connector.to(dtype)
    return model


def tiny_behaviors(text: str) -> list[dict[str, Any]]:
    """Return the responses of a perfect LLM to ``text``, for every wording of every task of :data:`PROMPTS`."""
    words = text.split()
    answers = {"repeat": text, "first": words[0], "last": words[-1], "count": NUMBERS[len(words) - 1]}
    return [
        {"task": task, "prompt": prompt, "response": answers[task], "truncated": False}
        for task, wordings in PROMPTS.items()
        for prompt in wordings
    ]


def tiny_provenance(llm: str | Path) -> dict[str, Any]:
    """Return the provenance (field ``behaviors_from`` of a cut) of targets that this LLM directory would generate."""
    from nemo_mtbi.llm.directory import open_text_llm

    chat = tiny_chat(Path(llm) / "tokenizer.model")
    return {"llm": open_text_llm(llm).fingerprint, "chat": chat.fingerprint(), "decoding": {"max_new_tokens": 32}}


def tiny_cuts(
    folder: str | Path, n: int, seed: int = 0, behaviors: bool = True, llm: str | Path | None = None
) -> Path:
    """Write utterances of one to five words, each word a tone of its own, with exact word times.

    Args:
        folder: made if it is missing; gets the audio (FLAC) and the manifest.
        n: how many utterances.
        seed: of words and noise.
        behaviors: whether the cuts carry :func:`tiny_behaviors`.
        llm: text LLM directory that stands in their provenance; ``None``: an invented one.

    Returns:
        ``folder/cuts.jsonl.gz``, for ``lhotse.CutSet.from_file`` and for ``cuts_path``.
    """
    from nemo_mtbi.data.behaviors import BEHAVIORS, PROVENANCE
    from nemo_mtbi.data.cut_files import CUTS_FILE, write_cuts
    from nemo_mtbi.demo.corpora.corpus import SyntheticUtterance, to_cut, write_flac

    folder = Path(folder)
    origin = tiny_provenance(llm) if llm else {"llm": "sha256:tiny", "chat": "tiny", "decoding": {}}
    cuts = []
    for index in range(n):
        name = f"tiny-{seed}-{index:04d}"
        words, spans, samples = _tones(random.Random(f"{seed}-{index}"))
        path = folder / "audio" / f"{name}.flac"
        write_flac(path, samples)
        cut = to_cut(SyntheticUtterance(name, samples, words, spans, speaker="tone"), path)
        if behaviors:
            cut.custom = {BEHAVIORS: tiny_behaviors(" ".join(words)), PROVENANCE: origin}
        cuts.append(cut)
    folder.mkdir(parents=True, exist_ok=True)
    write_cuts(folder / CUTS_FILE, cuts)
    return folder / CUTS_FILE


def _tones(rng: random.Random) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], np.ndarray]:
    """Return words, their spans in samples, and the sound of one utterance at 16 kHz."""
    noise = np.random.default_rng(rng.getrandbits(32))
    words = tuple(rng.choice(WORDS) for _ in range(rng.randint(1, len(NUMBERS))))
    gap = int(_GAP_SECONDS * _RATE)
    pieces, spans, position = [np.zeros(gap)], [], gap
    for word in words:
        length = int(rng.uniform(*_WORD_SECONDS) * _RATE)
        tone = 200.0 * 1.5 ** WORDS.index(word)  # 200 Hz to 3.4 kHz
        pieces += [0.3 * np.sin(2 * np.pi * tone * np.arange(length) / _RATE), np.zeros(gap)]
        spans.append((position, position + length))
        position += length + gap
    samples = np.concatenate(pieces)
    samples += 0.01 * noise.standard_normal(len(samples))
    return words, tuple(spans), samples.astype(np.float32)
