# SPDX-License-Identifier: Apache-2.0
"""Validation metrics: loss, agreement with the text LLM, word error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.metrics.corpus import cer, exact, token_f1, wer

SHOWN = ("val_loss", "val_agreement", "val_wer")  # by the progress bar


def validation_figures(results: Sequence[Mapping[str, Any]], config: ModelConfig) -> dict[str, float]:
    """Return the loss on the targets, and how far free-running answers to the speech agree with the LLM's to the text.

    Args:
        results: of the batches of all replicas: summed ``loss`` and ``parts`` over ``tokens``, ``rows``, ``answers``.
        config: of the model.

    Returns:
        Figures by the names under which they are logged; none if there was nothing to answer.
    """
    rows = [row for result in results for row in result["rows"]]
    answers = [answer for result in results for answer in result["answers"]]
    tokens = max(sum(result["tokens"] for result in results), 1)
    if not rows:
        return {}
    figures = {"val_loss": sum(result["loss"] for result in results) / tokens}
    for name in config.loss.parts:
        figures[f"val_{name}"] = sum(result["parts"][name] for result in results) / tokens
    pairs = [(row.reference, answer) for row, answer in zip(rows, answers, strict=True)]
    figures["val_agreement"] = sum(exact(*pair) for pair in pairs) / len(pairs)
    figures["val_f1"] = sum(token_f1(*pair) for pair in pairs) / len(pairs)
    spoken = [
        (row.transcript, x) for row, x in zip(rows, answers, strict=True) if row.task == config.transcription_task
    ]
    if spoken:
        said, written = map(list, zip(*spoken, strict=True))
        figures |= {"val_wer": wer(said, written), "val_cer": cer(said, written)}
    return figures
