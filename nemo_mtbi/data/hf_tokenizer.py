# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's tokenizers behind the few methods that a chat format asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_mtbi.data.template_process import render_template

# What ``save_pretrained`` and the hub write. Small files: the largest, tokenizer.json of Llama 3, has 17 MB.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class HFTokenizer:
    """A tokenizer of Hugging Face.

    Not NeMo's ``AutoTokenizer``: that one takes ``<|im_end|>`` in the text of a user for the control token, and adds
    tokens of its own to the vocabulary.

    Args:
        folder: with the files of :data:`FILES`, and ``config.json`` where the class follows from the LLM.

    Raises:
        ValueError: if they can't be read.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer

        try:
            # never from the hub, and no code that the folder holds
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files raise what the libraries below happen to raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the tokenizer in {folder} can't be read: {reason}") from error
        self._control: dict[str, int] = dict(self.tokenizer.get_added_vocab())

    @property
    def vocab_size(self) -> int:
        """Of tokens, with those that were added."""
        return len(self.tokenizer)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that stand for themselves and are no part of a text, such as ``<|im_end|>``."""
        return tuple(self._control)

    @property
    def begin(self) -> str | None:
        """The token that the files name as the beginning of a text."""
        return self.tokenizer.bos_token

    @property
    def end(self) -> str | None:
        """The token that the files name as the end of a text."""
        return self.tokenizer.eos_token

    def token_to_id(self, token: str) -> int | None:
        """The id of a control token; ``None`` for what is text."""
        return self._control.get(token)

    def text_to_ids(self, text: str) -> list[int]:
        """Token ids of a text; no token is added, and a control token's name in it is text like any other."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def ids_to_text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[dict[str, str]], generation_prompt: bool, options: dict[str, Any]) -> str:
        """The text of a conversation by the tokenizer's own chat template.

        Args:
            messages: each with ``role`` and ``content``.
            generation_prompt: whether an answer is to follow.
            options: variables of the template.

        Raises:
            ValueError: if there is no template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: name a prompt format, as in model.chat={format: llama3}"
            )
        conversation = {"messages": list(messages), "add_generation_prompt": generation_prompt}
        reserved = conversation.keys() & options.keys()
        if reserved:
            raise ValueError(f"the options of a chat template can't set {', '.join(sorted(reserved))}")
        marks = {
            name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        variables = {"tools": None, "documents": None, **marks, **options, **conversation}
        try:
            return render_template(self.tokenizer.get_chat_template(), variables)
        except (ValueError, TypeError) as error:  # whatever a template raises
            raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from error
