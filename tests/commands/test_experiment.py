# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: for one run at a time, cleared of what a killed one has left, and gone on from as printed."""

import os
import re
import shlex
import signal
import tarfile
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from nemo_mtbi.commands.experiment import LOCK, experiment, override_run
from nemo_mtbi.commands.train import train
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel import groups

STEPS = 6


@pytest.fixture(scope="module")
def config(model_section, tmp_path_factory):
    """``config(**changes)``: a run of some steps in a folder that is named by the date."""
    folder = tmp_path_factory.mktemp("experiments")
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = {"max_steps": STEPS, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0}
    sections = {
        "name": "tiny",
        "seed": 3,
        "data": None,
        "benchmark": {"enabled": False},
        "model": model_section(),
        "trainer": {**trainer, **off, "use_distributed_sampler": False},
        "exp_manager": {
            "exp_dir": str(folder / "a folder's name"),
            "name": "${name}",
            "create_tensorboard_logger": False,
            "checkpoint_callback_params": {"monitor": "step", "mode": "max", "save_top_k": 1},
        },
    }
    return lambda **changes: OmegaConf.merge(sections, changes)


@pytest.fixture(autouse=True)
def _no_version(monkeypatch):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)


def printed(text, end):
    """Key and value of what the last line of a run says to add."""
    line = next(line for line in text.splitlines() if "to go on, start" in line)
    command = re.search(r"start the same command again with (.*?)" + end, line).group(1)
    parsed = [OverridesParser.create().parse_override(word) for word in shlex.split(command)]
    return {one.key_or_group: one.value() for one in parsed}


def more(config, keys, **changes):
    """The configuration of the same command with these keys."""
    found = config(**changes)
    for key, value in keys.items():
        OmegaConf.update(found, key, value)
    return found


def weights(nemo):
    with tarfile.open(nemo) as archive:
        return archive.extractfile("./model_weights.safetensors").read()


def interrupt_at(monkeypatch, number):
    """Ctrl-C while a step is computed."""
    learn, calls = MTBIModel._learn, []

    def interrupted(model, batch):
        calls.append(batch)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(model, batch)

    monkeypatch.setattr(MTBIModel, "_learn", interrupted)


@pytest.fixture(scope="module")
def expected(config):
    """The weights of a run that nothing has disturbed."""
    return weights(train(config(exp_manager={"name": "whole"})))


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_was_interrupted_goes_on_as_it_says(config, expected, step, monkeypatch, capfd):
    """Within a pass of two steps, and at its end."""
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert train(config()) is None
    out, err = capfd.readouterr()
    assert "SIGINT: process 0 of 1 saves and stops after this step. Press Ctrl-C again to end at once" in err
    assert re.search("stopped · by SIGINT after step [345] of 6; to go on, start", out)
    nemo = train(more(config, printed(out, "; checkpoint:")))
    assert "resuming ·" in capfd.readouterr().out
    assert weights(nemo) == expected
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_a_time_limit_ended_says_so_and_goes_on(config, monkeypatch, capsys):
    learn = MTBIModel._learn
    monkeypatch.setattr(MTBIModel, "_learn", lambda model, batch: time.sleep(0.3) or learn(model, batch))
    assert train(config(exp_manager={"max_time_per_run": "00:00:00:01"})).name == "tiny.nemo"
    out = capsys.readouterr().out
    assert re.search(r"time is over · by exp_manager.max_time_per_run after step [1-5] of 6; to go on, start", out)
    assert re.search(r"done · \d s in all, [12] s of them training; .* it was trained only by exp_manager.max_t", out)
    train(more(config, printed(out, "; checkpoint:"), exp_manager={"max_time_per_run": "00:00:01:00"}))
    out = capsys.readouterr().out
    assert "resuming ·" in out and "time is over" not in out


