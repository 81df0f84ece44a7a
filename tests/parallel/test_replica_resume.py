# SPDX-License-Identifier: Apache-2.0
"""The position of the replica loader: where new processes, and Lightning, go on."""

from functools import partial
from itertools import islice, product

import pytest
import replica_steps as common
import torch
from lhotse import CutSet
from matrix import with_core

from nemo_mtbi.data.passes import passes
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.replica import ReplicaLoader

Keys, Sized, plain, check_equal = common.Keys, common.Sized, common.plain, common.check_equal
on_all, start, run, ONLY_SKIPPED = common.on_all, common.start, common.run, common.ONLY_SKIPPED


@pytest.fixture
def alone():
    groups.initialize()
    return lambda *args, limit=None, **kwargs: ReplicaLoader.build(lambda: plain(*args, **kwargs), limit=limit)


# Several processes -------------------------------------------------------------


def resume(name):
    """Worker: new processes go on in the middle of a pass, at its end, and are the same on all ranks."""
    rank, replicas = start(name)

    def new():
        return ReplicaLoader.build(lambda: plain(rank, 4 + 2 * rank))

    longest, loader = 2 + 2 * replicas, new()
    passes_seen, states = [], []
    for _ in range(2):
        steps = []
        for batch in loader:
            steps.append(batch)
            loader.mark_trained()
            states.append(on_all(loader.state_dict()))
        passes_seen.append(steps)
    assert states[:2] == [{"epoch": 0, "batches": n, "replicas": replicas, "workers": 0} for n in (1, 2)]
    assert [(state["epoch"], state["batches"]) for state in states] == [
        (epoch, number + 1) for epoch in range(2) for number in range(longest)
    ]
    for state in states:
        resumed = new()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        begun, rest = state["epoch"] * longest + state["batches"], []
        for batch in resumed:
            rest.append(batch)
            resumed.mark_trained()
            assert resumed.state_dict() == states[begun + len(rest) - 1]
        expected = passes_seen[state["epoch"]][state["batches"] :]
        assert len(rest) == len(expected)
        for found, wanted in zip(rest, expected, strict=True):
            check_equal(found, wanted, audio=groups.is_first_stage())
        if groups.is_reader():
            assert resumed._loader.dataset.made == max(4 + 2 * rank - state["batches"], 0)
        if state["epoch"] == 0:
            check_equal(next(iter(resumed)), passes_seen[1][0], audio=groups.is_first_stage())


@pytest.mark.slow
@pytest.mark.parametrize("name", with_core(["dp2", "tp2_pp2", "pp2_dp2"], ["dp2", "tp2_pp2"]))
def test_new_processes_go_on_where_others_stopped(name, processes):
    run(processes, resume, name)


# Real data -------------------------------------------------------------


def build(folder, source, workers):
    """The loader of a data-parallel rank, through NeMo, with the model's parts that it needs."""
    from nemo_mtbi.config.interleave import InterleaveConfig
    from nemo_mtbi.data.dataset import MTBIDataset
    from nemo_mtbi.data.loader import build_dataloader
    from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
    from nemo_mtbi.testing import tiny_chat

    halve = LengthStage(kernel=3, stride=2, padding=2)
    frames = FrameCounter((LengthStage(400, 160, 400), halve, halve, halve), 16000)
    dataset = MTBIDataset(tiny_chat(f"{folder}/tokenizer.model"), frames, 200, InterleaveConfig(), with_rows=True)
    places = {"cuts_path": f"{folder}/cuts/cuts.jsonl.gz", "shar_path": f"{folder}/shar"}
    config = {source: places[source], "batch_size": 2, "rows_per_cut": 2, "num_workers": workers, "shuffle": True}
    ranks = {"rank": groups.data_parallel_rank(), "world_size": groups.data_parallel_size()}
    return build_dataloader(config, dataset, **ranks)


def read_on(name, folder):
    """Worker: what the plain loader reads in pass 1 reaches all, and new loaders go on in its middle."""
    start(name)
    for source, workers in (("cuts_path", 0), ("shar_path", 0), ("shar_path", 2)):
        whole = None
        if groups.is_reader():
            loader = build(folder, source, workers)
            passes(loader).set_epoch(1)
            whole = list(islice(loader, 5))
        whole = groups.broadcast_object(whole)
        for consumed in (0, 3):
            loader = ReplicaLoader.build(lambda: build(folder, source, workers))  # noqa: B023
            loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batches": consumed})
            assert loader.state_dict()["workers"] == (workers if source == "shar_path" else 0)
            rest = list(islice(loader, len(whole) - consumed))
            assert on_all(len(rest)) == len(whole) - consumed > 0
            for found, expected in zip(rest, whole[consumed:], strict=True):
                check_equal(found, expected, audio=groups.is_first_stage())


@pytest.mark.slow
@pytest.mark.parametrize("name", with_core(["tp2_pp2", "dp2"], ["tp2_pp2"]))
def test_real_data_are_read_on(name, tmp_path, processes):
    from nemo_mtbi.testing import tiny_cuts, tiny_tokenizer

    tiny_tokenizer(tmp_path)
    (tmp_path / "shar").mkdir()
    cuts = CutSet.from_file(tiny_cuts(tmp_path / "cuts", 20))
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=4)
    run(processes, read_on, name, tmp_path)


