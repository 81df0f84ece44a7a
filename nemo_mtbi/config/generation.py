# SPDX-License-Identifier: Apache-2.0
"""The section ``model.generation``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding parameters. They are part of a target's provenance.

    Attributes:
        max_new_tokens: longest answer; one that reaches it is marked as truncated.
        batch_tokens: bound on rows x (longest prompt + ``max_new_tokens``) of a batch; limits the cache's memory.
    """

    max_new_tokens: int = 64
    batch_tokens: int = 16384

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.batch_tokens < 1:
            raise ValueError(f"generation needs max_new_tokens and batch_tokens of at least 1, got {self}")
