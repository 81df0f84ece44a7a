# SPDX-License-Identifier: Apache-2.0
"""The loader through NeMo's own data loading. NeMo is imported once for all of it."""

from bisect import bisect_left
from collections import Counter
from itertools import islice

import loader_sources as sources
import numpy as np
import pytest

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.draw import DrawnRows
from nemo_mtbi.data.loader import build_dataloader, cost_bins

PLAIN, SOURCES, ENDLESS, content, shar = (
    sources.PLAIN,
    sources.SOURCES,
    sources.ENDLESS,
    sources.content,
    sources.shar,
)


@pytest.fixture
def dataset(chat, frames):
    return sources.make_dataset(chat, frames)


def rows_by_cut(batches):
    rows = {}
    for batch in batches:
        for row in batch.rows:
            rows.setdefault(row.cut_id, []).append((row.task, row.instruction))
    return rows


def skips(batches):
    total = Counter()
    for batch in batches:
        total.update(batch.skipped)
    return total


# Sources ------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_nemo_gives_training_data(corpus, dataset, name):
    cuts = corpus.cuts(6)
    source = SOURCES[name](corpus, cuts)
    config = {**source, "batch_tokens": 400, "rows_per_cut": 2, "use_bucketing": True, "num_buckets": 3, "seed": 3}
    config |= {"num_cuts_for_bins_estimate": 20, "bucket_buffer_size": 30, "shuffle_buffer_size": None}
    one, two = (list(islice(build_dataloader(config, dataset), 12)) for _ in range(2))
    assert [content(batch) for batch in one] == [content(batch) for batch in two]
    assert len(one) == 12 or name not in ENDLESS
    assert len({row.cut_id for batch in one for row in batch.rows}) == 6
    assert sum(batch.stats.get("interleaved_rows", 0) for batch in one) > 0
    if name in ENDLESS:  # a cut that comes by again brings other rows
        assert all(len(set(rows)) > 2 for rows in rows_by_cut(one).values())


@pytest.mark.parametrize("name", SOURCES)
def test_validation_reads_every_source_once_with_all_rows(corpus, dataset, name):
    source = SOURCES[name](corpus, corpus.cuts(6))
    loader = build_dataloader({**source, "batch_size": 4}, dataset, train=False)
    first, second = list(loader), list(loader)
    assert sorted(rows_by_cut(first)) == sorted(rows_by_cut(second)) and len(rows_by_cut(first)) == 6
    assert all(len(rows) == 10 for rows in rows_by_cut(first).values())
    assert sum(len(batch.cut_ids) for batch in first) == 6


def test_validation_is_in_order_and_the_same_in_every_pass(corpus, dataset):
    config = {"cuts_path": corpus.jsonl(corpus.cuts(6)), "batch_size": 4, "rows_per_cut": 2, "shuffle": True}
    loader = build_dataloader(config, dataset, train=False)
    passes = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        passes.append([content(batch) for batch in loader])
    assert passes[0] == passes[1]
    assert [cut for batch in passes[0] for cut in batch[0]] == [f"cut-{i:03d}" for i in range(6)]


@pytest.mark.parametrize("place", ["cut", "supervision"])
def test_behaviors_travel_in_the_cut_or_in_its_supervision(corpus, dataset, place):
    cuts = corpus.cuts(2)
    if place == "supervision":
        for cut in cuts:
            cut.supervisions[0].custom, cut.custom = cut.custom, None
    loader = build_dataloader({**PLAIN, "cuts_path": corpus.jsonl(cuts)}, dataset, expected={"llm": "sha256:llm"})
    assert len(next(iter(loader)).rows) == 20


def test_a_channel_can_be_selected(corpus, chat, frames):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (16_000, 2)).astype(np.float32)
    path = corpus.jsonl([corpus.cut(1, samples=samples, text="a b")])
    for selector, expected in ((None, samples.mean(1)), (0, samples[:, 0]), (1, samples[:, 1])):
        config = {**PLAIN, "cuts_path": path, "channel_selector": selector}
        (batch,) = build_dataloader(config, MTBIDataset(chat, frames, 400))
        assert np.allclose(batch.audio[0], expected, atol=1e-6)


