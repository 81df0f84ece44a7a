# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.data.step import Step, assumed_step, count_cuts, measured_step, steps_of_pass
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.layouts.layout import IGNORE
from nemo_mtbi.testing import tiny_chat, tiny_cuts, tiny_tokenizer

FRAMES = FrameCounter((LengthStage(1600, 1600),), 16000)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return tiny_chat(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return str(tiny_cuts(tmp_path_factory.mktemp("cuts"), 7))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro_batch_tokens", [60, 10_000])
def test_a_step_is_judged_as_the_batches_turn_out(world, micro_batch_tokens, chat, cuts):
    config = {"cuts_path": cuts, "batch_size": 3 // world, "rows_per_cut": 2, "shuffle": False}
    dataset = MTBIDataset(chat, FRAMES, micro_batch_tokens)
    loader = build_dataloader(config, dataset, world_size=world, allow_foreign=True)
    chosen = list(loader.sampler)
    step = measured_step(chosen, chat, FRAMES, micro_batch_tokens, bound=None)
    real = [dataset[batch] for batch in chosen]
    microbatches = [part for batch in real for part in batch.microbatches]
    assert step.positions == max(sum(int(part.lengths.sum()) for part in batch.microbatches) for batch in real)
    assert step.row == max(int(part.lengths.max()) for part in microbatches)
    assert step.share == max(int((part.labels != IGNORE).sum()) / part.labels.numel() for part in microbatches)
    assert step.frames == max(batch.num_frames for batch in real)
    assert step.cuts == sum(len(batch.audio_lengths) for batch in real) / len(real)
    heard = sum(int(batch.audio_lengths.sum()) for batch in real) / 16000
    assert step.seconds == pytest.approx(heard / len(real))
    assert steps_of_pass(config, chosen, len(chosen) + 1, world) == str(len(real))


def test_the_bound_of_the_configuration_counts_where_it_is_higher(chat, cuts):
    config = {"cuts_path": cuts, "batch_size": 2}
    loader = build_dataloader(config, MTBIDataset(chat, FRAMES, 100), allow_foreign=True)
    assert measured_step(list(loader.sampler), chat, FRAMES, 100, bound=12345).positions == 12345


def test_a_step_without_data():
    assert assumed_step({"batch_tokens": 1200, "rows_per_cut": 4}, 500) == Step(1200, 0.5, 300)
    assert assumed_step({"batch_size": 8}, 500) == Step(None, 0.5, 500)


def test_cuts_are_counted_where_that_is_quick(tmp_path, cuts):
    assert count_cuts({"cuts_path": cuts}) == 7
    assert count_cuts({"cuts_path": cuts, "perturb_speed": True}) == 21
    lines = "".join(json.dumps({"duration": 1.0}) + "\n" for _ in range(5)) + "\n"
    (tmp_path / "manifest.json").write_text(lines)
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wt") as file:
        file.write(lines)
    assert count_cuts({"manifest_filepath": str(tmp_path / "manifest.json")}) == 5
    assert count_cuts({"cuts_path": str(tmp_path / "cuts.jsonl.gz")}) == 5


@pytest.mark.parametrize(
    "source", [{}, {"cuts_path": "/nowhere.jsonl"}, {"shar_path": "x"}, {"manifest_filepath": [["a"]]}]
)
def test_others_are_not_counted(source):
    assert count_cuts(source) is None


def test_a_pass_is_estimated_from_its_first_batches(cuts):
    batches = [[0] * 2, [0] * 1]  # 1.5 utterances in a batch
    assert steps_of_pass({"cuts_path": cuts}, batches, 2, 1) == "about 5, from 7 utterances"
    assert steps_of_pass({"cuts_path": cuts}, batches, 2, 2) == "about 3, from 7 utterances"
    assert steps_of_pass({"shar_path": "x"}, batches, 2, 1).startswith("unknown: only a local cuts_path")


def test_a_manifest_that_is_large_is_not_counted(cuts, monkeypatch):
    monkeypatch.setattr("nemo_mtbi.data.step.COUNTED_BYTES", 10)
    assert count_cuts({"cuts_path": cuts}) is None
