# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's tokenizers behind the few methods that chat formats use."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_mtbi.chat.template_process import render_template

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
# Each of these holds a vocabulary; the others say how it is used.
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def has_vocabulary(names: Collection[str]) -> bool:
    """Return whether files of these names hold a vocabulary."""
    return any(all(name in names for name in group) for group in VOCABULARIES)


class HFTokenizer:
    """A tokenizer of Hugging Face.

    Not NeMo's ``AutoTokenizer``: that one takes ``<|im_end|>`` in the text of a user for the control token, and adds
    tokens of its own to the vocabulary.

    Args:
        folder: with the files of :data:`FILES`, and ``config.json`` where the class follows from the LLM.

    Raises:
        ValueError: if they can't be read, hold no vocabulary, or name control tokens that it lacks.
    """

    def __init__(self, folder: str | Path):
        from transformers import AutoTokenizer

        folder = Path(folder)
        if not has_vocabulary([name for name in FILES if (folder / name).is_file()]):
            raise ValueError(
                f"the tokenizer in {folder} can't be read: it lacks tokenizer.json (or tokenizer.model, or vocab.json "
                "and merges.txt); copy the whole directory"
            )
        try:
            # never from the hub, and no code that the folder holds
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # damaged files raise what the libraries below happen to raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the tokenizer in {folder} can't be read: {reason}") from error
        self._control: dict[str, int] = dict(self.tokenizer.get_added_vocab())
        if len(self.tokenizer) <= len(self._control):
            raise ValueError(f"the tokenizer in {folder} has no vocabulary: its class reads files that are not there")
        stored = _stored_tokens(folder)
        unknown = sorted(self._control.items() - stored) if stored else []
        if unknown:
            file = next(group[0] for group in VOCABULARIES if (folder / group[0]).is_file())
            raise ValueError(
                f"the tokenizer in {folder} names {', '.join(repr(name) for name, _ in unknown)} in "
                f"tokenizer_config.json or special_tokens_map.json, but {file} has no such token, and the LLM no "
                "embedding of it: copy all files of the tokenizer from the same place"
            )
        # SentencePiece marks the beginning of a text: some of its tokenizers that of each text between control tokens
        name = next((name for name in self._control if len(self.rendered_to_ids(name)) == 1), "")
        self.restarts_after_token = self.rendered_to_ids(f"{name}fox")[bool(name) :] == self.text_to_ids("fox")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with those that were added."""
        return len(self.tokenizer)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Names of tokens that are not text, such as ``<|im_end|>``."""
        return tuple(self._control)

    @property
    def begin(self) -> str | None:
        """Name of the token that begins a text, if the files say so."""
        return self.tokenizer.bos_token

    @property
    def end(self) -> str | None:
        """Name of the token that ends a text, if the files say so."""
        return self.tokenizer.eos_token

    @property
    def end_id(self) -> int | None:
        """Id of :attr:`end`."""
        return self.tokenizer.eos_token_id

    def strips(self, token: str) -> tuple[bool, bool]:
        """Return whether a control token takes white space before it, and behind it, out of a rendered text."""
        added = self.tokenizer.added_tokens_decoder[self._control[token]]
        return added.lstrip, added.rstrip

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a control token; ``None`` for what is text."""
        return self._control.get(token)

    def text_to_ids(self, text: str) -> list[int]:
        """Return the token ids of a text; no token is added, and the name of a control token in it is text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def rendered_to_ids(self, text: str) -> list[int]:
        """Return the token ids of what :meth:`render` gives, in which names of control tokens stand for them."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def ids_to_text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[dict[str, str]], generation_prompt: bool, options: dict[str, Any]) -> str:
        """Return the text of a conversation by the tokenizer's own chat template.

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


def _stored_tokens(folder: Path) -> set[tuple[str, int]]:
    """Return tokens with their ids, as the files have them; nothing if there is no vocabulary that can be listed.

    Raises:
        ValueError: if they can't be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return set(_read_tokens(folder))
        pieces = _pieces(folder / "tokenizer.model")
        return pieces | set(_read_tokens(folder)) if pieces else set()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the tokenizer in {folder} can't be read: its tokens are malformed ({error})") from error


def _pieces(path: Path) -> set[tuple[str, int]]:
    """Return the pieces of a SentencePiece model; none of a file of that name in another form, as Llama 3's own."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        return set()
    return {(model.id_to_piece(i), i) for i in range(len(model))}


def _read_tokens(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the tokens, with their ids, of all JSON files of a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == "tokenizer_config.json":
            tokens = ((entry["content"], int(i)) for i, entry in (content.get("added_tokens_decoder") or {}).items())
        elif name == "tokenizer.json":
            vocabulary = (content.get("model") or {}).get("vocab") or {}
            if not isinstance(vocabulary, dict):  # Unigram: pairs of piece and score
                vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
            yield from vocabulary.items()
            tokens = ((entry["content"], entry["id"]) for entry in content.get("added_tokens") or ())
        else:
            tokens = content.items()
        yield from tokens
