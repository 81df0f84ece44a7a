# SPDX-License-Identifier: Apache-2.0
"""A run saved by one layout goes on in another with equal losses: the whole training run, through its checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from matrix import with_core

SIZES = {  # tensor- and pipeline-parallel, and processes
    "tp2_pp2": (2, 2, 4),
    "single": (1, 1, 1),
    "pp4": (1, 4, 4),
    "pp2_dp2": (1, 2, 4),
    "tp2_dp2": (2, 1, 4),
}
LEARNERS = {  # what of the LLM trains; the layout of the whole run, and those that go on with it
    "lora": ({"lora": {"rank": 3, "target_modules": ["linear_qkv", "mlp"]}}, "tp2_pp2", ("single", "pp4")),
    # with as many replicas, which read the same data
    "llm": ({"llm": {"freeze": [r"layers\.0\."], "lr": 1e-3}}, "pp2_dp2", ("tp2_dp2",)),
}
STEPS, SAVED = 6, 3  # the run in all, and when it is saved


def make_section(folder):
    """Worker: a tiny LLM that four stages can hold, and cuts whose behaviors come from it."""
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_cuts, tiny_text_llm

    folder = Path(folder)
    llm = tiny_text_llm(folder / "llm", num_layers=4, tie_embeddings=False, vocab_size=129)  # 2 processes pad it
    tiny_asr_nemo(folder / "asr.nemo")
    tiny_cuts(folder / "cuts", 12, llm=llm)


def warm_up():
    """Worker: the slow imports, so that no process waits for another's."""
    import nemo_mtbi.commands.train  # noqa: F401


def configuration(folder, out, name, learner):
    """A run of :data:`STEPS` steps that saves its state halfway, and goes on from what it finds."""
    from omegaconf import OmegaConf

    (cuts,) = Path(folder, "cuts").glob("*.jsonl*")
    tensor, pipeline, processes = SIZES[name]
    return OmegaConf.create(
        {
            "name": "tiny",
            "seed": 3,
            "model": {
                "pretrained_asr": f"{folder}/asr.nemo",
                "pretrained_llm": f"{folder}/llm",
                "connector": {"hidden_size": 24},
                "generation": {"max_new_tokens": 8},
                "interleave": {"probability": 0.5},
                **LEARNERS[learner][0],
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "dist_timeout": 60,
                "micro_batch_tokens": 60,
                "train_ds": {"cuts_path": str(cuts), "batch_size": 4, "rows_per_cut": 2, "shuffle": True, "seed": 3},
                "validation_ds": {"cuts_path": str(cuts), "batch_size": 12},
                "optim": {
                    "name": "adamw",
                    "lr": 1e-2,
                    "sched": {"name": "CosineAnnealing", "warmup_steps": 2, "max_steps": STEPS},
                },
            },
            "trainer": {
                "max_steps": STEPS,
                "max_epochs": -1,
                "accelerator": "cpu",
                "devices": processes,
                "val_check_interval": SAVED,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "gradient_clip_val": 1.0,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            "exp_manager": {
                "name": "tiny",
                "exp_dir": str(out),
                "resume_if_exists": True,
                "resume_ignore_no_checkpoint": True,
                "checkpoint_callback_params": {"monitor": "val_loss", "save_top_k": -1, "filename": "tiny-{step}"},
            },
        }
    )


def run(folder, out, name, learner):
    """Worker: trains; the first process writes the losses of the steps that it took."""
    from nemo_mtbi.commands.train import train
    from nemo_mtbi.parallel import groups

    path = train(configuration(folder, out, name, learner))
    if groups.is_global_first():
        Path(out, "losses.json").write_text(json.dumps(losses(path.parent)))


def losses(folder):
    """Step → loss, as TensorBoard has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for event in sorted(folder.rglob("events*")):
        board = EventAccumulator(str(event))
        board.Reload()
        for tag in ("train_loss", "val_loss"):
            found |= {f"{tag} {one.step}": one.value for one in board.Scalars(tag)}
    return found


def trained(nemo):
    import tarfile

    from safetensors.torch import load

    with tarfile.open(nemo) as archive:
        (member,) = (item for item in archive if item.name.endswith("model_weights.safetensors"))
        return load(archive.extractfile(member).read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, _pool):
    path = tmp_path_factory.mktemp("layouts")
    _pool.run(__file__, "make_section", [str(path)], 1, 180)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("learner", with_core(LEARNERS, ["lora"]))
def test_a_run_goes_on_in_another_layout(folder, learner, tmp_path, processes):
    """Losses of the second half and the last weights are those of the run that stayed in its layout."""
    import torch

    _, whole, others = LEARNERS[learner]
    processes(warm_up, count=4)
    first = tmp_path / whole
    first.mkdir()
    processes(run, folder, first, whole, learner, count=SIZES[whole][2])
    expected = json.loads((first / "losses.json").read_text())
    assert sorted(expected) == sorted(f"train_loss {n}" for n in range(STEPS)) + ["val_loss 2", "val_loss 5"]
    (saved,) = (path for path in (first / "tiny" / "checkpoints").iterdir() if f"step={SAVED}" in path.name)
    for name in others:
        own = tmp_path / name
        shutil.copytree(saved, own / "tiny" / "checkpoints" / saved.name)
        processes(run, folder, own, name, learner, count=SIZES[name][2])
        found = json.loads((own / "losses.json").read_text())
        late = {key: value for key, value in expected.items() if int(key.split()[1]) >= SAVED}
        assert found == pytest.approx(late, rel=1e-5)
        weights = [trained(path / "tiny" / "tiny.nemo") for path in (first, own)]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
