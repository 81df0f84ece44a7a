# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed ends with the weights of an undisturbed one, bit for bit."""

import sys
from pathlib import Path

import pytest
from matrix import with_core

EXPERIMENTS = str(Path(__file__).resolve().parents[2] / "scripts" / "experiments")


@pytest.fixture
def kill_resume(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import kill_resume

    yield kill_resume
    for name in ("kill_resume", "small_runs"):
        del sys.modules[name]


@pytest.fixture
def keys(model_section):
    """The tiny model and its cuts, in the place of the demo's."""
    section = model_section()
    return [
        "data=null",
        f"model.pretrained_asr={section.pretrained_asr}",
        f"model.pretrained_llm={section.pretrained_llm}",
        "+model.transcription_task=repeat",
        "model.generation.max_new_tokens=2",
        "model.connector.hidden_size=24",
        f"model.train_ds.cuts_path={section.train_ds.cuts_path}",
        f"model.validation_ds.cuts_path={section.validation_ds.cuts_path}",
        "model.train_ds.batch_tokens=100",
        "model.train_ds.use_bucketing=false",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=2",
        "+exp_manager.seconds_to_sleep=0",
        "exp_manager.create_tensorboard_logger=false",
    ]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("layout", with_core(["dp2", "tp2", "pp2"], ["dp2"]))
def test_a_killed_run_ends_as_an_undisturbed_one(layout, kill_resume, keys, tmp_path, capfd):
    options = ["--kills=1", "--steps=10", "--every=2", "--launcher=fork", f"--out={tmp_path / 'runs'}"]
    status = kill_resume.main([f"--layout={layout}", *options, *keys])
    out = capfd.readouterr().out
    logs = [(path.name, path.read_text()[-2000:]) for path in sorted((tmp_path / "runs").glob("*.log"))]
    assert status == 0, (out, logs)
    assert f"{layout}: 1 kills, resumed 1 times from a checkpoint, last weights bitwise equal" in out
