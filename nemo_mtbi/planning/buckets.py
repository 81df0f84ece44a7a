# SPDX-License-Identifier: Apache-2.0
"""Buckets for training data, estimated once for a large corpus instead of at the start of each run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import cost_bins, training_costs
from nemo_mtbi.planning.checks import check_model, read_llm
from nemo_mtbi.planning.data_checks import section_of
from nemo_mtbi.planning.footprint import read_encoder_settings
from nemo_mtbi.planning.plan import Plan
from nemo_mtbi.speech_llm.connector import frame_counter


@dataclass(frozen=True)
class Bins:
    """Buckets of cuts by their cost: positions of the decoder over all rows of a cut.

    Attributes:
        bounds: upper bounds of all buckets but the last.
        costs: of the cuts that they were estimated from.
    """

    bounds: tuple[int, ...]
    costs: tuple[int, ...]

    def buckets(self) -> list[list[int]]:
        """Return the costs in each bucket."""
        buckets: list[list[int]] = [[] for _ in range(len(self.bounds) + 1)]
        for cost in self.costs:
            buckets[bisect_left(self.bounds, cost)].append(cost)  # a bound belongs to its bucket
        return buckets

    @property
    def fill(self) -> float:
        """Share of positions that hold data if each bucket is padded to its longest cut, from 0 to 1."""
        return sum(self.costs) / sum(len(bucket) * max(bucket) for bucket in self.buckets() if bucket)

    def render(self, console: Console) -> None:
        """Print a table, and the lines for ``model.train_ds``."""
        table = Table(box=box.SIMPLE_HEAD, title=f"{len(self.costs)} cuts · positions of all rows of a cut")
        for name in ("bucket", "from", "to", "cuts", "fill"):
            table.add_column(name, justify="right")
        for number, bucket in enumerate(self.buckets(), 1):
            fill = sum(bucket) / (len(bucket) * max(bucket))
            table.add_row(str(number), str(min(bucket)), str(max(bucket)), str(len(bucket)), f"{fill:.0%}")
        console.print(table)
        console.print(
            f"fill of all: {self.fill:.0%}; without buckets {Bins((), self.costs).fill:.0%}", highlight=False
        )
        console.print("model.train_ds:", highlight=False)
        if not self.bounds:
            console.print("  use_bucketing: false  # all cuts cost the same, or they are too few", highlight=False)
            return
        console.print(f"  num_buckets: {len(self.bounds) + 1}", highlight=False)
        console.print(f"  bucket_duration_bins: {list(self.bounds)}", highlight=False, soft_wrap=True)


def find_bins(costs: Sequence[int], num_buckets: int) -> Bins:
    """Return buckets that hold about the same total cost each."""
    return Bins(tuple(cost_bins(list(costs), num_buckets)), tuple(costs))


def estimate_bins(cfg: DictConfig) -> Bins:
    """Estimate buckets from the first cuts of a run's training data, without weights and audio.

    Args:
        cfg: a training configuration. ``model.train_ds.num_buckets`` and ``num_cuts_for_bins_estimate`` say how many
            buckets and cuts.

    Raises:
        ValueError: if the plan of such a run has problems.
    """
    OmegaConf.resolve(cfg)
    if cfg.get("data"):
        raise ValueError("a corpus that is built on the spot needs no buckets: set data=null and model.train_ds")
    if not cfg.model.get("train_ds"):
        raise ValueError("model.train_ds is not set: it names the data whose buckets are looked for")
    plan = Plan()
    config = check_model(plan, cfg.model)
    llm = read_llm(plan, cfg.model.get("pretrained_llm"), config.chat if config else None)
    encoder = plan.attempt(
        read_encoder_settings, str(cfg.model.get("pretrained_asr")), config.encoder if config else None
    )
    if not (config and llm and llm.chat and encoder):
        raise ValueError("; ".join(plan.problems))
    dataset = MTBIDataset(
        llm.chat, frame_counter(encoder.shape, config.connector), config.micro_batch_tokens, on_bad_audio="skip"
    )
    costs, full = training_costs(section_of(cfg.model, "train_ds"), dataset)
    return find_bins(costs, full.num_buckets)
