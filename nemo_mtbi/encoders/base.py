# SPDX-License-Identifier: Apache-2.0
"""What speech encoders of NeMo and of Hugging Face have in common: what of them trains, and in which numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nemo_mtbi.config import freezing
from nemo_mtbi.config.encoder import EncoderConfig


class Hearing(nn.Module):
    """A front end (float32, never trained) and an ``encoder``, always in ``eval()``.

    Dither, dropout and batch statistics belong to the encoder's own training, also where its weights train.
    """

    encoder: nn.Module
    _chosen: frozenset[str] = frozenset()  # names of the weights that train, also while NeMo's freeze() holds them
    _narrow: torch.dtype | None = None  # what weights compute in that train and are therefore kept in float32

    def train(self, mode: bool = True) -> Hearing:
        """Stays in ``eval()``."""
        return super().train(False)

    def settle(self, dtype: torch.dtype, config: EncoderConfig | None) -> None:
        """Sets which weights train, and their dtype.

        Args:
            dtype: to compute in; of frozen weights too.
            config: says what is frozen; ``None``: everything.
        """
        self.requires_grad_(False)
        chosen = unfrozen([name for name, _ in self.encoder.named_parameters()], config)
        for name, value in self.encoder.named_parameters():
            value.requires_grad_(name in chosen)
            # tensor-parallel processes share the utterances of a step: Megatron's word for such a gradient
            value.sequence_parallel = name in chosen
        self._chosen = frozenset(chosen)
        kept = torch.promote_types(dtype, torch.float32) if chosen else dtype
        self._narrow = dtype if kept != dtype else None
        self.encoder.to(kept)

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that train."""
        values = self.encoder.named_parameters()
        return {f"encoder.{name}": tuple(value.shape) for name, value in values if name in self._chosen}

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """For the encoder's forward: with gradients only if some of its weights train."""
        trained = torch.is_grad_enabled() and any(value.requires_grad for value in self.encoder.parameters())
        with (
            torch.set_grad_enabled(trained),
            torch.autocast(device.type, self._narrow, enabled=self._narrow is not None),
        ):
            yield


def trained_shapes(encoder: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of one or two encoders that train; none where there is no encoder."""
    parts = encoder.named_modules() if encoder is not None else ()
    found = ((prefix, part.trained_shapes) for prefix, part in parts if isinstance(part, Hearing))
    return {f"{prefix}.{name}".lstrip("."): shape for prefix, shapes in found for name, shape in shapes.items()}


def unfrozen(names: Sequence[str], config: EncoderConfig | None) -> set[str]:
    """Names of the weights of an encoder that train; without a configuration none does."""
    return set() if config is None else freezing.unfrozen(names, config.freeze, config.SECTION)
