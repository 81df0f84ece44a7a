# SPDX-License-Identifier: Apache-2.0
"""The section ``model.loss``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

from nemo_mtbi.config.checks import OneOf, Section, above, at_least


@dataclass
class LossConfig(Section):
    """Weights of what is minimized for each response token: cross entropy, and the distance from the text twin.

    The text twin (the teacher) is the same frozen LLM that reads the transcript where the student gets the speech.

    Attributes:
        ce_weight: of the cross entropy with the response.
        kl_weight: of the divergence between teacher and student, over the whole vocabulary. 0: there is none.
        divergence: ``forward_kl``, KL(teacher || student); ``reverse_kl``, KL(student || teacher); ``js``, their
            Jensen-Shannon divergence, which is bounded by ln 2.
        temperature: both distributions are softened by it before they are compared.
        scale_by_temperature: multiply the divergence by the squared temperature, which keeps its gradient of about the
            same size whatever the temperature (Hinton et al. 2015, arXiv 1503.02531).
        hidden_weight: of the squared distance of the last hidden states, mean over channels. DiVA (arXiv 2410.02678)
            minimizes an L2 distance of hidden states in place of KL. 0: there is none.

    Raises:
        ValueError: if a value is out of range, or belongs to a part that has no weight.
    """

    SECTION: ClassVar[str] = "model.loss"

    ce_weight: Annotated[float, at_least(0)] = 1.0
    kl_weight: Annotated[float, at_least(0)] = 0.0
    divergence: Annotated[str, OneOf("forward_kl", "reverse_kl", "js")] = "forward_kl"
    temperature: Annotated[float, above(0)] = 1.0
    scale_by_temperature: bool = True
    hidden_weight: Annotated[float, at_least(0)] = 0.0

    def __post_init__(self):
        super().__post_init__()
        weights = ("ce_weight", "kl_weight", "hidden_weight")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(
                f"model.loss has nothing to learn from: give one of {', '.join(weights)} a weight above 0"
            )
        if not self.kl_weight:
            defaults = {field.name: field.default for field in fields(self)}
            for name in ("divergence", "temperature"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"model.loss.{name} is {getattr(self, name)}, but model.loss.kl_weight is 0, so that nothing "
                        f"reads it: set kl_weight, or leave {name} at {defaults[name]}"
                    )

    @property
    def uses_teacher(self) -> bool:
        """Whether the LLM also reads the text twins."""
        return self.kl_weight > 0 or self.hidden_weight > 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the terms that are logged beside the loss; none where the loss is a cross entropy alone."""
        if not self.uses_teacher:
            return ()
        return ("ce", *(["kl"] if self.kl_weight else []), *(["hidden"] if self.hidden_weight else []))
