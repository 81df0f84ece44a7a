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
from contextlib import contextmanager
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
from nemo_mtbi.data.tasks import stable_rng

DATA_TYPE = "nemo_mtbi"

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


class DrawnSource:
    """The user's data with rows, opened anew for each pass.

    So whatever is random in a pass (order, mixing, noise, clipping) depends on the seed and the pass alone, and not on
    the passes before: a run can enter any pass directly.

    Args:
        full: NeMo's full configuration, checked.
        draw: how rows are drawn.
        dataset: turns cuts into steps.
        rank: data-parallel rank.
        world_size: data-parallel size.
    """

    def __init__(self, full, draw: DrawConfig, dataset: MTBIDataset, rank: int, world_size: int):
        from nemo.collections.common.data.lhotse.dataloader import determine_use_iterable_dataset

        self.full = full
        self.draw = draw
        self.dataset = dataset
        self.rank = rank
        self.world_size = world_size
        fix_random_seed(full.seed)  # what "randomized" means outside of workers
        # Streams, which every worker of every rank reads on its own, get an order for each reader.
        self._seed: int | str = "randomized" if full.num_workers > 0 else full.seed + 100_000 * rank
        _, is_tarred = self._read(self._seed)
        self.iterable = determine_use_iterable_dataset(is_tarred, full)

    def _read(self, seed: int | str) -> tuple[CutSet, bool]:
        from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
        from omegaconf import OmegaConf

        source = {key: self.full[key] for key in SOURCE_KEYS if key in self.full}
        try:
            return read_cutset_from_config(OmegaConf.create({**source, "shard_seed": seed}))
        except Exception as error:  # each reader has its own kinds for a file that is not what it is said to be
            raise ValueError(f"the data source cannot be read: {type(error).__name__}: {error}") from error

    def seed_of(self, epoch: int) -> int | str:
        """The seed of a pass. It is the same on all ranks, which share the batches out, unless each reads a stream."""
        return self._seed if self.iterable else stable_rng("pass", self.full.seed, epoch).getrandbits(31)

    def open(self, epoch: int) -> tuple[DrawRows, bool]:
        """The cuts of a pass with their rows, and whether NeMo calls the source tarred."""
        cuts, is_tarred = self._read(self.seed_of(epoch))
        reader = (self.rank, self.world_size) if self.iterable else None
        rows = DrawRows(_prepare(cuts, self.full), self.dataset.chat, self.dataset.frames, self.draw, reader)
        rows.set_epoch(epoch)
        return rows, is_tarred

    @contextmanager
    def offered(self, epoch: int) -> Iterator[Any]:
        """Yields the configuration with which NeMo reads the cuts of a pass through :func:`read_drawn_rows`."""
        rows, is_tarred = self.open(epoch)
        token = _READING.set((CutSet(rows), is_tarred))
        try:
            yield _for_nemo(self.full, self.seed_of(epoch))
        finally:
            _READING.reset(token)

    def loader(self) -> torch.utils.data.DataLoader:
        """NeMo's data loader of pass 0."""
        from nemo.collections.common.data.lhotse.dataloader import get_lhotse_dataloader_from_config

        tokenizer = self.dataset.chat.tokenizer
        with self.offered(0) as config:
            return get_lhotse_dataloader_from_config(config, self.rank, self.world_size, self.dataset, tokenizer)

    def sampler(self, epoch: int) -> torch.utils.data.Sampler:
        """NeMo's sampler of a pass."""
        from nemo.collections.common.data.lhotse.dataloader import get_lhotse_sampler_from_config

        with self.offered(epoch) as config:
            return get_lhotse_sampler_from_config(config, self.rank, self.world_size, self.dataset.chat.tokenizer)[0]