# One process -------------------------------------------------------------


def first_key(loader):
    return next(iter(loader)).cut_ids[0]


def test_which_pass_comes_next(alone):
    loader = alone(count=2)
    iter(loader)  # Lightning does so to see that it can
    assert [first_key(loader) for _ in range(2)] == ["cut-0-0-0-0"] * 2  # interrupted: again
    assert len(list(loader)) == 2
    assert first_key(loader) == "cut-0-1-0-0"
    loader.set_epoch(4)
    assert first_key(loader) == "cut-0-4-0-0"
    state = {"epoch": 7, "batches": 1, "replicas": 1, "workers": 0}
    for epoch, expected in ((None, "7-1"), (7, "7-1"), (8, "8-0")):
        loader.load_state_dict(state)
        if epoch is not None:
            loader.set_epoch(epoch)
        iter(loader)
        assert first_key(loader) == f"cut-0-{expected}-0"
        assert first_key(loader) == f"cut-0-{expected[0]}-0-0"  # interrupted: from its start
    loader.load_state_dict({**state, "batches": 2})
    assert list(loader) == []
    assert first_key(loader) == "cut-0-8-0-0"


def test_a_position_counts_what_was_trained_on(alone):
    loader = alone()
    steps = iter(loader)
    with pytest.raises(RuntimeError, match="more often than steps were handed out"):
        loader.mark_trained()
    next(steps), next(steps)
    assert loader.state_dict()["batches"] == 0
    loader.mark_trained()
    assert loader.state_dict() == {"epoch": 0, "batches": 1, "replicas": 1, "workers": 0}
    next(steps), next(steps)
    with pytest.raises(RuntimeError, match=r"4 steps were handed out, but 1 marked: call mark_trained\(\)"):
        loader.state_dict()


@pytest.mark.parametrize("change", [{"batches": -1}, {"batches": 1.5}, {"epoch": True}, {"more": 1}])
def test_what_is_no_position_is_refused(alone, change):
    loader = alone()
    with pytest.raises(ValueError, match="no position of a data loader.*epoch, batches, replicas, workers"):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_another_number_of_readers_goes_on_after_as_much_data_and_warns(alone):
    loader = alone()
    with pytest.warns(UserWarning, match="with 3 data-parallel replicas and 0 workers"):
        loader.load_state_dict({"epoch": 1, "batches": 1, "replicas": 3, "workers": 0})
    assert first_key(loader) == "cut-0-1-3-0"
    with pytest.warns(UserWarning, match="and 4 workers"):
        loader.load_state_dict({"epoch": 1, "batches": 3, "replicas": 1, "workers": 4})
    assert first_key(loader) == "cut-0-1-3-0"


# Lightning -------------------------------------------------------------


def fit(loader, folder, checkpoint=None, **trainer):
    """Trains on what ``loader`` gives; returns the first cut of each step, and the checkpoints by name."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.ones(())), []

        def train_dataloader(self):
            return loader

        def val_dataloader(self):
            return ReplicaLoader(plain(9, 2, keys=partial(Keys, fixed=True)))

        def training_step(self, batch, index):
            self.seen.append((batch.cut_ids or ["skipped"])[0])
            loader.mark_trained()
            return self.weight**2

        def validation_step(self, batch, index):
            assert batch.cut_ids[0] == f"cut-9-0-{index}-0"

        def on_save_checkpoint(self, checkpoint):
            # Lightning saves within the last hook of a batch, and would count that batch again
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["completed"] = counts["processed"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    callbacks = [
        ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(
            folder, "end{step}", save_top_k=-1, auto_insert_metric_name=False, save_on_train_epoch_end=True
        ),
    ]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(callbacks=callbacks, **quiet, **trainer).fit(module, ckpt_path=checkpoint)
    return module.seen, {path.stem: path for path in folder.glob("*.ckpt")}


RUNS = list(
    product(
        [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 8}],
        [Keys, Sized],
        [None, 3],
        [{}, {"limit_val_batches": 0}],
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("length, keys, limit, validation", with_core(RUNS, RUNS[::3]))
def test_lightning_resumes_at_any_checkpoint(alone, tmp_path, length, keys, limit, validation):
    trainer = {**length, **validation} | ({} if limit is None else {"limit_train_batches": limit})
    count = limit or 4
    loader = partial(alone, count=4, keys=keys, limit=limit)
    seen, checkpoints = fit(loader(), tmp_path / "whole", **trainer)
    total = trainer.get("max_steps", 3 * count)
    expected = [divmod(step, count) for step in range(total)]
    assert seen == ["skipped" if n == ONLY_SKIPPED else f"cut-0-{epoch}-{n}-0" for epoch, n in expected]
    names = [f"step{n}" for n in (2, count, count + 1, 2 * count - 1)] + [f"end{count}"]
    for name in names:
        rest, _ = fit(loader(), tmp_path / name, checkpoints[name], **trainer)
        assert rest == seen[int(name.lstrip("stepnd")) :], name
