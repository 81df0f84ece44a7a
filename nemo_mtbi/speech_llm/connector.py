# SPDX-License-Identifier: Apache-2.0
"""The trainable connector: encoder frames in, LLM embeddings out.

One interface for all kinds: a reduction of the frame rate, whose number of frames is known without running it, then a
norm and an MLP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.layouts.frames import LengthStage


def connector_stages(config: ConnectorConfig, encoder_rate: float) -> tuple[LengthStage, ...]:
    """What the connector does to a number of frames, known without building it."""
    reduction = config.reduction(encoder_rate)
    if config.kind in ("qformer", "cif"):  # the last window may be short
        return (LengthStage(reduction, reduction, ceil=True),)
    if config.kind == "stack":
        return (LengthStage(reduction, reduction),)
    kernel = config.kernel_size
    return tuple(LengthStage(kernel, 2, padding=kernel - 1) for _ in range(reduction.bit_length() - 1))


class Connector(nn.Module, ABC):
    """Reduces the frame rate and projects to the LLM's embedding size.

    Args:
        config: its shape.
        encoder_rate: encoder frames per second.

    Attributes:
        reduction: encoder frames for each of its own.
        stages: what it does to a number of frames.
    """

    def __init__(self, config: ConnectorConfig, encoder_rate: float):
        super().__init__()
        self.reduction = config.reduction(encoder_rate)
        self.stages = connector_stages(config, encoder_rate)

    def project(self, config: ConnectorConfig, width: int, output_size: int) -> None:
        """Makes norm and MLP behind what :meth:`reduce` gives, of this width."""
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden_size),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_size, output_size),
        )

    @abstractmethod
    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Fewer frames.

        Args:
            frames: ``[U, E, D]``, zero behind their lengths.
            lengths: ``[U]`` valid encoder frames.

        Returns:
            ``[U, C, W]``; what stands behind the length that ``stages`` count is arbitrary.
        """

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            frames: ``[U, E, D]`` encoder frames.
            lengths: ``[U]`` valid encoder frames.

        Returns:
            ``[U, C, H]`` connector frames and their ``[U]`` valid lengths. Padding never reaches a valid frame.
        """
        x = self.reduce(frames.masked_fill(padding(frames, lengths), 0.0), lengths)  # [U, C, W]
        return self.mlp(self.norm(x)), self.count(lengths)

    def count(self, lengths: Tensor) -> Tensor:
        """``[U]`` connector frames of so many encoder frames."""
        for stage in self.stages:
            lengths = _stage(stage, lengths)
        return lengths


class ConvConnector(Connector):
    """Strided convolutions."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, encoder_rate)
        width, kernel = config.hidden_size, config.kernel_size
        self.convs = nn.ModuleList(
            nn.Conv1d(width if n else input_size, width, kernel, stride=2, padding=kernel // 2)
            for n in range(len(self.stages))
        )
        self.project(config, width if self.stages else input_size, output_size)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = frames
        for conv, stage in zip(self.convs, self.stages, strict=True):
            x = F.gelu(conv(x.transpose(1, 2)).transpose(1, 2))  # [U, C, W]
            lengths = _stage(stage, lengths)
            x = x.masked_fill(padding(x, lengths), 0.0)
        return x


class StackConnector(Connector):
    """Frames side by side."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, encoder_rate)
        self.project(config, input_size * self.reduction, output_size)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        whole = frames.shape[1] // self.reduction
        width = self.reduction * frames.shape[2]
        return frames[:, : whole * self.reduction].reshape(frames.shape[0], whole, width)  # [U, C, S * D]


class QFormerConnector(Connector):
    """A learned query attends to the frames of each window, layer by layer."""

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, encoder_rate)
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

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
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


class CIFConnector(Connector):
    """Continuous integrate-and-fire: frames are summed by weights that a convolution gives.

    A vector is complete when the weights since the last one have reached 1. They are scaled such that an utterance has
    as many vectors as the frame rate says, which is therefore known beforehand; where they stand is learned.
    """

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__(config, encoder_rate)
        kernel = config.kernel_size
        self.weigh = nn.Sequential(
            nn.Conv1d(input_size, config.hidden_size, kernel, padding=kernel // 2),
            nn.GELU(),
            nn.Conv1d(config.hidden_size, 1, 1),
        )
        self.project(config, input_size, output_size)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
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
        self.conformer.sync_max_audio_length = False  # see SpeechEncoder
        self.project(config, width, output_size)

    def reduce(self, frames: Tensor, lengths: Tensor) -> Tensor:
        x = super().reduce(frames, lengths)
        encoded, _ = self.conformer(audio_signal=x.transpose(1, 2), length=self.count(lengths))  # [U, W, C]
        return encoded.transpose(1, 2)


_CLASSES: dict[str, type[Connector]] = {
    "conv": ConvConnector,
    "stack": StackConnector,
    "qformer": QFormerConnector,
    "conformer": ConformerConnector,
    "cif": CIFConnector,
}


def build_connector(config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float) -> Connector:
    """A connector with new weights.

    Args:
        config: its shape.
        input_size: width of an encoder frame, ``D``.
        output_size: width of an LLM embedding, ``H``.
        encoder_rate: encoder frames per second.

    Raises:
        ValueError: if it can't reach its frame rate.
    """
    return _CLASSES[config.kind](config, input_size, output_size, encoder_rate)


def padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Mask ``[U, T, 1]``, true where ``x`` (``[U, T, *]``) lies past its length."""
    steps = lengths.new_ones(x.shape[1]).cumsum(0) - 1
    return (steps[None, :] >= lengths[:, None]).unsqueeze(-1)


def _stage(stage: LengthStage, lengths: Tensor) -> Tensor:
    """The stage's number of frames, as :class:`LengthStage` counts it, for a tensor of lengths; 0 stays 0."""
    span = lengths + stage.padding - stage.kernel
    up = stage.stride - 1 if stage.ceil else 0
    return ((span + up).div(stage.stride, rounding_mode="floor") + 1).clamp(min=0).masked_fill(lengths <= 0, 0)
