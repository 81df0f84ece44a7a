# SPDX-License-Identifier: Apache-2.0
"""Steps that are left out: the weights at the end are those of a run in which these steps do not exist."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from matrix import with_core
from omegaconf import OmegaConf

from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.models import skipping
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.testing import tiny_asr_nemo, tiny_cuts, tiny_text_llm

LAYOUTS = {  # name: keys of the model
    "one": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2_vp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
LEARNERS = {
    "connector": {},
    "llm": {"llm": {"freeze": ["embedding"]}},
}
CUTS, BAD = 12, range(4, 8)  # two steps of two cuts


def make(folder):
    """Models, and cuts with and without some of them; in a third manifest the files of these do not exist."""
    folder = Path(folder)
    llm = tiny_text_llm(folder / "llm", num_layers=4, tie_embeddings=False)
    tiny_asr_nemo(folder / "asr.nemo")
    source = tiny_cuts(folder / "cuts", CUTS, llm=llm)
    with gzip.open(source, "rt") as file:
        cuts = [json.loads(line) for line in file]
    write(folder / "all.jsonl.gz", cuts)
    write(folder / "without.jsonl.gz", [cut for number, cut in enumerate(cuts) if number not in BAD])
    for number in BAD:
        cuts[number]["recording"]["sources"][0]["source"] = "/nowhere/lost.flac"
    write(folder / "lost.jsonl.gz", cuts)
    write(folder / "only_lost.jsonl.gz", [cuts[number] for number in BAD])


def write(path, cuts):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)


def section(folder, cuts, replicas=1, **changes):
    """Steps of two cuts over all replicas, in the order of the manifest; the connector has dropout."""
    optimizer = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1}
    optimizer["sched"] = {"name": "CosineAnnealing", "warmup_steps": 2, "max_steps": 20}
    data = {"batch_size": 2 // replicas, "shuffle": False, "rows_per_cut": 1, "use_bucketing": False}
    keys = {
        "pretrained_asr": f"{folder}/asr.nemo",
        "pretrained_llm": f"{folder}/llm",
        "connector": {"hidden_size": 24, "dropout": 0.1},
        "on_bad_audio": "skip",
        "on_nonfinite": "skip",
        "dist_timeout": 60,
        "train_ds": {"cuts_path": f"{folder}/{cuts}.jsonl.gz", **data},
        "optim": optimizer,
    }
    return OmegaConf.merge(keys, changes)


class Counts(Callback):
    """What Lightning counts when the run ends, and the first learning rate of each batch."""

    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, module, *unused):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, module):
        llm = module.llm_optimizer and module.llm_optimizer.steps
        self.counts = trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped, llm


def fit(keys, steps, spoil=(), **settings):
    """Weights after a run, and what it counted; the gradients of steps with the cuts ``spoil`` become NaN."""
    seed_everything(1, verbose=False)
    counts = Counts()
    settings = {"max_steps": steps, "max_epochs": -1, "devices": 1, **settings}
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        **settings,
        accelerator="cpu",
        limit_val_batches=0,
        gradient_clip_val=1.0,
        strategy=MTBIStrategy(parse_model_config(keys).layout, 60),
        callbacks=[counts],
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),
    )
    model = MTBIModel(keys, trainer)
    step = model.speech_llm.train_step

    def spoiled(batch, count):
        loss = step(batch, count)
        if not set(spoil) & set(batch.cut_ids):
            return loss
        for value in model.trained:  # only the gradient of one process: all must agree
            if value.grad is not None:
                value.grad.fill_(float("nan"))
        return loss

    model.speech_llm.train_step = spoiled
    trainer.fit(model)
    return {name: value.clone() for name, value in model.state_dict().items()}, counts


def ids(folder):
    with gzip.open(f"{folder}/all.jsonl.gz", "rt") as file:
        return [json.loads(line)["id"] for line in file]


def compare(folder, layout, learner):
    """Worker: seven updates of a pass and a half, with steps that are left out and without them."""
    replicas, processes = 2 if layout == "dp2" else 1, 1 if layout == "one" else 2
    keys = {**LAYOUTS[layout], **LEARNERS[learner]}
    names = ids(folder)

    def weights(cuts, spoil=()):
        return fit(section(folder, cuts, replicas, **keys), 7, spoil, devices=processes)

    expected, expected_counts = weights("without")
    assert len(expected_counts.rates) == 7 and len(set(expected_counts.rates)) > 4
    for cuts, spoil in (("lost", ()), ("all", [names[number] for number in BAD])):
        found, counts = weights(cuts, spoil)
        assert counts.counts == expected_counts.counts == (7, 7, 7 if learner == "llm" else None)
        assert len(counts.rates) == 11
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], (cuts, layout)
    assert expected or not groups.is_first_stage()


@pytest.fixture
def alone():
    groups.initialize()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps")
    make(path)
    return path


def test_a_run_ends_with_the_weights_of_one_without_the_steps_that_were_left_out(folder):
    compare(folder, "one", "llm")


@pytest.mark.slow
@pytest.mark.parametrize("layout", with_core(["dp2", "tp2", "pp2_vp2"], ["dp2", "pp2_vp2"]))
def test_it_does_so_in_several_processes(folder, layout, processes):
    for learner in LEARNERS:
        processes(compare, folder, layout, learner)


@pytest.mark.parametrize("why", ["lost", "nan"])
def test_a_run_that_leaves_out_every_step_ends(folder, why):
    names = ids(folder)
    remedies = {"lost": "set model.on_bad_audio=raise", "nan": f"a lower model.optim.lr.*its cuts: .*{names[-1]}$"}
    keys = section(folder, {"lost": "only_lost", "nan": "all"}[why])
    whole = "every step of a whole pass over the data was left out, so nothing is learned any more"
    with pytest.raises(RuntimeError, match=rf"{whole} \(\w+: \d+\).*{remedies[why]}"):
        fit(keys, 2, names if why == "nan" else ())


def together():
    """Worker: what replicas have left out is summed, and all of them end with the same message."""
    groups.initialize()
    skips = skipping.Skips()
    skips.begin(SimpleNamespace(began_at=0))
    for _ in range(skipping.MIN_OF_PASS):
        skips.count({"silent": 1 + groups.data_parallel_rank()})
        skips.end_step(True)
    with pytest.raises(RuntimeError, match=r"whole pass over the data was left out, so .*\(silent: 30\)"):
        skips.end_pass(False)


@pytest.mark.slow
def test_it_ends_in_all_processes(processes):
    processes(together)


def test_a_short_run_that_has_learned_nothing_says_so(folder):
    with pytest.raises(RuntimeError, match="all 2 steps of the run were left out, so nothing is learned any more"):
        fit(section(folder, "only_lost"), -1, max_epochs=1)


@pytest.mark.parametrize("bound, reason", [("MAX_NONFINITE", "nonfinite_steps"), ("MAX_UNUSABLE", "unusable")])
def test_steps_in_a_row_that_are_left_out_are_bounded(bound, reason, monkeypatch, alone):
    """A stream of data has no pass that ends."""
    monkeypatch.setattr(skipping, bound, 5)
    skips = skipping.Skips()
    for row in (4, 4, 5):
        for number in range(row):
            if reason == "unusable":
                skips.count({reason: 1})
            else:
                skips.nonfinite(f"step {number}")
            if number == 4:
                with pytest.raises(RuntimeError, match=rf"the last 5 steps in a row were left out.*\({reason}: 13\)"):
                    skips.end_step(True)
            else:
                skips.end_step(True)
        skips.end_step(False)


def test_a_pass_that_a_run_goes_on_with_or_breaks_off_is_no_whole_one(alone):
    skips = skipping.Skips()
    for began_at, stopping in ((3, False), (0, True)):
        skips.begin(SimpleNamespace(began_at=began_at))
        for _ in range(20):
            skips.count({"silent": 2})
            skips.end_step(True)
        assert skips.end_pass(stopping) == "silent: 40"
