# SPDX-License-Identifier: Apache-2.0
"""The section ``model.connector``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from nemo_mtbi.config.checks import Count, Number, OneOf, Section

ANY_FACTOR = range(1, 65)
POWERS_OF_TWO = tuple(2**n for n in range(7))


@dataclass(frozen=True)
class ConnectorKind:
    """Constraints that a kind of connector puts on its section.

    Attributes:
        factors: allowed numbers of encoder frames per connector frame, ascending.
        uses_heads: whether it has attention, whose ``heads`` must divide ``hidden_size``.
    """

    factors: Sequence[int] = ANY_FACTOR
    uses_heads: bool = False


# By the value of ``kind``. nemo_mtbi.speech_llm.connector, which is above this folder, holds the classes.
KINDS: dict[str, ConnectorKind] = {
    "conv": ConnectorKind(POWERS_OF_TWO),
    "stack": ConnectorKind(),
    "qformer": ConnectorKind(uses_heads=True),
    "conformer": ConnectorKind(POWERS_OF_TWO, uses_heads=True),
    "cif": ConnectorKind(),
}


@dataclass
class ConnectorConfig(Section):
    """Shape of the connector.

    Attributes:
        kind: ``conv``: strided convolutions (BLSP, arXiv 2309.00916); ``stack``: frame stacking and an MLP (Ultravox,
            AZeroS, arXiv 2601.06086); ``qformer``: a query that attends to each window of frames (SALMONN, arXiv
            2310.13289); ``conformer``: convolutions and NeMo's Conformer, as SALM's modality adapter; ``cif``: frames
            are weighted and summed until their weights reach 1, so that vectors stand where the sound changes (arXiv
            1905.11235).
        frame_rate: wanted rate in hertz. The encoder's rate divided by a whole number, or by a power of two for
            ``conv`` and ``conformer``, must come within 20% of it.
        hidden_size: width of convolutions, attention and of the MLP.
        kernel_size: of each convolution, odd (``conv``, ``conformer`` and ``cif``).
        layers: of ``qformer`` and ``conformer``.
        heads: of their attention; they divide ``hidden_size``.
        dropout: on hidden layers.
    """

    SECTION: ClassVar[str] = "model.connector"

    kind: Annotated[str, OneOf(registry=KINDS)] = "conv"
    frame_rate: float = 6.25
    hidden_size: int = 512
    kernel_size: Annotated[int, Number(lambda size: size % 2 == 1, "odd to keep frames centred")] = 3
    layers: Count = 2
    heads: int = 8
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if KINDS[self.kind].uses_heads and (self.heads < 1 or self.hidden_size % self.heads):
            raise ValueError(f"model.connector.heads is {self.heads}; it must divide hidden_size, {self.hidden_size}")

    def reduction(self, encoder_rate: float) -> int:
        """Return the number of encoder frames per connector frame.

        Args:
            encoder_rate: encoder frames per second.

        Raises:
            ValueError: if no allowed reduction comes within 20% of the wanted rate.
        """
        factors = KINDS[self.kind].factors
        best = min(factors, key=lambda factor: abs(encoder_rate / factor - self.frame_rate))
        if abs(encoder_rate / best - self.frame_rate) > 0.2 * self.frame_rate:
            reachable = ", ".join(f"{encoder_rate / factor:g}" for factor in factors[:5])
            raise ValueError(
                f"model.connector.frame_rate {self.frame_rate} Hz can't be made from an encoder at {encoder_rate:g} "
                f"Hz with kind={self.kind}; choose one of {reachable}, … Hz"
            )
        return best
