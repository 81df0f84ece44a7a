# SPDX-License-Identifier: Apache-2.0
"""Shar and tarred copies of a corpus train as the corpus itself, alone and blended."""

from collections import Counter
from itertools import islice
from pathlib import Path

import loader_sources as sources
import numpy as np
import pytest
from lhotse import MonoCut, MultiCut
from lhotse.array import Array
from lhotse.utils import fastcopy

from nemo_mtbi.data.draw import DrawnRows
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.layouts.layout import IGNORE
from nemo_mtbi.prepare.export import export


@pytest.fixture
def dataset(chat, frames):
    return sources.make_dataset(chat, frames)


def said(batch):
    """What the rows of a batch are about, in any order; tarred cuts are named after their file."""
    return Counter((row.task, row.instruction, row.reference, row.transcript) for row in batch.rows)


@pytest.mark.parametrize("form", ["shar", "tarred"])
def test_word_times_and_behaviors_travel(corpus, dataset, form, tmp_path):
    cuts = corpus.cuts(7)
    entry = export(cuts, tmp_path / "out", form, 3)
    plain = build_dataloader({"cuts_path": corpus.jsonl(cuts), "batch_size": 7}, dataset, train=False)
    large = build_dataloader({"input_cfg": [entry], "batch_size": 7}, dataset, train=False)
    (one,), (other,) = plain, large
    assert len(one.rows) == len(other.rows) == 70
    assert said(one) == said(other)
    assert one.stats["interleaved_rows"] and other.stats["interleaved_rows"]
    assert not one.stats.get("no_alignment") and not other.stats.get("no_alignment")
    theirs = {row.transcript: other.audio[row.utterance] for row in other.rows}
    for row in one.rows:
        assert float((one.audio[row.utterance] - theirs[row.transcript]).abs().max()) < 1e-4  # 16 bits


@pytest.mark.parametrize("form", ["shar", "tarred"])
def test_the_tokens_of_answers_travel(corpus, dataset, form, tmp_path):
    cuts = corpus.cuts(3)
    for cut in cuts:
        for row in cut.custom["behaviors"]:
            row["ids"] = [32, *map(ord, row["response"])]
    entry = export(cuts, tmp_path / "out", form, 2)
    (batch,) = build_dataloader({"input_cfg": [entry], "batch_size": 3}, dataset, train=False)
    (plain,) = build_dataloader({"cuts_path": corpus.jsonl(cuts), "batch_size": 3}, dataset, train=False)
    assert batch.num_targets == plain.num_targets
    labels = [label for part in batch.microbatches for row in part.labels.tolist() for label in row if label != IGNORE]
    assert labels.count(32) >= 30  # the space that each answer begins with


@pytest.mark.parametrize("form", ["shar", "tarred"])
def test_a_part_of_a_recording_keeps_its_word_times(corpus, dataset, tmp_path, form):
    cut = corpus.cut(0, seconds=2.0, text="a b c d")
    part = cut.truncate(offset=1.0, duration=1.0, preserve_id=True)
    part.supervisions[0].start, part.supervisions[0].duration, part.supervisions[0].text = 0.0, 1.0, "c d"
    part.supervisions[0].alignment["word"] = part.supervisions[0].alignment["word"][2:]
    entry = export([part], tmp_path / "out", form, 5)
    loader = build_dataloader({"input_cfg": [entry], "batch_size": 1}, dataset, train=False)
    ((read,),) = loader.sampler if hasattr(loader.sampler, "source") else [loader.dataset.source.sampler(0)]
    assert [word.start_s for word in DrawnRows.of(read).words] == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("form", ["shar", "tarred"])
def test_channels_are_averaged_and_all_else_travels(corpus, dataset, form, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (32000, 2)).astype(np.float32)
    cut = corpus.cut(0, samples=samples, text="a b c d").truncate(offset=1.0, duration=1.0, preserve_id=True)
    segment = fastcopy(cut.supervisions[0], start=0.0, duration=1.0, text="c d", speaker="s", language="de")
    segment.alignment["word"] = segment.alignment["word"][2:]
    cut = fastcopy(cut, supervisions=[segment], custom={**cut.custom, "note": "n"})
    assert isinstance(cut, MultiCut)
    entry = export([cut], tmp_path / "out", form, 5)
    loader = build_dataloader({"input_cfg": [entry], "batch_size": 1}, dataset, train=False)
    ((read,),) = loader.sampler if hasattr(loader.sampler, "source") else [loader.dataset.source.sampler(0)]
    assert isinstance(read, MonoCut) and read.num_channels == 1 and read.custom["note"] == "n"
    assert read.supervisions[0].language == "de"
    assert (read.custom if form == "tarred" else vars(read.supervisions[0]))["speaker"] == "s"
    assert [word.start_s for word in DrawnRows.of(read).words] == pytest.approx([0.0, 0.5])
    assert np.abs(read.load_audio()[0] - samples[16000:].mean(axis=1)).max() < 1e-4  # 16 bits


