# SPDX-License-Identifier: Apache-2.0
"""Internals of Hugging Face's transformers."""

from __future__ import annotations

from typing import Any


def build_from_config(cls: Any, config: Any) -> Any:
    """Return a model of a class with random weights.

    Uses ``PreTrainedModel._from_config``, which sets dtype and attention as the configuration says. The public
    ``AutoModel.from_config`` chooses the class by the configuration, and it has no class for Whisper's encoder alone.
    A public ``from_config`` of a class would replace it.

    Args:
        cls: a subclass of ``PreTrainedModel``.
        config: of it.
    """
    return cls._from_config(config)
