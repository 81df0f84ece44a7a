# SPDX-License-Identifier: Apache-2.0
"""Data loaders: NeMo's own Lhotse loading, with rows drawn before the sampler.

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
from lhotse.utils import fastcopy

from nemo_mtbi.data.behaviors import custom_value
from nemo_mtbi.data.conversations import as_cut
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.draw import DrawConfig, DrawnRows, DrawRows
from nemo_mtbi.data.gate import GatedCuts, read_gated
from nemo_mtbi.data.loader_config import DEFAULTS, SOURCE_KEYS, check_config, check_source
from nemo_mtbi.data.nemo_cuts import restore_piece
from nemo_mtbi.data.passes import EpochSampler, StreamDataset, StreamLoader
from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.io.sources import SourcePolicy
from nemo_mtbi.register import register

DATA_TYPE = "nemo_mtbi"
# NeMo's changes of the sound, which would reach the cut in which a conversation travels, and not its audios.
_FOR_UTTERANCES = (
    "perturb_speed",
    "pad_min_duration",
    "noise_path",
    "rir_enabled",
    "lowpass_enabled",
    "compression_enabled",
    "clipping_enabled",
)

_READING: ContextVar[tuple[CutSet, bool]] = ContextVar("nemo_mtbi_reading")


def read_drawn_rows(config: Any) -> tuple[CutSet, bool]:
    """Return the cuts of the :func:`build_dataloader` call that is under way: NeMo's parser of our data type.

    Raises:
        ValueError: if there is none.
    """
    reading = _READING.get(None)
    if reading is None:
        raise ValueError(f"type: {DATA_TYPE} is internal: call nemo_mtbi.data.loader.build_dataloader")
    return reading


def register_data_type() -> None:
    """Make NeMo read our data type by :func:`read_drawn_rows`; may be called again and again."""
    from nemo.collections.common.data.lhotse.cutset import data_type_parser

    register()
    data_type_parser(DATA_TYPE)(read_drawn_rows)


class DrawnSource:
    """User's data with rows, opened anew for each pass.

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
        _, is_tarred = self._read(full.seed)
        self.iterable = determine_use_iterable_dataset(is_tarred, full)

    def _read(self, seed: int) -> tuple[GatedCuts, bool]:
        from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config
        from omegaconf import OmegaConf

        source = OmegaConf.create({key: self.full[key] for key in SOURCE_KEYS if key in self.full})
        config = OmegaConf.merge(source, {"shard_seed": seed})
        skip = self.draw.on_bad_audio == "skip"
        return read_gated(partial(read_cutset_from_config, config), source, self.dataset.policy, skip)

    def seed_of(self, epoch: int, worker: int = 0) -> int:
        """Return the seed of a pass: the same on all ranks, which share the batches, unless each reads a stream."""
        reader = (self.rank, worker) if self.iterable else ()
        return stable_rng("pass", self.full.seed, epoch, *reader).getrandbits(31)

    def open(self, epoch: int, seed: int, reader: tuple[int, int] | None = None) -> tuple[DrawRows, bool]:
        """Return the cuts of a pass with their rows, and whether NeMo calls the source tarred.

        Args:
            epoch: number of the pass.
            seed: of the order of shards.
            reader: rank and number of ranks, where each reads a stream of its own.
        """
        cuts, is_tarred = self._read(seed)
        prepared = _prepare(CutSet(cuts), self.full)
        rows = DrawRows(prepared, self.dataset.chat, self.dataset.frames, self.draw, reader, cuts.left_out)
        rows.set_epoch(epoch)
        return rows, is_tarred

    def sampler(self, epoch: int, worker: int = 0) -> Iterator[CutSet]:
        """Yield the batches of NeMo's sampler of a pass, which reads the cuts through :func:`read_drawn_rows`."""
        from nemo.collections.common.data.lhotse.dataloader import get_lhotse_sampler_from_config

        register_data_type()  # a worker process may know nothing of us
        seed, tokenizer = self.seed_of(epoch, worker), self.dataset.chat.tokenizer
        rows, is_tarred = self.open(epoch, seed, (self.rank, self.world_size) if self.iterable else None)
        token = _READING.set((CutSet(rows), is_tarred))
        reading = Reading(self.dataset.policy, "noise_path or rir_path")
        try:
            with reading:
                made = get_lhotse_sampler_from_config(
                    _for_nemo(self.full, seed), self.rank, self.world_size, tokenizer
                )
        finally:
            _READING.reset(token)
        batches = iter(made[0])
        while True:
            with reading:  # cuts of noise are read on the way
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


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
    """Return a data loader of :class:`~nemo_mtbi.layouts.layout.StepBatch`.

    Training data may be finite (plain manifests: each pass ends) or endless (tarred, Shar, and blends), as in NeMo.
    Each pass begins anew, in an order of its own (with ``shuffle``): where a run is resumed, the data of one pass are
    read again, without decoding audio. So cut endless data into passes with ``trainer.limit_train_batches``.
    Validation data are read once, in order, without shuffling and buckets, and with the same rows in every pass:
    ``rows_per_cut`` of each cut, or all its behaviors.

    Args:
        config: NeMo's keys, ``rows_per_cut``, and ``allow_remote`` and ``allow_commands``
            (:class:`~nemo_mtbi.io.sources.SourcePolicy`). NeMo's defaults, but for ``loader_config.DEFAULTS``.
        dataset: turns cuts into steps.
        rank: data-parallel rank.
        world_size: data-parallel size.
        train: ``False`` for validation.
        expected: fingerprints that the behaviors must come from.
        allow_foreign: accept behaviors of another LLM.

    Returns:
        A loader whose ``sampler`` is an :class:`EpochSampler`, or, for streams, a :class:`StreamLoader`, whose workers
        sample. Either way :func:`nemo_mtbi.data.passes.passes` gives the object by which it is set to a pass.

    Raises:
        ValueError: if a key is unknown, contradicts another or would cut what the behaviors are about; if a path does
            not exist or is not allowed; if the first usable cut cannot be read or its behaviors come from another LLM.
    """
    from nemo.collections.common.data.lhotse.dataloader import maybe_set_cuda_expandable_segments

    register_data_type()
    full, rows_per_cut = check_config(config, dataset.frames.sample_rate)
    dataset = dataset.allowing(SourcePolicy.of(config))
    check_source(full, dataset.policy)
    if not train:
        _for_validation(full)
    draw = _draw_config(full, rows_per_cut, dataset, expected=dict(expected or {}), allow_foreign=allow_foreign)
    source = DrawnSource(full, draw, dataset, rank, world_size)
    _fit_buckets(source)
    maybe_set_cuda_expandable_segments(full.cuda_expandable_segments)
    # A generator of its own: torch draws from it for each pass, and the training's must not depend on who reads.
    common: dict[str, Any] = {"batch_size": None, "num_workers": full.num_workers, "pin_memory": full.pin_memory}
    common["generator"] = torch.Generator().manual_seed(full.seed)
    if source.iterable:
        return StreamLoader(StreamDataset(source, dataset), **common)
    return torch.utils.data.DataLoader(dataset, sampler=EpochSampler(source, fixed=not train), **common)


