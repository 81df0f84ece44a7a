# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face tokenizers and LLMs of several families, made from their own classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the last word of this sentence? Answer in one word.",
    "Transcribe what you hear, please! Don't add anything; 12 birds sang: 'la la'.",
    "You are a helpful assistant. system user assistant",
    "She sells 300 sea shells by the sea shore (really).",
]
_CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}Today is {{ date_string }}. "
)
_BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# name: control tokens, begin, end, chat template
STYLES: dict[str, tuple[list[str], str | None, str, str]] = {
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", _CHATML),
    "headers": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        _HEADERS,
    ),
    "brackets": (["<unk>", "<s>", "</s>"], "<s>", "</s>", _BRACKETS),
}
DATED = _DATED + _HEADERS.removeprefix("{{ bos_token }}")
# How the tokenizers of Llama 3 and Qwen split a text before byte pairs are merged.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


# How a SentencePiece tokenizer marks the beginning of a text, unless by a normalizer, as those of Llama 2.
SCHEMES = ("first", "always", "never")


def hf_tokenizer(
    folder: str | Path, style: str, vocabulary: int = 500, template: str | None = None, scheme: str | None = None
) -> Path:
    """Writes a tokenizer: byte pairs with ChatML or headers, as Qwen and Llama 3 have, or SentencePiece as Llama 2.

    Args:
        folder: made if it is missing.
        style: key of :data:`STYLES`.
        vocabulary: number of tokens.
        template: another chat template; an empty one leaves it out.
        scheme: of :data:`SCHEMES`, for ``brackets``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    control, begin, end, own = STYLES[style]
    if style == "brackets":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
        given = [*control, *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet, texts = [], [word for text in SENTENCES for word in text.split()]  # so that no piece spans two words
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        given, alphabet, texts = control, pre_tokenizers.ByteLevel.alphabet(), SENTENCES
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=given, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 20, trainer)
    if style == "brackets":  # bytes are pieces like any other
        trained = json.loads(tokenizer.to_str())
        trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in control]
        if scheme:
            space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
            trained |= {"normalizer": None, "pre_tokenizer": space}
        tokenizer = Tokenizer.from_str(json.dumps(trained))
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)
    wrapped.chat_template = own if template is None else template or None
    wrapped.save_pretrained(str(folder))
    return Path(folder)


LLM = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # answers that vary
)


def hf_model(family: str, seed: int = 5, **values: Any) -> Any:
    """A model of Hugging Face's own class, with weights that are nowhere zero or one.

    Args:
        family: ``model_type``.
        seed: of the weights.
        **values: keys of its configuration, beside :data:`LLM`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **copy.deepcopy({**LLM, **values})))
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:  # norms and biases
                value.add_(0.2 * torch.randn_like(value))
    return model.float().eval()


def hf_llm(
    folder: str | Path, family: str = "qwen2", style: str = "chatml", shard: str = "1GB", **values: Any
) -> Path:
    """Writes a whole directory: weights in shards, ``config.json``, tokenizer and chat template."""
    hf_tokenizer(folder, style)
    size = {"vocab_size": 512, "max_position_embeddings": 512}
    hf_model(family, **{**size, **values}).save_pretrained(str(folder), max_shard_size=shard)
    return Path(folder)


def hf_config(folder: str | Path, family: str, **values: Any) -> None:
    """Writes the ``config.json`` from which the class of a tokenizer follows too."""
    Path(folder, "config.json").write_text(json.dumps({"model_type": family, **values}))


# ----------------------------------------------------------------------------------------------------------- encoders

WAVE = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # name: model_type and its configuration
    "whisper": (
        "whisper",
        dict(
            d_model=16,
            encoder_layers=3,
            encoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=8,
            vocab_size=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
    ),
    "wav2vec2": ("wav2vec2", WAVE),
    "hubert": ("hubert", {**WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "wavlm": ("wavlm", WAVE),
    "wavlm_large": ("wavlm", {**WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
}


def hf_encoder(folder: str | Path, name: str) -> Path:
    """Writes a speech encoder with its feature extractor."""
    import torch
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    family, values = ENCODERS[name]
    torch.manual_seed(5)
    AutoModel.from_config(AutoConfig.for_model(family, **copy.deepcopy(values))).eval().save_pretrained(str(folder))
    normalize = values.get("feat_extract_norm") == "layer"
    extractor = (
        WhisperFeatureExtractor()
        if family == "whisper"
        else Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=normalize)
    )
    extractor.save_pretrained(str(folder))
    return Path(folder)


def add_whisper_tokenizer(folder: str | Path, timestamps: bool = False) -> Path:
    """Writes what a directory of :func:`hf_encoder` lacks to transcribe: a tokenizer of letters, and how to generate.

    Args:
        folder: of a Whisper.
        timestamps: whether some tokens are points in time, which audio of more than 30 s needs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    control = ["<pad>", "<|startoftranscript|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate([*control, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJK"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), control, strict=True))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(kind))
    how = {"max_length": 12, "pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
    how |= {"no_timestamps_token_id": 29, "max_initial_timestamp_index": 2} if timestamps else {}
    (Path(folder) / "generation_config.json").write_text(json.dumps(how))
    return Path(folder)
