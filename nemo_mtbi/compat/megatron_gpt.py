# SPDX-License-Identifier: Apache-2.0
"""A base class of Megatron's GPT that ends at the hidden states."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor


class HiddenStatesGPT(GPTModel):
    """A ``GPTModel`` whose forward returns the hidden states ``[T, R, H]`` of its last layer on every stage.

    Overrides ``_postprocess``, which applies the head and the loss. The public argument ``post_process=False`` would
    leave out the head's weights too, and the final norm. A forward that can return hidden states would replace it.
    """

    def _postprocess(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        return hidden_states