def _for_validation(full) -> None:
    """Let data be read once, in order, in the main process (each worker would read a whole stream)."""
    if full.bucket_batch_size is not None:
        raise ValueError("validation data have no buckets: set batch_size or batch_tokens, not bucket_batch_size")
    full.shuffle, full.use_bucketing, full.bucket_duration_bins = False, False, None
    full.force_finite, full.force_map_dataset, full.force_iterable_dataset = True, True, False


def _prepare(cuts: CutSet, full) -> CutSet:
    """Apply what changes the length of a cut, in NeMo's order, before rows are drawn, so that costs are exact."""
    changed = next((key for key in _FOR_UTTERANCES if full.get(key)), None)
    cuts = cuts.map(partial(_prepare_cut, sample_rate=full.sample_rate, changed=changed), apply_fn=None)
    if full.perturb_speed:
        cuts = CutSet.mux(cuts, cuts.perturb_speed(0.9), cuts.perturb_speed(1.1))
    if full.pad_min_duration is not None:
        cuts = cuts.pad(duration=full.pad_min_duration, direction=full.pad_direction, preserve_id=True)
    return cuts


def _prepare_cut(cut: Any, sample_rate: int, changed: str | None) -> Any:
    """Resample a cut, and move word times from a custom key to the supervision, where Lhotse keeps them.

    Conversations become cuts in which they travel.

    NeMo manifests have no place for alignments; theirs is ``"alignment": {"word": [[symbol, start, duration], ...]}``,
    in seconds from the start of the utterance (Lhotse counts from the start of the recording).
    """
    if not isinstance(cut, Cut):
        if changed and hasattr(cut, "turns"):
            raise ValueError(f"{changed} is for utterances, and {cut.id} is a conversation: remove it, or one of them")
        return as_cut(cut, sample_rate) if hasattr(cut, "turns") else cut
    cut = restore_piece(cut)
    cut = cut.resample(sample_rate) if cut.has_recording else cut
    alignment = custom_value(cut, "alignment")
    if alignment is None or isinstance(cut, MixedCut) or len(cut.supervisions) != 1 or cut.supervisions[0].alignment:
        return cut
    words = {
        kind: [AlignmentItem(*item).with_offset(cut.start) for item in items] for kind, items in alignment.items()
    }
    custom = {key: value for key, value in (cut.custom or {}).items() if key != "alignment"}
    return fastcopy(cut, custom=custom, supervisions=[fastcopy(cut.supervisions[0], alignment=words)])


