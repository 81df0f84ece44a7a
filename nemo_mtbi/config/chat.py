# SPDX-License-Identifier: Apache-2.0
"""The section ``model.chat``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from nemo_mtbi.config.checks import OneOf, Section


@dataclass
class ChatConfig(Section):
    """Chat format of the LLM, and the place of the speech in it.

    Attributes:
        format: name of one of NeMo's prompt formatters, such as ``llama3``, ``qwen`` or ``mistral``; ``null``: the
            chat template that the tokenizer brings.
        system: system prompt; ``null``: the template's own, if it has one.
        audio: where the speech stands in the user's turn: ``after`` the instruction or ``before`` it.
        separator: text between them.
        options: variables of the tokenizer's template, such as ``enable_thinking: false`` for Qwen3.
    """

    SECTION: ClassVar[str] = "model.chat"

    format: str | None = None
    system: str | None = None
    audio: Annotated[str, OneOf("after", "before")] = "after"
    separator: str = "\n"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.format and self.options:
            raise ValueError(
                "model.chat.options are of the tokenizer's own template: leave them out, or model.chat.format"
            )
