# SPDX-License-Identifier: Apache-2.0
"""The section ``model.interleave``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from nemo_mtbi.config.checks import Count, OneOf, Section, Share, between


@dataclass
class InterleaveSchedule(Section):
    """First values of interleaving; they go in a straight line to those of :class:`InterleaveConfig`.

    Attributes:
        epochs: passes over the data until those are reached. Long data are cut into passes by
            ``trainer.limit_train_batches``.
        probability, text_share: in the first pass; ``None``: as later.
    """

    SECTION: ClassVar[str] = "model.interleave.schedule"

    epochs: Count = 1
    probability: Share | None = None
    text_share: Share | None = None


@dataclass
class InterleaveConfig(Section):
    """Shares of rows and words that are given as text.

    Attributes:
        probability: share of the rows that are interleaved; the others stay all speech.
        all_text: share of the rows that are given wholly as text, as an anchor. At most 1 with ``probability``.
        unit: ``word`` chooses single words, ``span`` runs of neighbouring words, ``sentence`` whole sentences, as the
            punctuation of the transcript ends them (a transcript of one sentence stays speech).
        text_share: upper bound of the share of words given as text. Every interleaved row draws its own share
            uniformly from 0 to this bound; at least one unit is written and at least one stays speech.
        mean_span: mean length of a span in words; the length is 1 + Poisson(mean_span - 1).
        first: what an interleaved row begins with: ``text``, ``speech`` or ``any``.
        level: ``embedding`` takes frames out of the whole utterance, ``wave`` encodes each spoken run alone.
        schedule: other values to begin with; ``None``: the same all the time.

    Raises:
        ValueError: if a value is out of range.
    """

    SECTION: ClassVar[str] = "model.interleave"

    probability: Share = 0.5
    all_text: Share = 0.0
    unit: Annotated[str, OneOf("word", "span", "sentence")] = "span"
    text_share: Share = 0.5
    mean_span: Annotated[float, between(1, 100)] = 3.0
    first: Annotated[str, OneOf("any", "text", "speech")] = "any"
    level: Annotated[str, OneOf("embedding", "wave")] = "embedding"
    schedule: InterleaveSchedule | None = None

    def __post_init__(self):
        super().__post_init__()
        start = self.schedule or InterleaveSchedule()
        if max(self.probability, start.probability or 0.0) + self.all_text > 1.0 + 1e-9:
            raise ValueError(
                f"model.interleave.probability {self.probability} (schedule: {start.probability}) and all_text "
                f"{self.all_text} are shares of the same rows: together they must be at most 1"
            )

    def at(self, epoch: int) -> InterleaveConfig:
        """Return the values that hold in a pass over the data, numbered from 0."""
        if self.schedule is None:
            return self
        way = min(epoch / self.schedule.epochs, 1.0)
        values = {}
        for name in ("probability", "text_share"):
            begin, end = getattr(self.schedule, name), getattr(self, name)
            values[name] = end if begin is None else begin + way * (end - begin)
        return replace(self, schedule=None, **values)
