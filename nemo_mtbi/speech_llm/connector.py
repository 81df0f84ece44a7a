# SPDX-License-Identifier: Apache-2.0
"""The trainable connector: encoder frames in, LLM embeddings out.

One interface for all kinds: a reduction of the frame rate, whose number of frames is known without running it, then a
norm and an MLP. A new kind is a subclass of :class:`Connector` with :func:`register_connector` above it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_mtbi.config.connector import KINDS, ConnectorConfig, ConnectorKind
from nemo_mtbi.encoders.base import EncoderShape
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

CONNECTORS: dict[str, type[Connector]] = {}  # by ``model.connector.kind``
Kind = TypeVar("Kind", bound="type[Connector]")


def register_connector(name: str, kind: ConnectorKind | None = None) -> Callable[[Kind], Kind]:
    """Return a class decorator that makes a connector available as ``model.connector.kind``.

    Args:
        name: value of ``kind``.
        kind: constraints on the section; ``None``: they stand in :data:`nemo_mtbi.config.connector.KINDS` already.

    Raises:
        ValueError: by the decorator, if the name is taken, or has no constraints.
    """

    def register(cls: Kind) -> Kind:
        if name in CONNECTORS or kind is None and name not in KINDS:
            state = "registered already" if name in CONNECTORS else "unknown to the configuration"
            raise ValueError(f"the connector {name!r} is {state}: choose another name, or give its ConnectorKind")
        if kind is not None:
            KINDS[name] = kind
        CONNECTORS[name] = cls
        return cls

    return register


class Connector(nn.Module, ABC):
    """Reduces the frame rate and projects to the LLM's embedding size.

    Subclasses call :meth:`project` in their constructor.

    Args:
        config: the section ``model.connector``.
        input_size: width of an encoder frame, ``D``.
        output_size: width of an LLM embedding, ``H``.
        encoder_rate: encoder frames per second.

    Attributes:
        reduction: encoder frames per connector frame.
        stages: the length stages from encoder frames to connector frames.
    """

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__()
        self.reduction = config.reduction(encoder_rate)
        self.stages = self.length_stages(config, self.reduction)

    @staticmethod
    def length_stages(config: ConnectorConfig, reduction: int) -> tuple[LengthStage, ...]:
        """Return the stages that turn a number of encoder frames into one of connector frames.

        Known without building it. The default drops the frames left over from the last ``reduction``.

        Args:
            config: the section ``model.connector``.
            reduction: encoder frames per connector frame.
        """
        return (LengthStage(reduction, reduction),)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which frames are given."""
        return next(self.parameters()).dtype

    def project(self, config: ConnectorConfig, width: int, output_size: int) -> None:
        """Make norm and MLP behind :meth:`reduce`.

        Args:
            config: the section ``model.connector``.
            width: of the frames that :meth:`reduce` gives, ``W``.
            output_size: width of an LLM embedding, ``H``.
        """
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_size, output_size),
        )

    @abstractmethod
    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return fewer frames, before norm and MLP.

        Args:
            frames: ``[U, E, D]``, zero behind their lengths.
            lengths: ``[U]`` valid encoder frames.

        Returns:
            ``[U, C, W]``; frames past the length that ``stages`` count may hold anything.
        """

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return connector frames; padding never reaches a valid one.

        Args:
            frames: ``[U, E, D]`` encoder frames.
            lengths: ``[U]`` valid encoder frames.

        Returns:
            ``[U, C, H]`` connector frames and their ``[U]`` valid lengths.
        """
        x = self.reduce(frames.masked_fill(padding(frames, lengths), 0.0), lengths)  # [U, C, W]
        return self.mlp(self.norm(x)), self.count(lengths)

    def count(self, lengths: Tensor) -> Tensor:
        """Return ``[U]`` numbers of connector frames for ``[U]`` numbers of encoder frames."""
        for stage in self.stages:
            lengths = _stage(stage, lengths)
        return lengths


