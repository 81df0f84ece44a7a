# SPDX-License-Identifier: Apache-2.0
"""NeMo's own Lhotse data loading, with rows drawn before the sampler.

``build_dataloader`` takes the keys of NeMo's ``train_ds`` (every source that NeMo reads, its augmentations, buckets
and batch sizes) plus ``rows_per_cut``. The user's source is read by NeMo, wrapped by :class:`DrawRows`, and handed
back to NeMo as a data type of our own. All costs (``batch_tokens``, ``bucket_duration_bins``) count positions of
the decoder over all rows of a cut: prompt tokens + speech frames + response tokens. ``min_tokens`` and ``max_tokens``
bound a single row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any

import torch
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy, fix_random_seed

from nemo_mtbi.data.behaviors import custom_value
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.draw import DrawConfig, DrawnRows, DrawRows
from nemo_mtbi.data.loader_config import SOURCE_KEYS, check_config, check_source

DATA_TYPE = "nemo_mtbi"
# NeMo has no limit; a forgotten two-hour recording should be counted, not end the run for lack of memory.
DEFAULT_MAX_DURATION = 300.0

_READING: ContextVar[tuple[CutSet, bool]] = ContextVar("nemo_mtbi_reading")


def read_drawn_rows(config: Any) -> tuple[CutSet, bool]:
    """NeMo's parser of our data type: the cuts of the :func:`build_dataloader` call that is under way.

    Raises:
        ValueError: if there is none.
    """
    reading = _READING.get(None)
    if reading is None:
        raise ValueError(f"type: {DATA_TYPE} is internal: call nemo_mtbi.data.loader.build_dataloader")
    return reading


class EpochSampler(torch.utils.data.Sampler):
    """Tells :class:`DrawRows` and NeMo's sampler which pass begins. They are numbered from 0, or by ``set_epoch``.

    Args:
        sampler: NeMo's sampler, which yields ``CutSet`` batches.
        rows: what it samples from.
        fixed: every pass is pass 0, for validation.
    """

    def __init__(self, sampler: torch.utils.data.Sampler, rows: DrawRows, fixed: bool):
        self.sampler = sampler
        self.rows = rows
        self.fixed = fixed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before a pass."""
        self.epoch = 0 if self.fixed else epoch

    def __iter__(self) -> Iterator[CutSet]:
        epoch = self.epoch
        self.rows.set_epoch(epoch)
        self.sampler.set_epoch(epoch)
        yield from self.sampler
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)


def build_dataloader(
    config: Mapping[str, Any],
    dataset: MTBIDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    train: bool = True,
    expected: Mapping[str, str] | None = None,
    allow_foreign: bool = False,
) -> torch.utils.data.DataLoader:
    """Builds a data loader of :class:`~nemo_mtbi.data.layout.StepBatch`.

    Training data may be finite (plain manifests: each pass ends) or endless (tarred, Shar, and blends), as in NeMo.
    Validation data are read once, in order, without shuffling and buckets, and with the same rows in every pass:
    ``rows_per_cut`` of each cut, or all its behaviors.

    Args:
        config: NeMo's keys and ``rows_per_cut``. ``max_duration`` defaults to :data:`DEFAULT_MAX_DURATION`.
        dataset: turns cuts into steps.
        rank: data-parallel rank.
        world_size: data-parallel size.
        train: ``False`` for validation.
        expected: fingerprints that the behaviors must come from.
        allow_foreign: accept behaviors of another LLM.

    Raises:
        ValueError: if a key is unknown, contradicts another or would cut what the behaviors are about; if a path does
            not exist; if the first usable cut cannot be read or its behaviors come from another LLM.
    """
    from nemo.collections.common.data.lhotse.dataloader import get_lhotse_dataloader_from_config

    from nemo_mtbi.register import register

    register()
    full, rows_per_cut = check_config(config, dataset.frames.sample_rate)
    check_source(full)
    if not train:
        _for_validation(full)
    cuts, is_tarred, iterable = _read_source(full, rank)
    rows = DrawRows(
        _prepare(cuts, full),
        dataset.chat,
        dataset.frames,
        _draw_config(full, rows_per_cut, dataset, expected=dict(expected or {}), allow_foreign=allow_foreign),
        reader=(rank, world_size) if iterable else None,
    )
    _fit_buckets(full, rows)
    _hand_over(full)
    token = _READING.set((CutSet(rows), is_tarred))
    try:
        loader = get_lhotse_dataloader_from_config(full, rank, world_size, dataset, tokenizer=dataset.chat.tokenizer)
    finally:
        _READING.reset(token)
    if iterable:
        return loader
    return torch.utils.data.DataLoader(
        loader.dataset,
        sampler=EpochSampler(loader.sampler, rows, fixed=not train),
        batch_size=None,
        num_workers=full.num_workers,
        pin_memory=full.pin_memory,
    )


def _for_validation(full) -> None:
    """Once, in order, read in the main process (a stream is otherwise read as a whole by each worker)."""
    if full.bucket_batch_size is not None:
        raise ValueError("validation data have no buckets: set batch_size or batch_tokens, not bucket_batch_size")
    full.shuffle, full.use_bucketing, full.bucket_duration_bins = False, False, None
    full.force_finite, full.force_map_dataset, full.force_iterable_dataset = True, True, False