def test_a_time_limit_of_all_runs_must_be_raised_to_go_on(config, monkeypatch, capsys):
    learn = MTBIModel._learn
    monkeypatch.setattr(MTBIModel, "_learn", lambda model, batch: time.sleep(0.3) or learn(model, batch))
    train(config(trainer={"max_time": "00:00:00:01"}))
    line = capsys.readouterr().out
    assert "time is over · by trainer.max_time after step" in line
    assert "and a longer trainer.max_time, which counts the time of all runs" in line


def test_another_optimizer_does_not_go_on(config):
    keys = {"exp_manager": {"version": "optimizer"}, "trainer": {"max_steps": 2}}
    train(config(**keys))
    keys["exp_manager"] |= {"resume_if_exists": True}
    with pytest.raises(ValueError, match="optimizer AdamW, and model.optim.name gives SGD, which can't go on"):
        train(config(**keys, model={"optim": {"name": "sgd"}}))


def test_a_learning_rate_needs_no_schedule(config):
    model = {"optim": {"name": "adamw", "lr": 1e-3, "sched": None}}
    train(config(exp_manager={"version": "constant"}, trainer={"max_steps": 1}, model=model))


@pytest.fixture
def trainer():
    groups.initialize()
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=1)


def manager(folder, **changes):
    return OmegaConf.create({"explicit_log_dir": str(folder), "create_tensorboard_logger": False, **changes})


def test_a_second_run_in_a_folder_is_refused(trainer, tmp_path):
    section = manager(tmp_path / "x", create_checkpoint_callback=False)
    with exclusive(tmp_path / "x", lock=tmp_path / "x" / LOCK):
        message = rf"exp_manager.*: {tmp_path}/x is being written by another run \(process {os.getpid()}\)"
        with pytest.raises(RuntimeError, match=message), experiment(trainer, section):
            pass
    for _ in range(2):  # a run that has ended leaves the folder to the next one, also if it has failed
        with pytest.raises(KeyError), experiment(trainer, section):
            raise KeyError


def test_checkpoints_elsewhere_are_locked_too(trainer, tmp_path):
    places = {"dirpath": str(tmp_path / "checkpoints")}
    section = manager(tmp_path / "x", create_checkpoint_callback=False, checkpoint_callback_params=places)
    with exclusive(tmp_path / "checkpoints", lock=tmp_path / "checkpoints" / LOCK):
        with pytest.raises(RuntimeError, match="/checkpoints is being written by"), experiment(trainer, section):
            pass


def test_what_a_killed_run_has_left_is_removed(trainer, tmp_path):
    checkpoints = tmp_path / "x" / "checkpoints"
    for name in ("a--last", ".saving/a", ".saving/b.removed"):
        (checkpoints / name).mkdir(parents=True)
    left = [
        checkpoints / "b-unfinished",
        tmp_path / "x" / ".tiny.nemo.0123abcd.partial",
        checkpoints / ".b.nemo.0123abcd.partial",
    ]
    kept = [checkpoints / "a--last-unfinished", checkpoints / "notes.partial"]
    for path in (*left, *kept):
        path.touch()
    with experiment(trainer, manager(tmp_path / "x", create_checkpoint_callback=False)):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


@pytest.mark.parametrize(
    "value",
    ["2026-11-30_09-20-28", "version_0", "/a b/ö", "it's", 'a"b', "a\\", 'a\\"b', "1e5", "null", "7", "a=1,2", "[x]"],
)
def test_a_printed_value_is_what_the_shell_and_hydra_read(value):
    (word,) = shlex.split(override_run("exp_manager.name", value, is_given=False))
    parsed = OverridesParser.create().parse_override(word)
    assert parsed.is_force_add() and parsed.value() == value


def test_a_printed_value_is_no_interpolation():
    (word,) = shlex.split(override_run("exp_manager.name", "${seed}"))
    value = OverridesParser.create().parse_override(word).value()
    assert OmegaConf.create({"name": value, "seed": 1}).name == "${seed}"
    assert Path(value).name == "\\${seed}"