@register_connector("conv")
class ConvConnector(Connector):
    """Strided convolutions."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, input_size, output_size, encoder_rate)
        width, kernel = config.hidden_size, config.kernel_size
        self.convs = nn.ModuleList(
            nn.Conv1d(width if n else input_size, width, kernel, stride=2, padding=kernel // 2)
            for n in range(len(self.stages))
        )
        self.project(config, width if self.stages else input_size, output_size)

    @staticmethod
    def length_stages(config: ConnectorConfig, reduction: int) -> tuple[LengthStage, ...]:
        """Return one stage of stride 2 for each convolution."""
        kernel = config.kernel_size
        return tuple(LengthStage(kernel, 2, padding=kernel - 1) for _ in range(reduction.bit_length() - 1))

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return what the last convolution gives, ``[U, C, W]``."""
        x = frames
        for conv, stage in zip(self.convs, self.stages, strict=True):
            x = F.gelu(conv(x.transpose(1, 2)).transpose(1, 2))  # [U, C, W]
            lengths = _stage(stage, lengths)
            x = x.masked_fill(padding(x, lengths), 0.0)
        return x


@register_connector("stack")
class StackConnector(Connector):
    """Frames side by side."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, input_size, output_size, encoder_rate)
        self.project(config, input_size * self.reduction, output_size)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return neighboring frames side by side, ``[U, C, reduction * D]``."""
        whole = frames.shape[1] // self.reduction
        width = self.reduction * frames.shape[2]
        return frames[:, : whole * self.reduction].reshape(frames.shape[0], whole, width)  # [U, C, S * D]


