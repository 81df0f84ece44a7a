# SPDX-License-Identifier: Apache-2.0
"""Which parts of an LLM train, and whether its weights are still those of its fingerprint."""

from __future__ import annotations

from enum import Enum, auto


class LlmState(Enum):
    """Training state of an LLM. Every question about it is answered here.

    Attributes:
        FROZEN: nothing trains, and the weights are the original ones.
        ADAPTED: adapters train beside the original weights.
        TRAINING: weights of the LLM itself train.
        TRAINED: nothing trains, but an earlier run has trained the weights.
        TRAINED_AND_ADAPTED: adapters train beside weights that an earlier run has trained.
    """

    FROZEN = auto()
    ADAPTED = auto()
    TRAINING = auto()
    TRAINED = auto()
    TRAINED_AND_ADAPTED = auto()

    @classmethod
    def of(cls, *, adapters: bool, weights_train: bool, was_trained: bool) -> LlmState:
        """Return the state that follows from how an LLM was built.

        Args:
            adapters: whether it has adapters.
            weights_train: whether some of its own weights train.
            was_trained: whether it came out of an archive whose LLM had been trained.
        """
        if weights_train:
            return cls.TRAINING
        if was_trained:
            return cls.TRAINED_AND_ADAPTED if adapters else cls.TRAINED
        return cls.ADAPTED if adapters else cls.FROZEN

    @property
    def needs_gradients(self) -> bool:
        """Whether adapters or weights train, so that text alone gives gradients too."""
        return self in (LlmState.ADAPTED, LlmState.TRAINING, LlmState.TRAINED_AND_ADAPTED)

    @property
    def weights_train(self) -> bool:
        """Whether weights of the LLM itself train, here or on other stages of the pipeline."""
        return self is LlmState.TRAINING

    @property
    def has_original_weights(self) -> bool:
        """Whether its weights, without adapters, are those of the LLM that targets come from."""
        return self in (LlmState.FROZEN, LlmState.ADAPTED)
