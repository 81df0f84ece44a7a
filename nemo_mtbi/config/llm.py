# SPDX-License-Identifier: Apache-2.0
"""The sections ``model.llm`` and ``model.lora``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_mtbi.config.freezing import check_freeze, check_pattern


@dataclass
class LoraConfig:
    """Adapters in the LLM.

    Attributes:
        rank: channels between A and B.
        alpha: B A x is multiplied by ``alpha / rank``.
        target_modules: regular expressions, each searched for in names such as
            ``decoder.layers.3.self_attention.linear_qkv``; the linear layers are ``linear_qkv``, ``linear_proj``,
            ``linear_fc1`` and ``linear_fc2``.
        speech_only: adapters see the positions of speech only: what the LLM does with text stays what it was.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj"])
    speech_only: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"model.lora.rank is {self.rank}; it must be at least 1")
        if not self.target_modules:
            raise ValueError("model.lora.target_modules is empty: name linear layers, or leave model.lora out")
        for pattern in self.target_modules:
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(
                    f"model.lora.target_modules has {pattern!r}, no regular expression: {error}"
                ) from None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class LlmConfig:
    """Whether the LLM itself trains; its optimizer is Megatron's distributed Adam, with the schedule of ``optim``.

    Attributes:
        freeze: ``true``: it stays what it is; ``false``: all of its weights train; or patterns
            (Python's ``re``) of the names that stay, such as ``embedding``, while the others train.
        lr: learning rate at the top of the schedule; ``null``: that of ``optim``.
        weight_decay: decoupled; ``null``: that of ``optim``.
    """

    freeze: Any = True
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        check_freeze(self.freeze, "model.llm")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"model.llm.lr is {self.lr}; it must be above 0")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ValueError(f"model.llm.weight_decay is {self.weight_decay}; it must be at least 0")

    @property
    def trains(self) -> bool:
        """Whether some of the LLM's weights may train."""
        return self.freeze is not True
