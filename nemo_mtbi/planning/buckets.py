# SPDX-License-Identifier: Apache-2.0
"""Buckets for training data, found once for a large corpus instead of at the start of each run."""

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
from nemo_mtbi.planning.plan import Plan, check_model, frame_counter, read_encoder, read_llm


@dataclass(frozen=True)
class Bins:
    """Buckets of cuts by what they cost: positions of the decoder over all rows of a cut.

    Attributes:
        bounds: upper bounds of all buckets but the last.
        costs: of the cuts that they were found from.
    """

    bounds: tuple[int, ...]
    costs: tuple[int, ...]

    def buckets(self) -> list[list[int]]:
        """The costs in each bucket."""
        found: list[list[int]] = [[] for _ in range(len(self.bounds) + 1)]
        for cost in self.costs:
            found[bisect_left(self.bounds, cost)].append(cost)  # a bound belongs to its bucket
        return found

    @property
    def fill(self) -> float:
        """Cost of the cuts ÷ their cost if each were the longest of its bucket."""
        return sum(self.costs) / sum(len(bucket) * max(bucket) for bucket in self.buckets() if bucket)

    def render(self, console: Console) -> None:
        """A table, and the lines for ``model.train_ds``."""
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
    """Buckets that hold about the same total cost each."""
    return Bins(tuple(cost_bins(list(costs), num_buckets)), tuple(costs))


def estimate_bins(cfg: DictConfig) -> Bins:
    """Reads the first cuts of a run's training data, without weights and audio.

    Args:
        cfg: a training configuration. ``model.train_ds.num_buckets`` and ``num_cuts_for_bins_estimate`` say how many
            buckets and cuts.

    Raises:
        ValueError: what the plan of such a run would refuse.
    """
    OmegaConf.resolve(cfg)
    if cfg.get("data"):
        raise ValueError("a corpus that is built on the spot needs no buckets: set data=null and model.train_ds")
    if not cfg.model.get("train_ds"):
        raise ValueError("model.train_ds is not set: it names the data whose buckets are looked for")
    plan = Plan()
    config = check_model(plan, cfg.model)
    llm = read_llm(plan, cfg.model.get("pretrained_llm"), config.chat if config else None)
    encoder = plan.attempt(read_encoder, cfg.model.get("pretrained_asr"), config.encoder if config else None)
    if not (config and llm and llm.chat and encoder):
        raise ValueError("; ".join(plan.problems))
    dataset = MTBIDataset(llm.chat, frame_counter(encoder, config), config.micro_batch_tokens, on_bad_audio="skip")
    costs, full = training_costs(OmegaConf.to_container(cfg.model.train_ds), dataset)
    return find_bins(costs, full.num_buckets)
