# SPDX-License-Identifier: Apache-2.0
"""The section ``model.generation``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nemo_mtbi.config.checks import Count, Section


@dataclass
class GenerationConfig(Section):
    """Decoding parameters. They are part of a target's provenance.

    Attributes:
        max_new_tokens: longest answer; one that reaches it is marked as truncated.
        batch_tokens: bound on rows x (longest prompt + ``max_new_tokens``) of a batch; limits the cache's memory.
    """

    SECTION: ClassVar[str] = "model.generation"

    max_new_tokens: Count = 64
    batch_tokens: Count = 16384
