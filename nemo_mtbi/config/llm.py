# SPDX-License-Identifier: Apache-2.0
"""The sections ``model.llm`` and ``model.lora``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from nemo_mtbi.config.checks import Count, Section, above, at_least
from nemo_mtbi.config.freezing import check_freeze, check_pattern


@dataclass
class LoraConfig(Section):
    """Adapters in the LLM.

    Attributes:
        rank: channels between A and B.
        alpha: B A x is multiplied by ``alpha / rank``.
        target_modules: regular expressions, each searched for in names such as
            ``decoder.layers.3.self_attention.linear_qkv``; the linear layers are ``linear_qkv``, ``linear_proj``,
            ``linear_fc1`` and ``linear_fc2``.
        speech_only: adapters act on the positions of speech only: the LLM does with text what it did before.
    """

    SECTION: ClassVar[str] = "model.lora"

    rank: Count = 16
    alpha: float = 32.0
    target_modules: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj"])
    speech_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.target_modules:
            raise ValueError("model.lora.target_modules is empty: name linear layers, or leave model.lora out")
        for pattern in self.target_modules:
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ValueError(
                    f"model.lora.target_modules has {pattern!r}, which is not a regular expression: {error}"
                ) from None

    @property
    def scale(self) -> float:
        """Factor of the product B A x."""
        return self.alpha / self.rank


@dataclass
class LlmConfig(Section):
    """Training of the LLM itself, by Megatron's distributed Adam with the schedule of ``optim``.

    Attributes:
        freeze: ``true``: it stays as it is; ``false``: all of its weights train; or patterns
            (Python's ``re``) of the names that stay, such as ``embedding``, while the others train.
        lr: learning rate at the top of the schedule; ``null``: that of ``optim``.
        weight_decay: decoupled; ``null``: that of ``optim``.
    """

    SECTION: ClassVar[str] = "model.llm"

    freeze: Any = True
    lr: Annotated[float | None, above(0)] = None
    weight_decay: Annotated[float | None, at_least(0)] = None

    def __post_init__(self):
        super().__post_init__()
        check_freeze(self.freeze, self.SECTION)

    @property
    def trains(self) -> bool:
        """Whether some of the LLM's weights may train."""
        return self.freeze is not True
