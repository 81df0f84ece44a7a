# SPDX-License-Identifier: Apache-2.0
"""Checkpoints saved and loaded by several processes: what one layout has saved, every other loads."""

import errno
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoint_run import LAYOUTS, Run, assert_equal, count, draw, seed_generators, start, state_of
from matrix import with_core


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


SAVED = [
    ("dp2", ["dp2", "single", "tp2", "tp2_dp2"]),
    ("tp2", ["tp2", "single", "pp2", "tp2_pp2"]),
    ("pp2", ["pp2", "dp2", "tp2"]),
    ("tp2_pp2", ["tp2_pp2", "single", "pp4", "tp2_dp2"]),
    ("single", ["tp2_pp2", "dp2"]),
]


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    with_core(SAVED, SAVED[3:]),
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