def _read_source(full, rank: int) -> tuple[CutSet, bool, bool]:
    """The user's source, read by NeMo as it would be without us.

    Returns:
        The cuts; whether NeMo calls them tarred; whether they are a stream, which every worker of every rank reads on
        its own. Streams get an order for each reader, all others one order, since the ranks share their batches out.
    """
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
    from nemo.collections.common.data.lhotse.dataloader import determine_use_iterable_dataset
    from omegaconf import OmegaConf

    def read() -> tuple[CutSet, bool]:
        return read_cutset_from_config(OmegaConf.create({key: full[key] for key in SOURCE_KEYS}))

    fix_random_seed(full.seed)  # what "randomized" means outside of workers
    full.shard_seed = "randomized" if full.num_workers > 0 else full.seed + 100_000 * rank
    cuts, is_tarred = read()
    iterable = determine_use_iterable_dataset(is_tarred, full)
    if not iterable:
        full.shard_seed = full.seed
        cuts, is_tarred = read()
    return cuts, is_tarred, iterable


def _prepare(cuts: CutSet, full) -> CutSet:
    """What changes the length of a cut comes before its rows are drawn, in NeMo's order, so that the cost is exact."""
    cuts = cuts.map(partial(_prepare_cut, sample_rate=full.sample_rate), apply_fn=None)
    if full.perturb_speed:
        cuts = CutSet.mux(cuts, cuts.perturb_speed(0.9), cuts.perturb_speed(1.1))
    if full.pad_min_duration is not None:
        cuts = cuts.pad(duration=full.pad_min_duration, direction=full.pad_direction, preserve_id=True)
    return cuts


def _prepare_cut(cut: Any, sample_rate: int) -> Any:
    """Resamples, and moves word times from a custom key to the supervision, where Lhotse keeps them.

    NeMo manifests have no place for alignments; theirs is ``"alignment": {"word": [[symbol, start, duration], ...]}``,
    in seconds from the start of the utterance (Lhotse counts from the start of the recording).
    """
    if not isinstance(cut, Cut):
        return cut
    cut = cut.resample(sample_rate)
    alignment = custom_value(cut, "alignment")
    if alignment is None or isinstance(cut, MixedCut) or len(cut.supervisions) != 1 or cut.supervisions[0].alignment:
        return cut
    words = {
        kind: [AlignmentItem(*item).with_offset(cut.start) for item in items] for kind, items in alignment.items()
    }
    custom = {key: value for key, value in (cut.custom or {}).items() if key != "alignment"}
    return fastcopy(cut, custom=custom, supervisions=[fastcopy(cut.supervisions[0], alignment=words)])


def _draw_config(full, rows_per_cut: int | None, dataset: MTBIDataset, **provenance: Any) -> DrawConfig:
    """NeMo's filters become ours: NeMo leaves cuts out without a word, we count them."""
    from nemo.collections.common.data.lhotse.sampling import (
        CERFilter,
        ContextSpeakerSimilarityFilter,
        ValidationStatusFilter,
    )

    filters = [
        ("validation_status", ValidationStatusFilter(full.keep)),
        ("above_max_cer", CERFilter(full.max_cer)),
        ("below_min_context_speaker_similarity", ContextSpeakerSimilarityFilter(full.min_context_speaker_similarity)),
    ]
    unlimited = float("inf")
    max_cost = unlimited
    if full.bucket_batch_size is not None and full.bucket_duration_bins is not None:
        max_cost = full.bucket_duration_bins[-1]  # NeMo drops what is longer than the last bucket
    max_duration = full.max_duration
    return DrawConfig(
        seed=full.seed,
        rows_per_cut=rows_per_cut,
        on_bad_audio=dataset.on_bad_audio,
        min_duration=0.0 if full.min_duration is None else full.min_duration,
        max_duration=DEFAULT_MAX_DURATION if max_duration in (None, unlimited) else max_duration,
        min_tokens=full.min_tokens or 0,
        max_tokens=full.max_tokens or unlimited,
        max_cost=max_cost,
        filters=tuple(filters),
        **provenance,
    )


def _fit_buckets(full, rows: DrawRows) -> None:
    """Reads the first cuts: to find the buckets, and to fail now and clearly where they cannot be used."""
    estimate = full.use_bucketing and full.bucket_duration_bins is None
    costs = [DrawnRows.of(cut).cost for cut in islice(rows, full.num_cuts_for_bins_estimate if estimate else 1)]
    rows.set_epoch(0)
    if not estimate:
        return
    bins = cost_bins(costs, full.num_buckets)
    if bins:
        full.bucket_duration_bins = bins
    else:
        full.use_bucketing = False


def cost_bins(costs: list[int], num_buckets: int) -> list[int]:
    """Lower bounds of all buckets but the first, such that every bucket holds about the same total cost.

    Unlike Lhotse's own, it accepts fewer cuts than buckets; the result may have fewer buckets, and none is empty.
    """
    share = sum(costs) / max(min(num_buckets, len(costs)), 1)
    bins: list[int] = []
    total = 0
    for cost in sorted(costs):
        if total >= share and (not bins or cost > bins[-1]):
            bins.append(cost)
            total = 0
        total += cost
    return bins


def _hand_over(full) -> None:
    """What NeMo gets: our data type as the only source, and costs where its sampling constraint counts them."""
    full.update({key: None for key in ("manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path")})
    full.input_cfg = [{"type": DATA_TYPE}]
    full.reweight_temperature = None
    full.perturb_speed, full.pad_min_duration = False, None
    full.min_duration, full.max_duration = -1, float("inf")
    full.use_multimodal_sampling, full.measure_total_length, full.pretokenize = True, True, False
    # The whole cost stands in supervision.tokens: with this value a second of audio adds nothing to it.
    full.token_equivalent_duration = float("inf")
    full.concurrent_bucketing = False  # Lhotse: not deterministic
