# SPDX-License-Identifier: Apache-2.0
"""Trains small SentencePiece tokenizers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any


def train_tokenizer(
    words: Iterable[str],
    vocabulary: int,
    *,
    symbols: Sequence[str] = (),
    sentence_marks: bool = True,
    whole_words: bool = True,
) -> bytes:
    """Return a byte-pair SentencePiece model made for ``words``.

    Args:
        words: words, with the characters in front of which they also stand (``"fox`` beside ``fox``).
        vocabulary: number of pieces.
        symbols: always pieces of their own.
        sentence_marks: give it ``<pad>``, ``<s>`` and ``</s>`` as pieces 0, 1 and 2, as a language model needs them.
        whole_words: each of ``words`` must be one piece.

    Returns:
        The serialized model.

    Raises:
        ValueError: if ``whole_words`` and the vocabulary is too small for that.
    """
    import sentencepiece

    words = sorted(set(words))
    marks: dict[str, Any] = (
        dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3) if sentence_marks else dict(bos_id=-1, eos_id=-1)
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([word for word in words for _ in range(60)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        character_coverage=1.0,
        normalization_rule_name="identity",
        user_defined_symbols=list(symbols),
        minloglevel=2,
        **marks,
    )
    if not whole_words:
        return model.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    split = [word for word in words if not set(word) & set("".join(symbols)) and len(processor.encode(word)) != 1]
    if split:
        raise ValueError(f"a vocabulary of {vocabulary} pieces splits {', '.join(split[:5])}; give a larger one")
    return model.getvalue()
