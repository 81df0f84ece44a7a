# SPDX-License-Identifier: Apache-2.0
"""What is loaded: broken, crafted and foreign checkpoints, other models and optimizers."""

import json
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_run import SHARED, Run, assert_equal, checkpoint_files, start, whole


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def flip(path):
    """Change one bit of a weight, or of what else lies there."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remark(folder):
    """Makes the marker fit the files again, as who has crafted them would."""
    from nemo_mtbi.parallel.checkpoint import digests

    files = checkpoint_files()
    marker = json.loads((folder / files.MARKER).read_text())
    for name in marker["files"]:
        mark = files.measure(folder / name)
        marker["files"][name] = {"size": mark.size, "sha256": mark.sha256}
    marker.pop("sha256")
    (folder / files.MARKER).write_text(json.dumps(digests.signed(marker)))


def refused_job(folder):
    import torch.distributed as dist

    from nemo_mtbi.parallel import groups

    start("tp2")
    run, folder = Run(), Path(folder)
    for name in ("a", "b"):
        run.save(folder / f"{name}.ckpt", 1)
    path = folder / "b"
    shard = next(path.glob("*.distcp"))
    executed = folder / "executed"

    def refused(break_it, message, path=path):
        kept = {}
        if dist.get_rank() == 0:
            kept = {file: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}
            break_it()
        dist.barrier()
        with pytest.raises(ValueError, match=message) as error:
            run.io.load_checkpoint(path)
        assert len(set(groups.gather_objects(str(error.value)))) == 1
        assert str(path) in str(error.value)
        dist.barrier()
        for file, content in kept.items():
            file.write_bytes(content)
        dist.barrier()

    def crafted(name, content):
        (path / name).write_bytes(content)
        remark(path)

    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    next(iter(metadata.storage_data.values())).relative_path = "../a/__0_0.distcp"
    refused(lambda: os.truncate(shard, 10), f"{shard.name} has 10 of .*; {folder / 'a'} is whole: resume from that")
    with mock.patch.object(
        checkpoint_files(), "HASHED_BYTES", 0
    ):  # of large files blocks are compared when they are read
        for name in (shard.name, "common.pt", ".metadata"):
            refused(
                lambda name=name: flip(path / name),
                f"is damaged: {name} is not as it was written.*; move it away; {folder / 'a'} is whole",
            )
    refused(lambda: (path / "checkpoint.json").unlink(), "it has no checkpoint.json")
    refused(lambda: None, "there is no such folder", path=folder / "c")
    refused(lambda: crafted("common.pt", pickle.dumps(Payload(executed))), "common.pt is not loaded")
    refused(
        lambda: torch.save({"checkpoint": Payload(executed)}, path / "common.pt") or remark(path), "common.pt is not"
    )
    refused(
        lambda: crafted(".metadata", pickle.dumps(Payload(executed))), "metadata is not loaded: it holds pathlib.Path"
    )
    refused(lambda: crafted(".metadata", pickle.dumps(metadata)), r"it refers to ../a/__0_0.distcp")
    assert not executed.exists()
    run.resume(path)


def test_broken_and_crafted_checkpoints_are_refused(tmp_path, processes):
    processes(refused_job, tmp_path, count=2)


def misfit_job(folder):
    start("dp2")
    run, path = Run(), f"{folder}/a"
    run.train(1)
    run.save(path, 1)

    def refused(message):
        with pytest.raises(ValueError, match=f"a could not be loaded: {message}.*that it was trained with"):
            run.io.load_checkpoint(path)

    kept = run.model.whole
    run.model.whole = torch.nn.Parameter(torch.zeros(5, 4))
    refused(r"the model's whole is torch.float32 \(5, 4\), in it torch.float32 \(5, 3\)")
    run.model.whole = torch.nn.Parameter(kept.detach().double())
    refused(r"the model's whole is torch.float64 \(5, 3\), in it torch.float32")
    run.model.whole, run.optimizers, kept_optimizers = None, [], run.optimizers
    refused("it holds weights that this model has not: whole")
    run.model.whole, run.model.more = kept, torch.nn.Parameter(torch.zeros(1))
    refused("the model's more is not in it")
    del run.model.more
    run.optimizers = kept_optimizers
    run.optimizers[0].add_param_group({"params": []})
    with pytest.raises(ValueError, match="has 2 parameter groups, the one that was saved 1"):
        run.io.load_checkpoint(path)


def test_a_model_that_does_not_fit_is_refused(tmp_path, processes):
    processes(misfit_job, tmp_path, count=2)


def stock_job(folder):
    """Megatron's own functions read the folder."""
    from megatron.core import dist_checkpointing

    start("tp2_pp2")
    run = Run()
    run.train(1)
    run.save(f"{folder}/a", 1)
    tensors = dist_checkpointing.load_plain_tensors(f"{folder}/a")
    assert torch.equal(tensors["model.scale"], whole(2, 3))
    assert {name: tuple(tensors[f"optimizer.0.exp_avg.{name}"].shape) for name in SHARED} == {
        name: shape for name, (shape, _, _) in SHARED.items()
    }
    assert tensors["optimizer.0.step.gated"] == 1
    common = dist_checkpointing.load_common_state_dict(f"{folder}/a")
    assert common["checkpoint"]["global_step"] == 1
    assert json.loads(Path(folder, "a/checkpoint.json").read_text())["layout"] == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "data_parallel_size": 1,
    }