def test_weights_decide_the_share_of_a_source(corpus, chat, frames):
    entries = [
        {"type": "lhotse", "cuts_path": corpus.jsonl(corpus.cuts(2, prefix=name), name), "weight": weight}
        for name, weight in (("often", 0.9), ("rare", 0.1))
    ]
    dataset = MTBIDataset(chat, frames, 400)
    loader = build_dataloader({"input_cfg": entries, "batch_size": 10, "rows_per_cut": 1}, dataset)
    ids = [cut for batch in islice(loader, 30) for cut in batch.cut_ids]
    assert 0.8 < sum(cut.startswith("often") for cut in ids) / len(ids) < 0.97


def test_word_times_of_a_nemo_manifest_are_those_of_the_utterance(corpus, chat, frames):
    """Also where the entry is a piece of a longer file, and where the speed is changed."""
    cuts = corpus.cuts(3, seconds=3.0, text="a b c d")
    for cut in cuts:
        cut.duration = 2.0
        cut.supervisions[0].alignment["word"] = [
            item._replace(start=i / 2, duration=0.5) for i, item in enumerate(cut.supervisions[0].alignment["word"])
        ]
    lines = corpus.manifest(cuts, offset=0.5)
    dataset = MTBIDataset(chat, frames, 400)
    loader = build_dataloader({**PLAIN, "manifest_filepath": lines, "perturb_speed": True}, dataset)
    drawn = [DrawnRows.of(cut) for cuts in loader.sampler for cut in cuts]
    assert len(drawn) == 9
    for rows in drawn:
        factor = {"9": 0.9, "1": 1.1}.get(rows.cut_id.partition("_sp")[2][-1:], 1.0)
        assert [w.start_s for w in rows.words] == pytest.approx([0, 0.5 / factor, 1 / factor, 1.5 / factor], abs=1e-3)


# Determinism ------------------------------------------------------------


@pytest.mark.parametrize("bucketing", [False, True])
def test_rows_are_the_same_whatever_the_batches_and_workers(corpus, dataset, bucketing):
    source = {"cuts_path": corpus.jsonl(corpus.cuts(9)), "rows_per_cut": 2, "seed": 5}
    variants = [
        {"batch_size": 3, "shuffle": False},
        {"batch_size": 2, "shuffle": True, "shuffle_buffer_size": 4},
        {"batch_tokens": 300, "shuffle": True, "num_workers": 2, "use_bucketing": bucketing, "num_buckets": 2},
    ]
    found = [rows_by_cut(build_dataloader({**source, **variant}, dataset)) for variant in variants]
    assert found[0] == found[1] == found[2] and len(found[0]) == 9
    other = rows_by_cut(build_dataloader({**source, **variants[0], "seed": 6}, dataset))
    assert other != found[0]


def test_every_epoch_has_other_rows_and_can_be_entered_directly(corpus, dataset):
    config = {"cuts_path": corpus.jsonl(corpus.cuts(8)), "rows_per_cut": 2, "batch_size": 3, "shuffle": True}
    loader = build_dataloader(config, dataset)
    rows = [rows_by_cut(loader) for _ in range(3)]
    assert rows[0] != rows[1] != rows[2] != rows[0]
    loader.sampler.set_epoch(0)
    passes = [[content(batch) for batch in loader] for _ in range(3)]
    orders = [[cut for batch in batches for cut in batch[0]] for batches in passes]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = build_dataloader({**config, "seed": 1}, dataset)
    assert [cut for batch in other for cut in batch.cut_ids] != orders[0]
    resumed = build_dataloader(config, dataset)
    resumed.sampler.set_epoch(2)  # what Lightning does
    assert [content(batch) for batch in resumed] == passes[2]