def test_what_is_left_out_is_counted(corpus, dataset, tmp_path):
    cuts, counts = corpus.cuts(3), Counter()
    Path(cuts[1].recording.sources[0].source).write_bytes(b"no audio")
    with pytest.raises(ValueError, match="the audio of cut cut-001 can't be read"):
        export(cuts, tmp_path / "stops", "shar", 2)
    export(cuts, tmp_path / "goes_on", "tarred", 2, "skip", counts)
    assert counts == {"cuts": 2, "bad_audio": 1}
    cuts[2].custom["vectors"] = Array("numpy_files", str(tmp_path), "missing.npy", [2])
    with pytest.raises(ValueError, match="cut cut-002 can't be read"):
        export(cuts[2:], tmp_path / "arrays", "shar", 2)
    counts = Counter()
    export([cuts[0], cuts[2]], tmp_path / "without", "shar", 2, "skip", counts)
    assert counts == {"cuts": 1, "bad_audio": 1}
    several = fastcopy(cuts[0], supervisions=cuts[0].supervisions * 2)
    with pytest.raises(ValueError, match="cut cut-000 is not a recording with one supervision"):
        export([several], tmp_path / "several", "tarred", 2)


def test_a_blend_of_three_has_the_weights_as_shares(corpus, dataset, tmp_path):
    """NeMo manifest + tar, Shar, and cuts, as in a run on several corpora."""
    weights = {"tarred": 0.5, "shar": 0.3, "plain": 0.2}
    entries = []
    for name, weight in weights.items():
        cuts = corpus.cuts(6, prefix=name, seconds=0.4, text="go on")
        if name == "plain":
            entry = {"type": "lhotse", "cuts_path": corpus.jsonl(cuts, name)}
        else:
            entry = export(cuts, tmp_path / name, name, 4)
        entries.append({**entry, "weight": weight})
    config = {"input_cfg": entries, "batch_size": 50, "rows_per_cut": 1, "seed": 1}
    config["force_iterable_dataset"] = True  # NeMo's key for streams and manifests in one blend
    loader = build_dataloader(config, dataset)
    seen = Counter()
    for batch in islice(loader, 120):
        seen.update(source_of(cut) for cut in batch.cut_ids)
    total = sum(seen.values())
    assert total == 6000
    assert {name: seen[name] / total for name in weights} == pytest.approx(weights, abs=0.02)


def source_of(cut_id):
    """Tarred cuts are named after their file."""
    return next((name for name in ("shar", "plain") if cut_id.startswith(name)), "tarred")


def test_a_temperature_evens_the_weights(corpus, dataset):
    """NeMo's own key: weights to the power of it."""
    entries = [
        {"type": "lhotse", "cuts_path": corpus.jsonl(corpus.cuts(2, prefix=name), name), "weight": weight}
        for name, weight in (("often", 0.9), ("rare", 0.1))
    ]
    config = {"input_cfg": entries, "batch_size": 50, "rows_per_cut": 1, "reweight_temperature": 0.5}
    ids = [cut for batch in islice(build_dataloader(config, dataset), 60) for cut in batch.cut_ids]
    share = sum(cut.startswith("rare") for cut in ids) / len(ids)
    assert share == pytest.approx(0.1**0.5 / (0.1**0.5 + 0.9**0.5), abs=0.02)


def test_what_can_not_be_written(corpus, tmp_path):
    cuts = corpus.cuts(2)
    with pytest.raises(ValueError, match="it must be shar or tarred"):
        export(cuts, tmp_path / "a", "zip", 3)
    with pytest.raises(ValueError, match="shard_size is 0"):
        export(cuts, tmp_path / "a", "shar", 0)
    with pytest.raises(ValueError, match="is not empty"):
        export(cuts, corpus.folder, "shar", 3)
    for form in ("shar", "tarred"):
        with pytest.raises(ValueError, match="no cuts to write"):
            export([], tmp_path / form, form, 3)
