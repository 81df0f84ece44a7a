# SPDX-License-Identifier: Apache-2.0
"""The section ``model.interleave``."""

from __future__ import annotations

from dataclasses import dataclass, replace

UNITS = ("word", "span", "sentence")
FIRST = ("any", "text", "speech")
LEVELS = ("embedding", "wave")


@dataclass(frozen=True)
class InterleaveSchedule:
    """Where interleaving starts from; it goes in a straight line to the values of :class:`InterleaveConfig`.

    Attributes:
        epochs: passes over the data until those are reached. Long data are cut into passes by
            ``trainer.limit_train_batches``.
        probability, text_share: in the first pass; ``None``: as later.
    """

    epochs: int = 1
    probability: float | None = None
    text_share: float | None = None


@dataclass(frozen=True)
class InterleaveConfig:
    """How often and how much of an utterance is given as text.

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

    probability: float = 0.5
    all_text: float = 0.0
    unit: str = "span"
    text_share: float = 0.5
    mean_span: float = 3.0
    first: str = "any"
    level: str = "embedding"
    schedule: InterleaveSchedule | None = None

    def __post_init__(self):
        start = self.schedule or InterleaveSchedule()
        for name, value in (
            ("probability", self.probability),
            ("all_text", self.all_text),
            ("text_share", self.text_share),
            ("schedule.probability", start.probability),
            ("schedule.text_share", start.text_share),
        ):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"interleave.{name} is a share and must lie between 0 and 1, got {value}")
        for name, known in (("unit", UNITS), ("first", FIRST), ("level", LEVELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"interleave.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if max(self.probability, start.probability or 0.0) + self.all_text > 1.0 + 1e-9:
            raise ValueError(
                f"interleave.probability {self.probability} (schedule: {start.probability}) and all_text "
                f"{self.all_text} are shares of the same rows: together they must be at most 1"
            )
        if not 1.0 <= self.mean_span <= 100.0:
            raise ValueError(f"interleave.mean_span counts words and must lie between 1 and 100, got {self.mean_span}")
        if start.epochs < 1:
            raise ValueError(f"interleave.schedule.epochs must be at least 1, got {start.epochs}")

    def at(self, epoch: int) -> InterleaveConfig:
        """The values that hold in a pass over the data, numbered from 0."""
        if self.schedule is None:
            return self
        way = min(epoch / self.schedule.epochs, 1.0)
        values = {}
        for name in ("probability", "text_share"):
            begin, end = getattr(self.schedule, name), getattr(self, name)
            values[name] = end if begin is None else begin + way * (end - begin)
        return replace(self, schedule=None, **values)