def _draw_config(full, rows_per_cut: int | None, dataset: MTBIDataset, **provenance: Any) -> DrawConfig:
    """Return NeMo's filters as ours: NeMo leaves cuts out without a word, we count them."""
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


def training_costs(config: Mapping[str, Any], dataset: MTBIDataset) -> tuple[list[int], Any]:
    """Return the costs of the first cuts of the training data: positions of all rows of a cut.

    Args:
        config: see :func:`build_dataloader`.
        dataset: for its chat format and frame counter.

    Returns:
        The costs of NeMo's ``num_cuts_for_bins_estimate`` cuts, and its full configuration.

    Raises:
        ValueError: as :func:`build_dataloader`, whoever made the behaviors.
    """
    register_data_type()
    full, rows_per_cut = check_config(config, dataset.frames.sample_rate)
    dataset = dataset.allowing(SourcePolicy.of(config))
    check_source(full, dataset.policy)
    draw = _draw_config(full, rows_per_cut, dataset, expected={}, allow_foreign=True)
    return _costs(DrawnSource(full, draw, dataset, 0, 1), full.num_cuts_for_bins_estimate), full


def _costs(source: DrawnSource, most: int) -> list[int]:
    rows, _ = source.open(0, source.full.seed)  # the same rows on all ranks
    return [DrawnRows.of(cut).cost for cut in islice(rows, most)]


def _fit_buckets(source: DrawnSource) -> None:
    """Read the first cuts: to compute the buckets, and to fail now and clearly where they cannot be used."""
    full = source.full
    estimate = full.use_bucketing and full.bucket_duration_bins is None
    costs = _costs(source, full.num_cuts_for_bins_estimate if estimate else 1)  # ranks keep in step by the bucket
    if estimate:
        full.bucket_duration_bins = cost_bins(costs, full.num_buckets) or None
        full.use_bucketing = full.bucket_duration_bins is not None
        if not full.use_bucketing and full.shuffle_buffer_size is None:  # cuts of one cost, or a single one
            full.shuffle_buffer_size = DEFAULTS["shuffle_buffer_size"]


def cost_bins(costs: list[int], num_buckets: int) -> list[int]:
    """Return the upper bounds of all buckets but the last; every bucket holds about the same total cost.

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


def _for_nemo(full, seed: int) -> Any:
    """Return NeMo's configuration with our data type as only source, and costs where its sampler counts them."""
    full = full.copy()
    changes: dict[str, Any] = dict.fromkeys(("manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path"))
    changes |= {"input_cfg": [{"type": DATA_TYPE}], "reweight_temperature": None}
    changes |= {"perturb_speed": False, "pad_min_duration": None, "min_duration": -1, "max_duration": float("inf")}
    changes |= {"use_multimodal_sampling": True, "measure_total_length": True, "pretokenize": False}
    # The whole cost stands in supervision.tokens: with this value a second of audio adds nothing to it.
    changes["token_equivalent_duration"] = float("inf")
    changes["concurrent_bucketing"] = False  # Lhotse: not deterministic
    changes["shard_seed"] = changes["seed"] = seed  # reverberation takes the latter
    full.update({key: value for key, value in changes.items() if key in full})
    return full
