# SPDX-License-Identifier: Apache-2.0
"""The trainable connector: encoder frames in, LLM embeddings out."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nemo_mtbi.data.frames import LengthStage

KINDS = ("conv", "stack")


@dataclass
class ConnectorConfig:
    """Shape of the connector.

    Attributes:
        kind: ``conv``: strided convolutions (BLSP, arXiv 2309.00916); ``stack``: frame stacking and an MLP (Ultravox,
            AZeroS, arXiv 2601.06086).
        frame_rate: wanted rate in hertz. The encoder's rate divided by a whole number (``stack``) or by a power of two
            (``conv``) must come within 20% of it.
        hidden_size: width of the convolutions and of the MLP.
        kernel_size: of each convolution, odd (``conv`` only).
        dropout: on the MLP's hidden layer.
    """

    kind: str = "conv"
    frame_rate: float = 6.25
    hidden_size: int = 512
    kernel_size: int = 3
    dropout: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"model.connector.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"model.connector.kernel_size is {self.kernel_size}; it must be odd to keep frames centred"
            )

    def reduction(self, encoder_rate: float) -> int:
        """Encoder frames per connector frame.

        Raises:
            ValueError: if no allowed reduction comes within 20% of the wanted rate.
        """
        factors = range(1, 65) if self.kind == "stack" else [2**n for n in range(7)]
        best = min(factors, key=lambda factor: abs(encoder_rate / factor - self.frame_rate))
        if abs(encoder_rate / best - self.frame_rate) > 0.2 * self.frame_rate:
            reachable = ", ".join(f"{encoder_rate / factor:g}" for factor in factors[:5])
            raise ValueError(
                f"model.connector.frame_rate {self.frame_rate} Hz can't be made from an encoder at {encoder_rate:g} "
                f"Hz with kind={self.kind}; choose one of {reachable}, … Hz"
            )
        return best


def connector_stages(config: ConnectorConfig, encoder_rate: float) -> tuple[LengthStage, ...]:
    """What the connector does to a number of frames, known without building it."""
    reduction = config.reduction(encoder_rate)
    if config.kind == "stack":
        return (LengthStage(reduction, reduction),)
    kernel = config.kernel_size
    return tuple(LengthStage(kernel, 2, padding=kernel - 1) for _ in range(reduction.bit_length() - 1))


class Connector(nn.Module):
    """Reduces the frame rate and projects to the LLM's embedding size.

    Args:
        config: its shape.
        input_size: width of an encoder frame, ``D``.
        output_size: width of an LLM embedding, ``H``.
        encoder_rate: encoder frames per second.
    """

    def __init__(self, config: ConnectorConfig, input_size: int, output_size: int, encoder_rate: float):
        super().__init__()
        self.reduction = config.reduction(encoder_rate)
        self.stacking = self.reduction if config.kind == "stack" else 1
        width, kernel = config.hidden_size, config.kernel_size
        self.stages = connector_stages(config, encoder_rate)
        self.convs = nn.ModuleList()
        if config.kind == "conv":
            for n in range(len(self.stages)):
                self.convs.append(nn.Conv1d(width if n else input_size, width, kernel, stride=2, padding=kernel // 2))
            flat = width if len(self.convs) else input_size
        else:
            flat = input_size * self.stacking
        self.norm = nn.LayerNorm(flat)
        self.mlp = nn.Sequential(
            nn.Linear(flat, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, output_size)
        )

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            frames: ``[U, E, D]`` encoder frames.
            lengths: ``[U]`` valid encoder frames.

        Returns:
            ``[U, C, H]`` connector frames and their ``[U]`` valid lengths. Padding never reaches a valid frame.
        """
        x = frames.masked_fill(_padding(frames, lengths), 0.0)  # [U, E, D]
        for conv, stage in zip(self.convs, self.stages, strict=False):  # stacking is a stage without one
            x = F.gelu(conv(x.transpose(1, 2)).transpose(1, 2))  # [U, C, W]
            lengths = (lengths + stage.padding - stage.kernel).div(stage.stride, rounding_mode="floor") + 1
            x = x.masked_fill(_padding(x, lengths), 0.0)
        if self.stacking > 1:
            lengths = lengths // self.stacking
            whole = x.shape[1] // self.stacking
            x = x[:, : whole * self.stacking].reshape(x.shape[0], whole, self.stacking * x.shape[2])  # [U, C, S * D]
        return self.mlp(self.norm(x)), lengths.clamp(min=0)


def _padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Mask ``[U, T, 1]``, true where ``x`` (``[U, T, *]``) lies past its length."""
    steps = lengths.new_ones(x.shape[1]).cumsum(0) - 1
    return (steps[None, :] >= lengths[:, None]).unsqueeze(-1)
