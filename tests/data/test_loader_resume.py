# SPDX-License-Identifier: Apache-2.0
"""A pass that is entered in its middle goes on bit for bit, and the audio before that is not decoded."""

import os
import random
from collections import defaultdict
from itertools import islice, product

import loader_sources as sources
import numpy as np
import pytest
import torch
from lhotse import Recording
from matrix import with_core

from nemo_mtbi.data.audio import BadAudioError
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.data.passes import StreamDataset, StreamLoader, passes

PLAIN, content, shar = sources.PLAIN, sources.content, sources.shar
READ = 9  # batches of an endless pass


@pytest.fixture
def dataset(chat, frames):
    return sources.make_dataset(chat, frames)


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """``decoded()``: the recordings that each process has decoded since the last call, in order."""
    log = tmp_path / "decoded.txt"
    log.touch()
    load_audio = Recording.load_audio

    def load(self, *args, **kwargs):
        with open(log, "a") as file:  # worker processes inherit this function
            file.write(f"{os.getpid()} {self.id}\n")
        return load_audio(self, *args, **kwargs)

    def read():
        found = defaultdict(list)
        for line in log.read_text().splitlines():
            process, recording = line.split()
            found[process].append(recording)
        log.write_text("")
        return list(found.values())

    monkeypatch.setattr(Recording, "load_audio", load)
    return read


def enter(loader, epoch, consumed):
    """The loader, which goes on in the middle of a pass."""
    passes(loader).set_epoch(epoch)
    passes(loader).resume(consumed)
    return loader


def noise(corpus):
    """Noise and clipping, whose generators would otherwise depend on what was read before."""
    return {
        "noise_path": corpus.jsonl(corpus.cuts(3, prefix="noise", seconds=4.0), "noise"),
        "noise_mix_prob": 0.5,
        "clipping_enabled": True,
    }


def blend_of_streams(corpus, cuts):
    half = len(cuts) // 2
    parts = (shar(corpus, cuts[:half], "a"), shar(corpus, cuts[half:], "b"))
    return {"input_cfg": [{"type": "lhotse_shar", **part, "weight": 0.5} for part in parts]}


SOURCES = {
    "manifest": lambda corpus, cuts: {"cuts_path": corpus.jsonl(cuts)},
    "blend": sources.group,
    "tarred": sources.tarred,
    "shar": shar,
    "blend of shar": blend_of_streams,
}


# Each source once without workers or with them; all combinations with --full.
PAIRS = with_core(product(SOURCES, (0, 2)), [("manifest", 2), ("tarred", 0), ("shar", 2), ("blend of shar", 0)])


@pytest.mark.slow
@pytest.mark.parametrize("name, workers", PAIRS)
def test_a_resumed_pass_goes_on_bit_for_bit(corpus, dataset, name, workers):
    """In any pass, on any rank, with noise, clipping and buckets."""
    config = {**SOURCES[name](corpus, corpus.cuts(18)), **noise(corpus), "rows_per_cut": 2, "num_workers": workers}
    config |= {"batch_tokens": 250, "shuffle": True, "use_bucketing": True, "num_buckets": 2, "bucket_buffer_size": 9}
    config["num_cuts_for_bins_estimate"] = 20
    seen = []
    for epoch, ranks in ((0, {}), (2, {"rank": 1, "world_size": 2})):
        straight, resumed = (build_dataloader(config, dataset, **ranks) for _ in range(2))
        whole = [content(batch) for batch in islice(enter(straight, epoch, 0), READ)]
        assert len(whole) > 2 and len(set(whole)) == len(whole)
        for consumed in (1, 2, 5):
            rest = islice(enter(resumed, epoch, consumed), max(len(whole) - consumed, 0))
            assert [content(batch) for batch in rest] == whole[consumed:]
        seen += whole
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name, workers", PAIRS)
def test_nothing_is_decoded_for_what_was_consumed(corpus, dataset, decoded, name, workers):
    config = {**SOURCES[name](corpus, corpus.cuts(12)), "rows_per_cut": 2, "num_workers": workers}
    loader = build_dataloader({**config, "batch_size": 2, "shuffle": True}, dataset)
    whole = [batch.cut_ids for batch in islice(enter(loader, 1, 0), READ)]
    decoded()
    for consumed in (2, 5):
        rest = [batch.cut_ids for batch in islice(enter(loader, 1, consumed), len(whole) - consumed)]
        assert rest == whole[consumed:] and rest
        # Workers may be some batches ahead, but each process began with its first batch behind the consumed ones. It
        # is theirs in turn: from the first worker on, or, in a stream, from the one whose turn it was.
        readers = workers or 1
        expected = [sum(rest[start::readers], []) for start in range(min(readers, len(rest)))]
        found = decoded()
        assert len(found) == len(expected)
        for order in expected:
            assert any(recordings[: len(order)] == order for recordings in found)


