# SPDX-License-Identifier: Apache-2.0
"""Checkpoints saved and loaded by several processes: what one layout has saved, every other loads."""

import errno
import json
import os
import pickle
import random
import resource
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_mtbi.parallel.groups import ParallelConfig

LAYOUTS = {  # name: layout and data-parallel size
    "single": (ParallelConfig(), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2": (ParallelConfig(2), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp4": (ParallelConfig(1, 4), 1),
}


def count(name):
    layout, data = LAYOUTS[name]
    return layout.model_parallel_size * data


def start(name):
    """Starts the groups of a layout in a worker."""
    from nemo_mtbi.parallel import groups

    layout, data = LAYOUTS[name]
    groups.initialize(layout, timeout=240)
    assert groups.data_parallel_size() == data


def whole(seed, *shape):
    """A tensor that is the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHARED = {"columns": ((8, 6), 0, 1), "rows": ((6, 8), 1, 1), "gated": ((8, 6), 0, 2)}  # shape, axis, parts


def share(tensor, axis, parts):
    """This process's share of a tensor."""
    from nemo_mtbi.parallel import groups

    size, rank = groups.layout().tensor_model_parallel_size, groups.tensor_parallel_rank()
    return torch.cat([part.chunk(size, axis)[rank] for part in tensor.chunk(parts, axis)], axis)


class Model(torch.nn.Module):
    """A connector on the first stage, whole in every process, and adapters that tensor-parallel processes share."""

    def __init__(self):
        from nemo_mtbi.parallel import groups

        super().__init__()
        if not groups.is_first_stage():
            return
        self.whole = torch.nn.Parameter(whole(1, 5, 3))
        self.register_buffer("scale", whole(2, 3))
        for seed, (name, (shape, axis, parts)) in enumerate(SHARED.items(), 3):
            value = torch.nn.Parameter(share(whole(seed, *shape), axis, parts))
            value.tensor_model_parallel, value.partition_dim, value.partition_stride = True, axis, parts
            self.register_parameter(name, value)

    def step(self, optimizer, number):
        """An optimizer step with gradients that do not depend on the layout."""
        for seed, (name, parameter) in enumerate(self.named_parameters(), 1000 * number):
            if name in SHARED:
                shape, axis, parts = SHARED[name]
                parameter.grad = share(whole(seed, *shape), axis, parts)
            else:
                parameter.grad = whole(seed, *parameter.shape)
        if optimizer:
            optimizer.step()


class Run:
    """What a strategy would hold."""

    def __init__(self):
        from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO

        self.model = Model()
        parameters = list(self.model.parameters())
        self.optimizers = [torch.optim.AdamW(parameters, 0.1)] if parameters else []
        self.io = ShardedCheckpointIO(
            lambda: self.model.state_dict(keep_vars=True), lambda: self.optimizers, seed=7, timeout=30
        )

    def train(self, *numbers):
        for number in numbers:
            self.model.step(self.optimizers[0] if self.optimizers else None, number)

    def checkpoint(self, step):
        """What Lightning would hand over."""
        return {
            "epoch": 1,
            "global_step": step,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": self.model.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
            "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5), "path": Path("x.ckpt")}},
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
            "lr_schedulers": [{"last_epoch": step, "base_lrs": [0.1]}] if self.optimizers else [],
            "hparams_name": "cfg",
            "hyper_parameters": OmegaConf.create({"a": 1, "b": {"c": [1, "${a}"]}}),
            "hparams_type": type(OmegaConf.create()),
            "data_position": {"epoch": 1, "batches": step},
        }

    def save(self, path, step, **options):
        self.io.save_checkpoint(self.checkpoint(step), path, **options)

    def resume(self, path):
        from nemo_mtbi.parallel import random_states

        checkpoint = self.io.load_checkpoint(path)
        self.model.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        random_states.restore(checkpoint["random_states"])
        return checkpoint


def state_of(run):
    """Weights and optimizer state by name."""
    names = [name for name, _ in run.model.named_parameters()]
    state = run.optimizers[0].state_dict()["state"] if run.optimizers else {}
    return {
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
        "optimizer": {names[i]: {k: v.clone() for k, v in entries.items()} for i, entries in state.items()},
    }


def assert_equal(found, expected):
    """Bitwise."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[key], value)
        else:
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def seed_generators():
    from nemo_mtbi.parallel import groups

    seed = groups.data_parallel_rank()
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def draw():
    """Random numbers of each generator; normal ones, whose generators keep a second number for later."""
    return torch.tensor([random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(1).item()])


def save_job(layout, folder):
    start(layout)
    run = Run()
    run.train(1, 2, 3)
    seed_generators()
    draw()
    run.save(f"{folder}/a-last.ckpt", 3)


def load_job(layout, folder, saved_by):
    """Compares with a run that was never interrupted, before and after one more step."""
    start(layout)
    undisturbed, run = Run(), Run()
    undisturbed.train(1, 2, 3)
    run.train(9)
    checkpoint = run.resume(f"{folder}/a-last.ckpt")
    assert checkpoint["global_step"] == 3 and checkpoint["data_position"] == {"epoch": 1, "batches": 3}
    assert checkpoint["hyper_parameters"] == {"a": 1, "b": {"c": [1, 1]}}
    assert checkpoint["lr_schedulers"] == [{"last_epoch": 3, "base_lrs": [0.1]}]
    assert checkpoint["loops"]["fit_loop"]["epoch_progress"] == {"current": {"ready": 1}}
    assert "hparams_type" not in checkpoint and "optimizer_groups" not in checkpoint
    assert_equal(state_of(run), state_of(undisturbed))
    drawn = draw()
    seed_generators()
    draw()
    again = draw()
    assert torch.equal(drawn, again) == (LAYOUTS[layout][1] == LAYOUTS[saved_by][1]), (layout, drawn, again)
    run.train(4), undisturbed.train(4)
    assert_equal(state_of(run), state_of(undisturbed))


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        ("dp2", ["dp2", "single", "tp2", "tp2_dp2"]),
        ("tp2", ["tp2", "single", "pp2", "tp2_pp2"]),
        ("pp2", ["pp2", "dp2", "tp2"]),
        ("tp2_pp2", ["tp2_pp2", "single", "pp4", "tp2_dp2"]),
        ("single", ["tp2_pp2", "dp2"]),
    ],
)
def test_every_layout_loads_what_another_has_saved(saved_by, loaded_by, tmp_path, processes):
    processes(save_job, saved_by, tmp_path, count=count(saved_by))
    for layout in loaded_by:
        processes(load_job, layout, tmp_path, saved_by, count=count(layout))


# ----------------------------------------------------------------------------------------------------- the background


@contextmanager
def held():
    """Writers wait until the body sets the event that it gets."""
    from torch.distributed.checkpoint import FileSystemWriter

    go, write = threading.Event(), FileSystemWriter.write_data

    def wait_and_write(*args):
        assert go.wait(60)
        return write(*args)

    with mock.patch.object(FileSystemWriter, "write_data", wait_and_write):
        yield go


def background_job(layout, folder):
    from nemo_mtbi.parallel.checkpoint import files

    start(layout)
    run, finalized = Run(), []
    run.train(1, 2, 3)
    expected = state_of(run)
    path = Path(folder) / "a-last"
    with held() as go:
        run.save(f"{path}.ckpt", 3, storage_options={"finalize_fn": lambda: finalized.append(path.is_dir())})
        run.train(4, 5)  # in place, while the writers wait
        assert not run.io.maybe_finalize_save_checkpoint(blocking=False)
        assert run.io.get_num_unfinalized_calls() == 1 and not path.exists() and not finalized
        go.set()
        assert run.io.maybe_finalize_save_checkpoint(blocking=True)
    assert finalized == [True] and run.io.get_num_unfinalized_calls() == 0
    assert files.check(path).step == 3
    resumed = Run()
    resumed.resume(path)
    assert_equal(state_of(resumed), expected)
    # one save waits for another, and so does a load
    run.save(f"{folder}/b.ckpt", 4, storage_options={"finalize_fn": lambda: finalized.append("b")})
    run.save(f"{folder}/c.ckpt", 5, storage_options={"finalize_fn": lambda: finalized.append("c")})
    assert finalized[1:] == ["b"] or finalized[1:] == ["b", "c"]
    assert run.resume(f"{folder}/c.ckpt")["global_step"] == 5
    assert finalized[1:] == ["b", "c"]


@pytest.mark.parametrize("layout", ["single", "tp2_dp2"])
def test_in_the_background_the_state_at_the_call_is_written(layout, tmp_path, processes):
    processes(background_job, layout, tmp_path, count=count(layout))


def background_failure_job(layout, folder):
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter

    start(layout)
    run = Run()
    run.save(f"{folder}/a.ckpt", 1)
    with mock.patch.object(FileSystemWriter, "write_data", side_effect=OSError(errno.ENOSPC, "full")):
        run.save(f"{folder}/b.ckpt", 2, storage_options={"finalize_fn": lambda: pytest.fail("finalized")})
        with pytest.raises(RuntimeError, match="b could not be saved: no space left"):
            run.io.maybe_finalize_save_checkpoint(blocking=True)
    dist.barrier()
    assert run.io.get_num_unfinalized_calls() == 0 and sorted(os.listdir(folder)) == ["a"]
    run.save(f"{folder}/b.ckpt", 3)


def test_a_failure_in_the_background_is_raised_when_it_is_asked_for(tmp_path, processes):
    processes(background_failure_job, "dp2", tmp_path, count=2)


def slow_job(layout, folder):
    start(layout)
    run = Run()
    run.io._timeout = 0.5
    with held() as go, pytest.raises(RuntimeError, match="a could not be saved: writing takes too long"):
        run.save(f"{folder}/a.ckpt", 1)
    go.set()
    assert not Path(folder, "a").exists()


def test_a_device_that_does_not_answer_is_an_error(tmp_path, processes):
    processes(slow_job, "dp2", tmp_path, count=2)


# ----------------------------------------------------------------------------------------------------------- failures


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y")


def open_full(self, path, mode):
    """A stream to a device that is full."""
    return open("/dev/full" if "w" in mode else path, mode)


def fail_with_patch(target, name, replacement):
    return lambda: mock.patch.object(target(), name, replacement)


def _files():
    from nemo_mtbi.parallel.checkpoint import files

    return files


def _file_system():
    from torch.distributed.checkpoint.filesystem import FileSystem

    return FileSystem


@contextmanager
def file_size_limit():
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def read_only(folder):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))


FAILURES = {  # which process fails, how, and what all processes say
    "shard of the first": (0, fail_with_patch(_file_system, "create_stream", open_full), "no space left"),
    "shard of the second": (1, fail_with_patch(_file_system, "create_stream", open_full), "no space left"),
    "common state": (0, fail_with_patch(_files, "write_durably", full), r"no space left on the device \(/x/y\)"),
    "marker": (0, fail_with_patch(_files, "write_marker", full), "no space left"),
    "last move": (0, fail_with_patch(_files, "commit", full), "no space left"),
    "read-only folder": (0, fail_with_patch(_files, "prepare_staging", read_only), "the file system is read-only"),
    "size limit of the first": (0, file_size_limit, "a file would be larger than the limit"),
    "size limit of the second": (1, file_size_limit, "a file would be larger than the limit"),
}


def failure_job(case, folder):
    import torch.distributed as dist

    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.checkpoint import files

    start("tp2")
    failing, fails, message = FAILURES[case]
    run, path = Run(), Path(folder) / "a-last"
    run.train(1)
    run.save(f"{folder}/top.ckpt", 1)
    run.save(f"{path}.ckpt", 1)
    expected = state_of(run)
    run.train(2)
    files.unfinished_mark(path).touch()  # as NeMo does
    dist.barrier()
    for target in (path, Path(folder) / "new"):
        with (
            pytest.raises(RuntimeError) as error,
            fails() if dist.get_rank() == failing else nullcontext(),
        ):
            run.save(f"{target}.ckpt", 2)
        messages = groups.gather_objects(str(error.value))
        assert messages[0] == messages[1], messages
        dist.barrier()  # the first process has cleared what is left
        start_of = f"the checkpoint {target} could not be saved: "
        assert messages[0].startswith(start_of), messages[0]
        error.match(f"{message}.*checkpoints saved before are intact.*process {failing}")
    assert sorted(os.listdir(folder)) == ["a-last", "top"]  # NeMo's mark would have it delete what is whole
    resumed = Run()
    assert resumed.resume(path)["global_step"] == 1
    assert_equal(state_of(resumed), expected)
    run.save(f"{path}.ckpt", 2)
    assert resumed.resume(path)["global_step"] == 2


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_of_one_process_is_the_same_error_in_all(case, tmp_path, processes):
    processes(failure_job, case, tmp_path, count=2)


def lost_job(folder):
    from nemo_mtbi.parallel import groups

    start("dp2")
    run = Run()
    run.save(f"{folder}/a.ckpt", 1)
    if groups.data_parallel_rank() == 1:
        groups.shut_down()  # closes its connections, as a process does that dies
        return
    with pytest.raises(RuntimeError):
        run.save(f"{folder}/b.ckpt", 2)
    assert _files().find_last_whole(folder) == Path(folder) / "a"


def test_a_process_that_is_gone_is_an_error_in_the_others(tmp_path, processes):
    processes(lost_job, tmp_path, count=2, timeout=60)


def disagreement_job(folder):
    import torch.distributed as dist

    from nemo_mtbi.parallel import groups

    start("dp2")
    run = Run()
    checkpoint = {**run.checkpoint(1), "data_position": groups.data_parallel_rank()}
    with pytest.raises(RuntimeError, match="different values of 'data_position'"):
        run.io.save_checkpoint(checkpoint, f"{folder}/a.ckpt")
    checkpoint["data_position"] = threading.Lock() if groups.data_parallel_rank() else 0
    with pytest.raises(ValueError, match=r"checkpoint.data_position is a _thread.lock, which no checkpoint can hold"):
        run.io.save_checkpoint(checkpoint, f"{folder}/a.ckpt")
    with pytest.raises(ValueError, match="unknown storage_options colour"):
        run.save(f"{folder}/a.ckpt", 1, storage_options={"colour": 1})
    dist.barrier()
    assert not os.listdir(folder)


def test_what_differs_or_can_not_be_stored_is_refused(tmp_path, processes):
    processes(disagreement_job, tmp_path, count=2)


# ------------------------------------------------------------------------------------------------------------ loading


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def remark(folder):
    """Makes the marker fit the files again, as who has crafted them would."""
    files = _files()
    marker = json.loads((folder / files.MARKER).read_text())
    for name in marker["files"]:
        mark = files.measure(folder / name)
        marker["files"][name] = {"size": mark.size, "sha256": mark.sha256}
    (folder / files.MARKER).write_text(json.dumps(marker))


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
    with pytest.raises(ValueError, match="a-last is no whole checkpoint: it has no checkpoint.json"):
        choose_resume(folder)


def test_all_processes_choose_the_same(tmp_path, processes):
    processes(choose_job, tmp_path, count=2)
