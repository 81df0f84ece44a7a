# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under NeMo's ``exp_manager``: the best, the last, resuming, a time limit, and the background."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from matrix import with_core

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups

STEPS = 10


class Interrupted(Exception):
    """Ends a run without a warning."""


class Model(LightningModule):
    """Learns from numbers that depend on the step and the replica, and on random ones."""

    def __init__(self, stop_at=None, pause=0.0):
        super().__init__()
        self.stop_at, self.pause, self._random_states, self._finalize = stop_at, pause, None, None
        if groups.is_first_stage():
            self.weight = torch.nn.Parameter(torch.zeros(4, 3))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(STEPS, 1), generator=torch.Generator())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([*self.parameters()] or [{"params": []}], 0.1)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer)]

    def training_step(self, batch, index):
        from nemo_mtbi.parallel import random_states

        if self._random_states is not None:
            random_states.restore(self._random_states)
            self._random_states = None
        if self.global_step == self.stop_at:
            raise Interrupted
        time.sleep(self.pause)
        self.log("quality", float(self.global_step % 4))
        noise = torch.randn(4, 3)
        if groups.is_first_stage():
            generator = torch.Generator().manual_seed(100 * self.global_step + groups.data_parallel_rank())
            self.weight.grad = groups.data_parallel_sum(torch.randn(4, 3, generator=generator) + 0.1 * noise)
        return torch.zeros(())

    def backward(self, loss):
        pass

    def optimizer_zero_grad(self, *args):
        pass

    def on_load_checkpoint(self, checkpoint):
        self._random_states = checkpoint["random_states"]


def make_trainer(layout, model, config):
    """As a training script does it."""
    from lightning.pytorch import Trainer
    from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizerCallback
    from nemo.utils.exp_manager import exp_manager

    from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO, choose_resume
    from nemo_mtbi.parallel.strategy import MTBIStrategy

    class Strategy(MTBIStrategy):
        restore_checkpoint_after_setup = True

        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    strategy = Strategy(layout, timeout=120)
    strategy.checkpoint_io = ShardedCheckpointIO(
        lambda: strategy.lightning_module.state_dict(keep_vars=True), lambda: strategy.optimizers
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_steps=STEPS,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[AsyncFinalizerCallback()],
    )
    strategy.start(trainer)
    resume = choose_resume(config["checkpoint_callback_params"]["dirpath"])
    exp_manager(trainer, {**config, "resume_from_checkpoint": resume and str(resume)})
    trainer.ckpt_path = resume and str(resume)
    torch.manual_seed(groups.data_parallel_rank())
    return trainer, resume


def settings(folder, **changes):
    return {
        "explicit_log_dir": str(folder),
        "create_tensorboard_logger": False,
        "log_step_timing": False,
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "checkpoint_callback_params": {
            "dirpath": f"{folder}/checkpoints",
            "filename": "run-{quality:.1f}-{step}",
            "monitor": "quality",
            "save_top_k": 2,
            "every_n_train_steps": 2,
            "every_n_epochs": None,
            "save_nemo_on_train_end": False,
            "async_save": changes.pop("async_save", False),
        },
        **changes,
    }


def fit(layout, model, config):
    """A run to its end, or to where it is interrupted; returns what it was resumed from, and the steps taken."""
    trainer, resume = make_trainer(layout, model, config)
    try:
        trainer.fit(model)
        assert trainer.strategy.checkpoint_io.get_num_unfinalized_calls() == 0
    except Interrupted:
        pass
    return resume, trainer.global_step


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def kept(folder):
    """Names of the checkpoints in a folder; all of them are whole."""
    from nemo_mtbi.parallel.checkpoint import files

    paths = sorted(Path(folder, "checkpoints").iterdir())
    for path in paths:
        files.check(path)
    return [path.name for path in paths]


def resume_job(tensor, pipeline, async_save, folder):
    """An interrupted run that is resumed ends with the weights of an undisturbed one."""
    layout, async_save = ParallelConfig(int(tensor), int(pipeline)), async_save == "True"
    groups.initialize(layout)
    undisturbed = Model()
    assert fit(layout, undisturbed, settings(f"{folder}/a", async_save=async_save)) == (None, STEPS)
    for stop_at, before in ((7, None), (9, 6), (None, 8)):
        model = Model(stop_at)
        resume, _ = fit(layout, model, settings(f"{folder}/b", async_save=async_save))
        if before is None:
            assert resume is None
        elif async_save:  # the last one may not have been completed
            assert f"step={before}" in resume.name or f"step={before - 2}" in resume.name
        else:
            assert resume.name == f"run-quality={(before - 1) % 4:.1f}-step={before}-last"
        groups.gather_objects(None)  # the first process has removed what is old
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    assert not expected or expected["weight"].norm() > 0.1
    groups.gather_objects(None)
    assert (
        kept(f"{folder}/a")
        == kept(f"{folder}/b")
        == [
            "run-quality=1.0-step=10-last",
            "run-quality=1.0-step=2",
            "run-quality=1.0-step=6",
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "tensor, pipeline, count, async_save",
    with_core([(1, 1, 1, False), (1, 1, 2, True), (2, 1, 2, True), (1, 2, 2, False)], [(1, 2, 2, False)]),
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    tensor, pipeline, count, async_save, tmp_path, processes
):
    processes(resume_job, tensor, pipeline, async_save, tmp_path, count=count, timeout=300)


def limit_job(async_save, folder):
    """Each run has two seconds; the last step of each is in its checkpoint."""
    layout, async_save = ParallelConfig(), async_save == "True"
    groups.initialize(layout)
    undisturbed = Model()
    fit(layout, undisturbed, settings(f"{folder}/a"))
    ended, runs = 0, 0
    while ended < STEPS:
        model = Model(pause=0.5)
        config = settings(f"{folder}/b", async_save=async_save, max_time_per_run="00:00:00:02")
        resume, steps = fit(layout, model, config)
        assert runs == 0 or f"step={ended}-last" in resume.name
        assert steps > ended
        ended, runs = steps, runs + 1
    assert runs > 1
    assert torch.equal(model.weight, undisturbed.weight)


@pytest.mark.slow
@pytest.mark.parametrize("async_save", with_core([False, True], [True]))
def test_a_run_of_limited_time_saves_its_last_step(async_save, tmp_path, processes):
    processes(limit_job, async_save, tmp_path, count=1, timeout=300)