def test_ranks_share_the_batches_of_a_manifest_and_draw_the_same_rows(corpus, dataset):
    config = {**PLAIN, "batch_size": 2, "cuts_path": corpus.jsonl(corpus.cuts(8)), "rows_per_cut": 2}
    alone = rows_by_cut(build_dataloader(config, dataset))
    ranks = [rows_by_cut(build_dataloader(config, dataset, rank=rank, world_size=2)) for rank in range(2)]
    assert not set(ranks[0]) & set(ranks[1])
    assert {**ranks[0], **ranks[1]} == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_read_a_stream_in_orders_of_their_own(corpus, dataset, workers):
    config = {**shar(corpus, corpus.cuts(9)), "batch_size": 3, "rows_per_cut": 2, "num_workers": workers}
    loaders = [build_dataloader(config, dataset, rank=rank, world_size=2) for rank in (0, 0, 1)]
    one, again, other = ([content(batch) for batch in islice(loader, 6)] for loader in loaders)
    assert one == again
    assert not set(one) & set(other) and len(set(one)) == 6
    assert [batch[0] for batch in one] != [batch[0] for batch in other]


# Cost ------------------------------------------------------------


def sampled(loader):
    return [list(cuts) for cuts in loader.sampler]


def test_the_sampler_bounds_batches_by_their_true_cost(corpus, chat, frames):
    dataset = MTBIDataset(chat, frames, 10_000)
    config = {"cuts_path": corpus.jsonl(corpus.cuts(12)), "rows_per_cut": 3, "batch_tokens": 500}
    loader = build_dataloader(config, dataset)
    batches = sampled(loader)
    for cuts in batches:
        costs = [DrawnRows.of(cut).cost for cut in cuts]
        assert len(costs) == 1 or max(costs) * len(costs) <= 500
        assert [cut.num_tokens for cut in cuts] == costs  # what NeMo's constraint measured
    loader.sampler.set_epoch(0)
    for cuts, batch in zip(sampled(loader), build_dataloader(config, dataset), strict=True):
        assert sum(DrawnRows.of(cut).cost for cut in cuts) == sum(int(m.lengths.sum()) for m in batch.microbatches)
    assert len(batches) > 2


def test_speed_and_padding_are_in_the_cost(corpus, chat, frames):
    dataset = MTBIDataset(chat, frames, 10_000)
    config = {"cuts_path": corpus.jsonl(corpus.cuts(3)), "rows_per_cut": 2, "batch_size": 1}
    for extra in ({"perturb_speed": True}, {"pad_min_duration": 3.0}):
        loader = build_dataloader({**config, **extra}, dataset)
        costs = [DrawnRows.of(cuts[0]).cost for cuts in sampled(loader)]
        loader.sampler.set_epoch(0)
        assert costs == [sum(int(m.lengths.sum()) for m in batch.microbatches) for batch in loader]
        assert len(costs) == (9 if "perturb_speed" in extra else 3)


def test_more_buckets_than_cuts_are_no_error(corpus, dataset):
    config = {"batch_tokens": 400, "use_bucketing": True, "num_buckets": 30}
    for count in (1, 2, 5):
        for shuffle in (False, True):
            given = {**config, "shuffle": shuffle, "cuts_path": corpus.jsonl(corpus.cuts(count))}
            loader = build_dataloader(given, dataset)
            assert sum(len(batch.cut_ids) for batch in loader) == count


def test_buckets_share_the_cost():
    assert cost_bins([10] * 50 + [100] * 5, 2) == [10]
    assert cost_bins([7], 10) == [] and cost_bins([7, 7, 7], 3) == []
    assert cost_bins([3, 1, 2], 30) == [1, 2]
    costs = list(range(1, 101))
    bins = cost_bins(costs, 5)
    assert bins == sorted(set(bins)) and len(bins) == 4
    shares = Counter()
    for cost in costs:
        shares[bisect_left(bins, cost)] += cost  # what Lhotse does
    assert all(abs(share - 1010) < 200 for share in shares.values()) and len(shares) == 5


def test_fixed_batch_sizes_per_bucket(corpus, chat, frames):
    dataset = MTBIDataset(chat, frames, 10_000)
    config = {"cuts_path": corpus.jsonl(corpus.cuts(12)), "rows_per_cut": 1}
    costs = sorted(
        DrawnRows.of(cut).cost for cuts in sampled(build_dataloader({**config, **PLAIN}, dataset)) for cut in cuts
    )
    bins = [costs[5], costs[9]]
    loader = build_dataloader({**config, "bucket_duration_bins": bins, "bucket_batch_size": [3, 1]}, dataset)
    batches = list(loader)
    dropped = sum(cost > bins[1] for cost in costs)
    assert skips(batches) == {"cost_above_last_bucket": dropped}
    assert sum(len(batch.cut_ids) for batch in batches) == 12 - dropped


