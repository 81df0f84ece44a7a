# SPDX-License-Identifier: Apache-2.0
"""Word and character error rate as counts of edits."""

from collections.abc import Sequence

import jiwer
import numpy as np

from nemo_mtbi.metrics.normalizers import normalizer, without_idle_spaces, words

_COLUMNS = {"substitute": 0, "delete": 1, "insert": 2}


def edit_rows(
    references: Sequence[str], hypotheses: Sequence[str], unit: str = "word", normalization: str = "plain"
) -> np.ndarray:
    """Return ``[utterances, 4]``: substitutions, deletions, insertions and the length of the reference.

    Args:
        references: What was said.
        hypotheses: What was written; as many.
        unit: "word" or "character" (a space between two words is one). In scripts without spaces a character is a word
            (``normalizers.words``), and spaces count for nothing.
        normalization: Name of a normalizer (``normalizers.NORMALIZERS``), used on both sides.

    Raises:
        ValueError: the lists differ in length, or the unit or the normalizer is unknown.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references but {len(hypotheses)} hypotheses: pass one of each per utterance"
        )
    if unit not in ("word", "character"):
        raise ValueError(f"unknown unit {unit!r} of an error rate: use word or character")
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    clean = normalizer(normalization)

    def prepared(text: str) -> str:
        return " ".join(words(clean(text))) if unit == "word" else without_idle_spaces(clean(text))

    pairs = [(prepared(r), prepared(h)) for r, h in zip(references, hypotheses, strict=True)]
    rows = np.zeros((len(pairs), 4))
    for row, (reference, hypothesis) in zip(rows, pairs, strict=True):
        row[3] = _length(reference, unit)
        if not reference:
            row[2] = _length(hypothesis, unit)
    # jiwer before 4.0 refuses empty references: all that such an utterance can have is insertions, counted above.
    spoken = [index for index, (reference, _) in enumerate(pairs) if reference]
    if spoken:
        aligned = process([pairs[i][0] for i in spoken], [pairs[i][1] for i in spoken])
        for index, chunks in zip(spoken, aligned.alignments, strict=True):
            for chunk in chunks:
                if chunk.type in _COLUMNS:
                    length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                    rows[index, _COLUMNS[chunk.type]] += length
    return rows


def error_rate(sums: np.ndarray) -> np.ndarray:
    """Combine sums of :func:`edit_rows` to edits over reference length; without any reference, to the insertions."""
    return sums[..., :3].sum(axis=-1) / np.maximum(1.0, sums[..., 3])


def wer(references: Sequence[str], hypotheses: Sequence[str], normalization: str = "plain") -> float:
    """Return the word error rate of a corpus: all edits divided by all reference words, both sides normalized.

    An utterance whose reference is empty adds its hypothesis words as insertions and nothing to the divisor. Without
    any reference word in the whole corpus the number of insertions is divided by 1. Insertions can lift it above 1.

    Raises:
        ValueError: the two lists differ in length or are empty, or the normalizer is unknown.
    """
    return _corpus("word", references, hypotheses, normalization)


def cer(references: Sequence[str], hypotheses: Sequence[str], normalization: str = "plain") -> float:
    """Return the character error rate of a corpus; as :func:`wer`, in characters with the spaces between words."""
    return _corpus("character", references, hypotheses, normalization)


def _corpus(unit: str, references: Sequence[str], hypotheses: Sequence[str], normalization: str) -> float:
    rows = edit_rows(references, hypotheses, unit, normalization)
    if not len(rows):
        raise ValueError(f"{unit} error rate of no utterances is undefined: pass at least one")
    return float(error_rate(rows.sum(axis=0)))


def _length(text: str, unit: str) -> int:
    return len(text.split()) if unit == "word" else len(text)