class EpochSampler(torch.utils.data.Sampler):
    """Batches of cuts, pass by pass. Passes are numbered from 0, or by ``set_epoch``, which Lightning calls.

    Args:
        source: the data.
        fixed: every pass is pass 0, for validation.
    """

    def __init__(self, source: DrawnSource, fixed: bool):
        self.source = source
        self.fixed = fixed
        self.epoch = 0
        self._consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is pass ``epoch``."""
        self.epoch = 0 if self.fixed else epoch

    def resume(self, batches: int) -> None:
        """The next iteration leaves out its first batches, which were trained on before; no audio is read for them."""
        self._consumed = batches

    def __iter__(self) -> Iterator[CutSet]:
        epoch, consumed = self.epoch, self._consumed
        self._consumed = 0
        yield from islice(self.source.sampler(epoch), consumed, None)
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
        config: NeMo's keys and ``rows_per_cut``. NeMo's defaults, but for ``loader_config.DEFAULTS``.
        dataset: turns cuts into steps.
        rank: data-parallel rank.
        world_size: data-parallel size.
        train: ``False`` for validation.
        expected: fingerprints that the behaviors must come from.
        allow_foreign: accept behaviors of another LLM.

    Returns:
        A loader whose ``sampler`` is an :class:`EpochSampler`, or, for streams, NeMo's own (its workers sample).

    Raises:
        ValueError: if a key is unknown, contradicts another or would cut what the behaviors are about; if a path does
            not exist; if the first usable cut cannot be read or its behaviors come from another LLM.
    """
    from nemo_mtbi.register import register

    register()
    full, rows_per_cut = check_config(config, dataset.frames.sample_rate)
    check_source(full)
    if not train:
        _for_validation(full)
    draw = _draw_config(full, rows_per_cut, dataset, expected=dict(expected or {}), allow_foreign=allow_foreign)
    source = DrawnSource(full, draw, dataset, rank, world_size)
    _fit_buckets(source)
    loader = source.loader()
    if source.iterable:
        return loader
    return torch.utils.data.DataLoader(
        loader.dataset,
        sampler=EpochSampler(source, fixed=not train),
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
    return DrawConfig(
        seed=full.seed,
        rows_per_cut=rows_per_cut,
        on_bad_audio=dataset.on_bad_audio,
        min_duration=0.0 if full.min_duration is None else full.min_duration,
        max_duration=unlimited if full.max_duration is None else full.max_duration,
        min_tokens=full.min_tokens or 0,
        max_tokens=full.max_tokens or unlimited,
        max_cost=max_cost,
        filters=tuple(filters),
        **provenance,
    )


def _fit_buckets(source: DrawnSource) -> None:
    """Reads the first cuts: to find the buckets, and to fail now and clearly where they cannot be used."""
    full = source.full
    estimate = full.use_bucketing and full.bucket_duration_bins is None
    rows, _ = source.open(0)
    costs = [DrawnRows.of(cut).cost for cut in islice(rows, full.num_cuts_for_bins_estimate if estimate else 1)]
    if estimate:
        full.bucket_duration_bins = cost_bins(costs, full.num_buckets) or None
        full.use_bucketing = full.bucket_duration_bins is not None


def cost_bins(costs: list[int], num_buckets: int) -> list[int]:
    """Upper bounds of all buckets but the last, such that every bucket holds about the same total cost.

    Unlike Lhotse's own, it accepts fewer cuts than buckets; the result may have fewer buckets, and none is empty.
    """
    share = sum(costs) / num_buckets
    bins: list[int] = []
    total = previous = 0
    for cost in sorted(costs):
        if total >= share and cost > previous:
            bins.append(previous)
            total = 0
        total += cost
        previous = cost
    return bins


def _for_nemo(full, seed: int | str) -> Any:
    """What NeMo gets: our data type as the only source, and costs where its sampling constraint counts them."""
    full = full.copy()
    changes = {key: None for key in ("manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path")}
    changes |= {"input_cfg": [{"type": DATA_TYPE}], "reweight_temperature": None}
    changes |= {"perturb_speed": False, "pad_min_duration": None, "min_duration": -1, "max_duration": float("inf")}
    changes |= {"use_multimodal_sampling": True, "measure_total_length": True, "pretokenize": False}
    # The whole cost stands in supervision.tokens: with this value a second of audio adds nothing to it.
    changes["token_equivalent_duration"] = float("inf")
    changes["concurrent_bucketing"] = False  # Lhotse: not deterministic
    changes["shard_seed"] = seed
    if isinstance(seed, int):
        changes["seed"] = seed  # reverberation takes this one
    full.update({key: value for key, value in changes.items() if key in full})
    return full
