# SPDX-License-Identifier: Apache-2.0
"""The interface of a speech LLM that archives, loaders and profiling work on; ``MTBIModel`` implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn

from nemo_mtbi.archive.frozen import FrozenParts
from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer
from nemo_mtbi.speech_llm.model import SpeechLLM
from nemo_mtbi.speech_llm.trainable import ModelShape


class SpeechModel(Protocol):
    """A speech LLM that NeMo trains, saves and restores.

    Attributes:
        cfg: the ``model:`` section as it is stored.
        config: the same, checked.
        frozen: the frozen parts and their fingerprints.
        shape: of the model; names and shapes of its trained weights follow from it.
        llm_files: settings and tokenizer of the LLM, by their names in an archive.
        speech_llm: encoder, connector and LLM, or this process's share of them.
        chat: the chat format.
        llm_optimizer: the optimizer of the LLM's own weights, within a fit that trains them.
        expected_targets: provenance that targets must have.
        run_settings: settings of the training that are not the model's.
        wants_to_stop: whether this process has a request to stop; called before each step.
        trainer: Lightning's; ``None`` outside of a run.
    """

    cfg: DictConfig
    config: ModelConfig
    frozen: FrozenParts
    shape: ModelShape
    llm_files: dict[str, bytes]
    speech_llm: SpeechLLM
    chat: ChatFormat
    llm_optimizer: LlmOptimizer | None
    expected_targets: dict[str, Any]
    run_settings: dict[str, Any] | None
    wants_to_stop: Callable[[], bool]
    trainer: Trainer | None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        ...

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that this process trains beside weights of the LLM itself."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return this process's share of the trained weights, by their stored names."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Copy trained weights into the model."""
        ...