def test_megatrons_own_reader_reads_it(tmp_path, processes):
    processes(stock_job, tmp_path, count=4)


def partial_job(folder):
    """Weights only, and without the optimizer, as NeMo may ask."""
    start("dp2")
    run = Run()
    run.train(1)
    weights_only = {k: v for k, v in run.checkpoint(1).items() if k not in ("optimizer_states", "lr_schedulers")}
    run.io.save_checkpoint(weights_only, f"{folder}/a.ckpt")
    run.save(f"{folder}/b.ckpt", 1, storage_options={"include_optimizer": False})
    for name in "ab":
        checkpoint = run.io.load_checkpoint(f"{folder}/{name}.ckpt")
        assert "optimizer_states" not in checkpoint and "lr_schedulers" not in checkpoint
        assert_equal(checkpoint["state_dict"], run.model.state_dict())
    run.save(f"{folder}/c.ckpt", 1)
    run.optimizers = []  # as in validation
    assert run.io.load_checkpoint(f"{folder}/c.ckpt")["optimizer_states"] == []


def test_optimizer_states_may_be_left_out(tmp_path, processes):
    processes(partial_job, tmp_path, count=2)


class Counting(torch.optim.Optimizer):
    """Keeps numbers and tensors of another shape, as Adafactor does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1
            state["rms"], state["frozen"], state["nothing"] = 0.1 * state["count"], True, None
            state["row"] = torch.full(parameter.shape[:1], float(state["count"]))


def other_optimizer_job(folder):
    start("tp2")
    run = Run()
    run.optimizers = [Counting([run.model.whole])]
    run.train(1, 2)
    run.save(f"{folder}/a", 1)
    (loaded,) = run.io.load_checkpoint(f"{folder}/a")["optimizer_states"]
    state = loaded["state"][0]
    assert torch.equal(state.pop("row"), torch.full((5,), 2.0))
    assert state == {"count": 2, "rms": 0.2, "frozen": True}
    assert loaded["param_groups"] == [{"lr": 0.1, "params": [0]}]
    run.optimizers = [Counting([run.model.rows])]
    run.train(1)
    with pytest.raises(
        ValueError, match=r"state row of rows has shape \(6,\), which tensor-parallel processes can't share"
    ):
        run.save(f"{folder}/b", 1)
    run.optimizers = [Counting([torch.nn.Parameter(torch.zeros(2, 2))])]
    with pytest.raises(
        ValueError, match=r"parameters of shapes \[\(2, 2\)\] that the model's state_dict\(\) leaves out"
    ):
        run.save(f"{folder}/b", 1)


def test_optimizers_with_other_states(tmp_path, processes):
    processes(other_optimizer_job, tmp_path, count=2)


def choose_job(folder):
    import torch.distributed as dist

    from nemo_mtbi.parallel.checkpoint.plugin import choose_resume

    start("dp2")
    run = Run()
    assert choose_resume(folder) is None
    run.save(f"{folder}/a.ckpt", 1)
    run.save(f"{folder}/a-last.ckpt", 2)
    assert choose_resume(folder) == Path(folder, "a-last")
    dist.barrier()
    if dist.get_rank() == 0:
        os.truncate(next(Path(folder, "a-last").glob("*.distcp")), 10)
    dist.barrier()
    assert choose_resume(folder) == Path(folder, "a")
    run.io.remove_checkpoint(f"{folder}/none.ckpt")
    dist.barrier()
    if dist.get_rank() == 0:
        run.io.remove_checkpoint(f"{folder}/a.ckpt")
        Path(folder, "a-last").mkdir()
    dist.barrier()
    with pytest.raises(ValueError, match="a-last is not a whole checkpoint: it has no checkpoint.json"):
        choose_resume(folder)


def test_all_processes_choose_the_same(tmp_path, processes):
    processes(choose_job, tmp_path, count=2)