def test_the_end_of_a_pass_can_be_resumed(corpus, dataset):
    config = {**PLAIN, "cuts_path": corpus.jsonl(corpus.cuts(8)), "rows_per_cut": 2}
    loader = build_dataloader(config, dataset)
    following = [content(batch) for batch in enter(loader, 1, 0)]
    assert list(enter(loader, 0, 2)) == []
    assert [content(batch) for batch in loader] == following


class Letters:
    """A stream source whose workers yield so many batches of one letter each."""

    def __init__(self, counts):
        self.counts = counts

    def seed_of(self, epoch, worker):
        return epoch

    def sampler(self, epoch, worker):
        for number in range(self.counts[worker]):
            yield f"{'abc'[worker]}{epoch}{number}"


class Echo:
    """A data set that counts what it makes."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, item):
        with open(self.log, "a") as file:
            file.write(f"{item}\n")
        return item


@pytest.mark.parametrize("counts", [(4,), (3, 5, 2), (0, 3), (2, 0, 2)])
def test_streams_that_end_unevenly_are_resumed_at_any_step(tmp_path, counts):
    log = tmp_path / "made.txt"
    for workers in (0, 1) if len(counts) == 1 else (len(counts),):
        loader = StreamLoader(StreamDataset(Letters(counts), Echo(log)), batch_size=None, num_workers=workers)
        whole = list(enter(loader, 3, 0))
        rounds = [(n, w) for n in range(max(counts)) for w in range(len(counts)) if n < counts[w]]
        assert whole == [f"{'abc'[worker]}3{number}" for number, worker in rounds]
        for consumed in range(len(whole) + 2):
            log.write_text("")
            assert list(enter(loader, 3, consumed)) == whole[consumed:]
            assert loader.dataset.epoch == 4
            early = set(log.read_text().split()) - set(whole[consumed:])
            slots = len([slot for slot in rounds if slot[0] * len(counts) + slot[1] < consumed])
            assert len(early) == max(min(consumed, len(whole)) - slots, 0)  # of the longer streams, near the end
        assert next(iter(loader)) == whole[0].replace("3", "4", 1)  # the pass after it is whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_begins_anew_in_each_pass(corpus, dataset, workers):
    config = {**shar(corpus, corpus.cuts(6)), "batch_size": 3, "rows_per_cut": 2, "num_workers": workers}
    config |= {"shuffle": True, "force_finite": True}
    loader = build_dataloader(config, dataset)
    expected = [[content(batch) for batch in loader] for _ in range(3)]
    assert expected[0] != expected[1] != expected[2] != expected[0]
    for epoch in (2, 0, 1):
        assert [content(batch) for batch in enter(loader, epoch, 0)] == expected[epoch]
    next(iter(enter(loader, 1, 0)))  # an interrupted pass is read again
    assert [content(batch) for batch in loader] == expected[1]
    assert [content(batch) for batch in enter(build_dataloader(config, dataset), 1, 3)] == expected[1][3:]


def test_an_interrupted_epoch_is_read_again(corpus, dataset):
    loader = build_dataloader({**PLAIN, "cuts_path": corpus.jsonl(corpus.cuts(8)), "rows_per_cut": 2}, dataset)
    first = content(next(iter(loader)))
    assert content(next(iter(loader))) == first


def test_only_the_first_iteration_is_shortened(corpus, dataset):
    config = {**PLAIN, "cuts_path": corpus.jsonl(corpus.cuts(8)), "batch_size": 2, "rows_per_cut": 2}
    whole = [content(batch) for batch in build_dataloader(config, dataset)]
    loader = enter(build_dataloader(config, dataset), 0, 2)
    assert content(next(iter(loader))) == whole[2]
    assert content(next(iter(loader))) == whole[0]


@pytest.mark.parametrize("name", ["manifest", "shar"])
def test_reading_leaves_the_random_numbers_of_the_run_alone(corpus, dataset, name):
    """Processes that don't read would otherwise draw others."""
    config = {**SOURCES[name](corpus, corpus.cuts(6)), **noise(corpus), "batch_size": 2, "num_workers": 1}
    states = [(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())]
    for workers in (0, 1):
        list(islice(build_dataloader({**config, "num_workers": workers}, dataset), 2))
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("name", ["manifest", "shar"])
def test_a_worker_reports_bad_audio_as_it_is(corpus, chat, frames, name):
    cuts = corpus.cuts(3)
    cuts[1] = corpus.cut(1, samples=np.zeros(16_000))
    config = {**SOURCES[name](corpus, cuts), "batch_size": 1, "num_workers": 1}
    with pytest.raises(BadAudioError, match="(?s)Caught BadAudioError.*cut-001 is silent.*on_bad_audio: skip"):
        list(islice(build_dataloader(config, MTBIDataset(chat, frames, 400)), 3))
