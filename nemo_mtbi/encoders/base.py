# SPDX-License-Identifier: Apache-2.0
"""The interface of a speech encoder: how it is read, what it gives, and which of its weights train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from nemo_mtbi.config import freezing
from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.windows import Windows
from nemo_mtbi.io.file_digests import file_digest, files_digest
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class EncoderShape:
    """Facts about an encoder that the other parts need, also in processes that do not hold it.

    Attributes:
        size: width of its frames.
        sample_rate: in hertz.
        stages: length stages from samples to frames.
    """

    size: int
    sample_rate: int
    stages: tuple[LengthStage, ...]

    @property
    def frame_rate(self) -> float:
        """Encoder frames per second."""
        return 1.0 / FrameCounter(self.stages, self.sample_rate).frame_seconds


class SpeechEncoder(nn.Module, ABC):
    """A front end (float32, never trained) and an ``encoder``, always in ``eval()``.

    Dither, dropout and batch statistics belong to the encoder's own training, also where its weights train.

    A new kind is a subclass, made known by :func:`nemo_mtbi.encoders.registry.register_encoder`.

    Attributes:
        encoder: the module whose weights take the model's dtype, and may train.
        shape: facts for the other parts.
        windows: how long audio is cut; ``None``: every utterance is encoded as a whole.
        padded: whether each window is filled up to the length of the longest one.
        title: of the kind, for messages.
        embeds: whether a full ``.nemo`` can hold it: see :meth:`settings` and :meth:`from_settings`.
    """

    encoder: nn.Module
    shape: EncoderShape
    windows: Windows | None = None
    padded: bool = False
    title: ClassVar[str] = "speech encoder"
    embeds: ClassVar[bool] = False
    _trainable: frozenset[str] = frozenset()  # names of weights, also while NeMo's freeze() holds them
    _autocast_dtype: torch.dtype | None = None  # for weights that train, which are stored in float32

    # -------------------------------------------------------------------------------------------------------- on disk

    @classmethod
    @abstractmethod
    def recognizes(cls, path: Path) -> bool:
        """Return whether the file or directory at a path is of this kind; only names and small files are read."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path, config: EncoderConfig | None) -> SpeechEncoder:
        """Return the encoder with its weights.

        Args:
            path: of the file or directory.
            config: how it is used; ``None``: by the defaults.

        Raises:
            ValueError: if it can't be read, or ``config`` does not fit it.
        """

    @classmethod
    @abstractmethod
    def empty(cls, path: Path, config: EncoderConfig | None) -> SpeechEncoder:
        """Return the encoder with tensors that have shapes and take no memory; no weights are read.

        Args:
            path: of the file or directory.
            config: how it is used; ``None``: by the defaults.

        Raises:
            ValueError: as :meth:`load`, as far as it shows without weights.
        """

    @classmethod
    def files(cls, path: Path) -> list[Path]:
        """Return the files that the fingerprint covers, in order."""
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())

    @classmethod
    def fingerprint(cls, path: Path) -> str:
        """Return the hash of the encoder at a path."""
        return file_digest(path) if path.is_file() else files_digest(cls.files(path))

    def settings(self) -> dict[str, Any]:
        """Return plain values from which :meth:`from_settings` builds the encoder, for a full ``.nemo``.

        Raises:
            ValueError: if a full ``.nemo`` can't hold it.
        """
        raise ValueError("a full .nemo holds one encoder of NeMo: save a small one, with full=False")

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        config: EncoderConfig | None,
        shapes: Mapping[str, tuple[int, ...]],
        file: str,
        weights: str,
    ) -> SpeechEncoder:
        """Build the encoder of a full ``.nemo``; its weights are copied into it afterwards.

        Args:
            settings: as :meth:`settings` gives them, but written by others: they must be checked.
            config: how it is used.
            shapes: of the stored weights by their names in ``state_dict()``, to be compared before memory is taken.
            file: name of the file with the settings, for messages.
            weights: name of the file with the weights, for messages.

        Raises:
            ValueError: if settings and weights are not those of such an encoder.
        """
        raise ValueError(f"{file} describes an encoder that a full .nemo can't hold")

    # ------------------------------------------------------------------------------------------------------- at work

    @abstractmethod
    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances, inside of :meth:`running`.

        Args:
            audio: ``[U, N]`` samples at ``shape.sample_rate``.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` frames and their ``[U]`` valid lengths, which are those that ``shape.stages`` count.
        """

    @abstractmethod
    def first_convolution(self) -> int:
        """Return how many numbers the first convolution gives for two steps of the first length stage.

        This is the largest activation of an encoder without gradients, by which a plan counts its memory.
        """

    def train(self: Module, mode: bool = True) -> Module:
        """Stay in ``eval()``."""
        return super().train(False)

    def set_trainable(self, dtype: torch.dtype, config: EncoderConfig | None) -> None:
        """Enter ``eval()``, and set which weights train and the dtypes of all.

        Args:
            dtype: of frozen weights, and of the computation. An encoder of which any weight trains is float32.
            config: says what is frozen; ``None``: everything.
        """
        self.eval().requires_grad_(False)
        chosen = unfrozen([name for name, _ in self.encoder.named_parameters()], config)
        for name, value in self.encoder.named_parameters():
            value.requires_grad_(name in chosen)
            marked: Any = value
            # Megatron sums such gradients over tensor-parallel processes, which share the utterances of a step.
            marked.sequence_parallel = name in chosen
        self._trainable = frozenset(chosen)
        kept = torch.promote_types(dtype, torch.float32) if chosen else dtype
        self._autocast_dtype = dtype if kept != dtype else None
        self.encoder.to(kept)

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights that train."""
        values = self.encoder.named_parameters()
        return {f"encoder.{name}": tuple(value.shape) for name, value in values if name in self._trainable}

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Run the encoder's forward in the body: with gradients only if some of its weights train."""
        trained = torch.is_grad_enabled() and any(value.requires_grad for value in self.encoder.parameters())
        with (
            torch.set_grad_enabled(trained),
            torch.autocast(device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None),
        ):
            yield


def trained_shapes(encoder: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights of one or two encoders that train; none where there is no encoder."""
    parts = encoder.named_modules() if encoder is not None else ()
    by_part = ((prefix, part.trained_shapes) for prefix, part in parts if isinstance(part, SpeechEncoder))
    return {f"{prefix}.{name}".lstrip("."): shape for prefix, shapes in by_part for name, shape in shapes.items()}


def unfrozen(names: Sequence[str], config: EncoderConfig | None) -> set[str]:
    """Return the names of an encoder's weights that train; without a configuration none does."""
    return set() if config is None else freezing.unfrozen(names, config.freeze, config.SECTION)