@register_connector("qformer")
class QFormerConnector(Connector):
    """A learned query attends to the frames of each window, layer by layer."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, input_size, output_size, encoder_rate)
        width = config.hidden_size
        self.widen = nn.Linear(input_size, width)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(self.reduction, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, config.heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers)
        )
        self.project(config, width, output_size)

    @staticmethod
    def length_stages(config: ConnectorConfig, reduction: int) -> tuple[LengthStage, ...]:
        """Return one stage; the last window may be shorter than the others."""
        return (LengthStage(reduction, reduction, ceil=True),)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return the query of each window, ``[U, C, W]``."""
        utterances, steps, _ = frames.shape
        windows = -(-steps // self.reduction)
        x = F.pad(self.widen(frames), (0, 0, 0, windows * self.reduction - steps))
        x = x.unflatten(1, (windows, self.reduction)) + self.places  # [U, C, S, W]
        absent = padding(x.flatten(1, 2), lengths).view(utterances * windows, self.reduction)
        absent = absent & ~absent.all(1, keepdim=True)  # a window without a frame attends to anything: it is left out
        query = self.query.expand(utterances * windows, 1, -1)
        for layer in self.layers:
            query = layer(query, x.flatten(0, 1), memory_key_padding_mask=absent)  # [U * C, 1, W]
        return query.view(utterances, windows, -1)


@register_connector("cif")
class CIFConnector(Connector):
    """Continuous integrate-and-fire: frames are summed by weights that a convolution gives.

    A vector is complete when the weights since the last one have reached 1. They are scaled such that an utterance has
    as many vectors as the frame rate says, which is therefore known beforehand; where they stand is learned.
    """

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, input_size, output_size, encoder_rate)
        kernel = config.kernel_size
        self.weigh = nn.Sequential(
            nn.Conv1d(input_size, config.hidden_size, kernel, padding=kernel // 2),
            nn.GELU(),
            nn.Conv1d(config.hidden_size, 1, 1),
        )
        self.project(config, input_size, output_size)

    @staticmethod
    def length_stages(config: ConnectorConfig, reduction: int) -> tuple[LengthStage, ...]:
        """Return one stage; the last span may be shorter than the others."""
        return (LengthStage(reduction, reduction, ceil=True),)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return weighted sums of frames, ``[U, C, D]``."""
        outside = padding(frames, lengths).squeeze(-1)  # [U, E]
        weights = self.weigh(frames.transpose(1, 2)).squeeze(1)  # [U, E]
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))  # their sums are cut at whole numbers
        weights = (weights.sigmoid() + 1e-4).masked_fill(outside, 0.0)
        counts = self.count(lengths).to(weights.dtype)
        scale = counts / weights.sum(1).clamp(min=1e-4)
        ends = (weights * scale[:, None]).cumsum(1)  # [U, E]
        starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
        slots = torch.arange(-(-frames.shape[1] // self.reduction), device=frames.device)[:, None].to(ends.dtype)
        # how much of a frame's weight falls between slot and slot + 1
        shares = torch.minimum(ends[:, None], slots + 1) - torch.maximum(starts[:, None], slots)  # [U, C, E]
        return shares.clamp(min=0).to(frames.dtype) @ frames


@register_connector("conformer")
class ConformerConnector(ConvConnector):
    """Strided convolutions, then NeMo's Conformer over the whole utterance."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        from nemo.collections.asr.modules import ConformerEncoder

        super().__init__(config, input_size, output_size, encoder_rate)
        width = config.hidden_size
        self.conformer = ConformerEncoder(
            feat_in=width if self.stages else input_size,
            n_layers=config.layers,
            d_model=width,
            n_heads=config.heads,
            subsampling_factor=1,
            conv_norm_type="layer_norm",  # a batch norm would mix utterances
            conv_kernel_size=9,
            dropout=config.dropout,
            dropout_pre_encoder=config.dropout,
            dropout_emb=0.0,
            dropout_att=config.dropout,
        )
        self.conformer.sync_max_audio_length = False  # see NemoEncoder
        self.project(config, width, output_size)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return the output of the Conformer, ``[U, C, W]``."""
        x = super().reduce(frames, lengths)
        encoded, _ = self.conformer(audio_signal=x.transpose(1, 2), length=self.count(lengths))  # [U, W, C]
        return encoded.transpose(1, 2)


def connector_stages(config: ConnectorConfig, encoder_rate: float) -> tuple[LengthStage, ...]:
    """Return the length stages of a connector without building it.

    Raises:
        ValueError: if it can't reach its frame rate.
    """
    return CONNECTORS[config.kind].length_stages(config, config.reduction(encoder_rate))


def frame_counter(shape: EncoderShape, config: ConnectorConfig) -> FrameCounter:
    """Return the counter of connector frames of a model.

    Args:
        shape: of the encoder.
        config: the section ``model.connector``.

    Raises:
        ValueError: if the connector can't reach its frame rate.
    """
    return FrameCounter(shape.stages + connector_stages(config, shape.frame_rate), shape.sample_rate)


def build_connector(config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float) -> Connector:
    """Build a connector with new weights.

    Args:
        config: the section ``model.connector``.
        input_size: width of an encoder frame, ``D``.
        output_size: width of an LLM embedding, ``H``.
        encoder_rate: encoder frames per second.

    Raises:
        ValueError: if it can't reach its frame rate.
    """
    return CONNECTORS[config.kind](config, input_size, output_size, encoder_rate)


def padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mask ``[U, T, 1]``, true where ``x`` (``[U, T, *]``) lies past its length."""
    steps = lengths.new_ones(x.shape[1]).cumsum(0) - 1
    return (steps[None, :] >= lengths[:, None]).unsqueeze(-1)


def _stage(stage: LengthStage, lengths: Tensor) -> Tensor:
    """Return numbers of frames after a stage, as :class:`LengthStage` counts them, for a tensor of lengths."""
    span = lengths + stage.padding - stage.kernel
    up = stage.stride - 1 if stage.ceil else 0
    return ((span + up).div(stage.stride, rounding_mode="floor") + 1).clamp(min=0).masked_fill(lengths <= 0, 0)
