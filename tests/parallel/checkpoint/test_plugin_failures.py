# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a checkpoint is saved is the same error in all processes."""

import errno
import os
import resource
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
from checkpoint_run import Run, assert_equal, checkpoint_files, start, state_of


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y")


def open_full(self, path, mode):
    """A stream to a device that is full."""
    return open("/dev/full" if "w" in mode else path, mode)


def fail_with_patch(target, name, replacement):
    return lambda: mock.patch.object(target(), name, replacement)


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
    "common state": (
        0,
        fail_with_patch(checkpoint_files, "write_durably", full),
        r"no space left on the device \(/x/y\)",
    ),
    "marker": (0, fail_with_patch(checkpoint_files, "write_marker", full), "no space left"),
    "last move": (0, fail_with_patch(checkpoint_files, "commit", full), "no space left"),
    "read-only folder": (
        0,
        fail_with_patch(checkpoint_files, "prepare_staging", read_only),
        "the file system is read-only",
    ),
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
    assert checkpoint_files().find_last_whole(folder) == Path(folder) / "a"


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