# Bad data ------------------------------------------------------------


def bad_corpus(corpus):
    """Nine cuts, of which five cannot be used; the manifest is right, the audio is not."""
    cuts = corpus.cuts(9, seconds=1.0)
    corpus.audio("cut-002", np.zeros(16_000))
    corpus.audio("cut-003", np.full(16_000, np.nan))
    (corpus.folder / "cut-004.wav").unlink()
    cuts[5] = corpus.cut(5, text="")
    cuts[8] = corpus.cut(8, seconds=2.0)
    return cuts


@pytest.mark.parametrize("source", ["cuts_path", "manifest_filepath"])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_cuts_are_counted_once_whatever_reads_them(corpus, chat, frames, workers, source):
    cuts = bad_corpus(corpus)
    path = corpus.jsonl(cuts) if source == "cuts_path" else corpus.manifest(cuts, sampling_rate=16_000)
    config = {source: path, "batch_size": 2, "num_workers": workers, "max_duration": 1.5, "rows_per_cut": 2}
    loader = build_dataloader(config, MTBIDataset(chat, frames, 400, on_bad_audio="skip"))
    for _ in range(2):
        batches = list(loader)
        assert skips(batches) == {
            "silent": 1,
            "not_finite": 1,
            "unreadable": 1,
            "no_transcript": 1,
            "longer_than_max_duration": 1,
        }
        assert sum(len(batch.cut_ids) for batch in batches) == 4


def test_skipped_cuts_of_a_stream_are_counted_in_its_workers(corpus, chat, frames):
    cuts = corpus.cuts(4, seconds=1.0) + [corpus.cut(5, seconds=2.0)]
    config = {**shar(corpus, cuts), "batch_size": 4, "num_workers": 1, "max_duration": 1.5, "rows_per_cut": 1}
    total = skips(islice(build_dataloader(config, MTBIDataset(chat, frames, 400)), 10))
    assert set(total) == {"longer_than_max_duration"} and 9 <= total["longer_than_max_duration"] <= 11


def test_nemos_silent_filters_are_counted(corpus, dataset):
    cuts = corpus.cuts(4)
    cuts[1].custom["validation_status"] = "fail"
    cuts[2].supervisions[0].custom = {"cer": 0.9}
    config = {**PLAIN, "cuts_path": corpus.jsonl(cuts), "max_cer": 0.5}
    assert skips(build_dataloader(config, dataset)) == {"validation_status": 1, "above_max_cer": 1}


def test_a_two_hour_recording_is_counted_by_default(corpus, dataset):
    cuts = corpus.cuts(2)
    long = corpus.cut(2)
    long.recording.num_samples, long.recording.duration, long.duration = 7200 * 16_000, 7200.0, 7200.0
    loader = build_dataloader({**PLAIN, "cuts_path": corpus.jsonl([*cuts, long])}, dataset)
    assert skips(loader) == {"longer_than_max_duration": 1}


def test_noise_is_mixed_in_and_leaves_the_rows_alone(corpus, dataset):
    noise = corpus.jsonl(corpus.cuts(2, prefix="noise", seconds=3.0, text="never said"), "noise")
    config = {**PLAIN, "cuts_path": corpus.jsonl(corpus.cuts(4)), "rows_per_cut": 2}
    clean = list(build_dataloader(config, dataset))
    noisy = list(build_dataloader({**config, "noise_path": noise, "noise_mix_prob": 1.0}, dataset))
    assert rows_by_cut(noisy) == rows_by_cut(clean)
    assert [r.transcript for b in noisy for r in b.rows] == [r.transcript for b in clean for r in b.rows]
    assert [b.frame_lengths.tolist() for b in noisy] == [b.frame_lengths.tolist() for b in clean]
    assert not any(np.allclose(a.audio, b.audio) for a, b in zip(noisy, clean, strict=True))
