# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are whole, whatever moment a run was killed at."""

import errno
import json
import logging
import os
import shutil
from contextlib import contextmanager

import pytest
import torch

from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.parallel.checkpoint import digests, files
from nemo_mtbi.parallel.checkpoint.files import Marker, explain_system_error


def write(folder, step, serial=None, place=None):
    """A checkpoint of two files; the serial number is the step."""
    place = place or folder
    place.mkdir(parents=True, exist_ok=True)
    content = {"common.pt": b"common" * step, "__0_0.distcp": b"tensors" * step}
    for name, data in content.items():
        files.write_durably(place / name, data)
    marks = {name: files.measure(place / name) for name in content}
    files.write_marker(place, Marker(step, 0, serial or step, {"tensor_model_parallel_size": 2}, marks))
    return folder


def test_a_whole_checkpoint_is_described_by_its_marker(tmp_path):
    folder = write(tmp_path / "a", 3)
    marker = files.check(folder)
    assert (marker.step, marker.epoch, marker.serial) == (3, 0, 3)
    assert marker.layout == {"tensor_model_parallel_size": 2}
    assert marker.files["common.pt"].size == 18
    assert sorted(path.name for path in folder.iterdir()) == ["__0_0.distcp", files.MARKER, "common.pt"]


def test_a_large_file_is_compared_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HASHED_BYTES", 20)
    monkeypatch.setattr(digests, "BLOCK", 8)
    folder = write(tmp_path / "a", 3)
    marks = files.read_marker(folder).files
    assert len(marks["__0_0.distcp"].sha256) == 3 and marks["__0_0.distcp"].size == 21
    with digests.open_checked(folder, "__0_0.distcp", marks) as file:
        assert file.read() == b"tensors" * 3
    content = bytearray(b"tensors" * 3)
    content[9] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    files.check(folder)  # it would be read twice
    with digests.open_checked(folder, "__0_0.distcp", marks) as file:
        assert file.read(5) == b"tenso"  # its block is whole
        with pytest.raises(DamageError, match="__0_0.distcp is not as it was written: .* bytes 8 to 16"):
            file.read(5)
    (folder / "common.pt").write_bytes(b"x" * 18)
    with pytest.raises(ValueError, match="common.pt has changed"):
        files.check(folder)


def test_what_torch_writes_is_hashed_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 1000)
    written = digests.HashedFiles()
    with written.create_stream(tmp_path / "a.tmp", "wb") as file:
        torch.save(torch.arange(300.0), file)
        assert file.tell() == file.size
    written.rename(tmp_path / "a.tmp", tmp_path / "a")
    marks = written.marks
    assert marks == {"a": files.measure(tmp_path / "a")} and len(marks["a"].digests) > 1
    with digests.CheckedFiles(tmp_path, marks).create_stream(tmp_path / "a", "rb") as file:
        assert torch.equal(torch.load(file, weights_only=True), torch.arange(300.0))


def test_no_flipped_bit_of_a_marker_is_read(tmp_path):
    folder = write(tmp_path / "a", 3)
    content, expected = (folder / files.MARKER).read_bytes(), files.read_marker(folder)
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / files.MARKER).write_bytes(damaged)
        try:
            found = files.read_marker(folder)
        except ValueError as error:
            assert str(folder) in str(error)
        else:  # white space
            assert found == expected


def test_a_checkpoint_of_format_1_is_still_read(tmp_path):
    folder = write(tmp_path / "a", 3)
    marker = json.loads((folder / files.MARKER).read_text())
    del marker["sha256"]
    marker["format"] = 1
    marker["files"]["__0_0.distcp"]["sha256"] = None  # above 64 MiB
    (folder / files.MARKER).write_text(json.dumps(marker))
    assert files.check(folder).step == 3
    with digests.open_checked(folder, "__0_0.distcp", files.read_marker(folder).files) as file:
        assert file.read() == b"tensors" * 3
    marker["format"] = 2
    (folder / files.MARKER).write_text(json.dumps(digests.signed(marker)))
    with pytest.raises(ValueError, match="'__0_0.distcp' without a digest"):
        files.check(folder)


def truncate(folder):
    os.truncate(folder / "__0_0.distcp", 5)


def drop_marker(folder):
    (folder / files.MARKER).unlink()


def edit_marker(**changes):
    def edit(folder):
        content = json.loads((folder / files.MARKER).read_text())
        (folder / files.MARKER).write_text(json.dumps({**content, **changes}))

    return edit


BREAKS = {
    "truncated shard": (truncate, "__0_0.distcp has 5 of 28 bytes"),
    "missing shard": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "changed byte": (
        lambda f: (f / "__0_0.distcp").write_bytes(b"T" + b"ensors" + b"tensors" * 3),
        "__0_0.distcp has changed",
    ),
    "missing marker": (drop_marker, "it has no checkpoint.json"),
    "empty marker": (lambda f: (f / files.MARKER).write_text(""), "checkpoint.json is damaged"),
    "half a marker": (lambda f: os.truncate(f / files.MARKER, 30), "checkpoint.json is damaged"),
    "marker of another kind": (lambda f: (f / files.MARKER).write_text("[1]"), "checkpoint.json is damaged"),
    "unknown field": (edit_marker(colour=1), "checkpoint.json is damaged"),
    "newer format": (edit_marker(format=3), "format 3, this version reads up to 2: update nemo_mtbi"),
    "older format": (edit_marker(format=1), "checkpoint.json is damaged"),
    "another serial number": (edit_marker(serial=9), "checkpoint.json is damaged .*its SHA-256 is another"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_one_is_refused_by_name_and_the_one_before_it_is_used(case, tmp_path, caplog):
    breaks, reason = BREAKS[case]
    before, broken = write(tmp_path / "epoch=1", 3), write(tmp_path / "epoch=2-last", 4)
    breaks(broken)
    with pytest.raises(ValueError, match=reason) as error:
        files.check(broken)
    assert str(broken) in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert files.find_last_whole(tmp_path) == before
    (record,) = caplog.records
    assert str(broken) in record.message and "epoch=1 is used instead" in record.message
    assert broken.is_dir()  # nothing is changed
    assert files.recover(tmp_path) == before
    assert not broken.exists() and (tmp_path / ".broken/epoch=2-last").is_dir()
    assert files.recover(tmp_path) == before


def test_nothing_whole_is_an_error_that_names_all_and_moves_none(tmp_path):
    for step, name in enumerate(("a", "b-last"), 3):
        truncate(write(tmp_path / name, step))
    with pytest.raises(ValueError, match="no checkpoint .*b-last is not a whole.*a is not a whole.*begin anew"):
        files.recover(tmp_path)
    assert (tmp_path / "a").is_dir() and (tmp_path / "b-last").is_dir()


def test_without_checkpoints_there_is_none(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "model.nemo").touch()
    assert files.find_last_whole(tmp_path) is None and files.recover(tmp_path) is None
    assert files.recover(tmp_path / "missing") is None


def test_the_newest_is_the_one_that_was_saved_last(tmp_path):
    """A run that was set back to an earlier checkpoint goes on from its own, not from those it left behind."""
    write(tmp_path / "step=90", 90, serial=5)
    assert files.next_serial(tmp_path) == 6
    last = write(tmp_path / "step=40", 40, serial=6)
    assert files.find_last_whole(tmp_path) == last
    truncate(last)
    assert files.next_serial(tmp_path) == 7  # its marker can be read


def test_only_the_newest_last_stays(tmp_path):
    """NeMo refuses to resume where there are two, which a kill between its save and its removal leaves."""
    for step in (1, 2, 3):
        write(tmp_path / f"loss={step}-last", step)
    write(tmp_path / "loss=3-last-v1", 4)
    top = write(tmp_path / "loss=2", 2)
    assert files.recover(tmp_path) == tmp_path / "loss=3-last-v1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss=2", "loss=3-last-v1"]
    files.check(top)


def test_a_newer_checkpoint_beside_the_last_removes_none(tmp_path):
    last, top = write(tmp_path / "a-last", 1), write(tmp_path / "b", 2)
    assert files.recover(tmp_path) == top
    files.check(last)


def test_nemos_marks_beside_whole_checkpoints_are_removed(tmp_path):
    """After a kill during its save or its removal of one; NeMo would delete what they mark."""
    whole, broken = write(tmp_path / "a=0.5-last", 2), write(tmp_path / "b", 1)
    drop_marker(broken)
    for name in ("a=0.5-last", "b", "gone"):
        (tmp_path / f"{name}-unfinished").touch()
    assert files.recover(tmp_path) == whole
    assert not files.unfinished_mark(whole).exists()
    assert (tmp_path / ".broken/b").is_dir()


def test_a_folder_that_needs_no_change_may_be_read_only(tmp_path, monkeypatch):
    whole = write(tmp_path / "a", 1)

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("unlink", "rename", "replace", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(files.Path, "unlink", refused)
    assert files.recover(tmp_path) == whole


@pytest.mark.parametrize("path", ["x/a=0.12-last.ckpt", "x/a=0.12-last"])
def test_the_folder_has_no_extension(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.folder_of(path) == tmp_path / "x/a=0.12-last"


def test_other_addresses_than_paths_are_refused():
    with pytest.raises(ValueError, match="s3://x/y is not a local path"):
        files.folder_of("s3://x/y")


# ------------------------------------------------------------------------------------------------- kills and failures


class Killed(BaseException):
    """In the place of SIGKILL."""


@contextmanager
def die_at(monkeypatch, number):
    """The process dies before the ``number``-th call that changes the disk (from 0)."""
    calls = 0

    def wrap(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number + 1:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for target, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "rmdir"), (os, "mkdir")):
            patch.setattr(target, name, wrap(getattr(target, name)))
        yield


def save(folder, step):
    """What a save does to the disk."""
    files.prepare_staging(folder)
    write(folder, step, place=files.staging_of(folder))
    files.commit(folder)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("number", range(9))
def test_whenever_a_save_is_killed_a_whole_checkpoint_is_found(number, replaced, tmp_path, monkeypatch):
    folder = tmp_path / "a-last" if replaced else tmp_path / "b"
    write(tmp_path / "a-last", 1)
    files.unfinished_mark(folder).touch()
    killed = False
    with die_at(monkeypatch, number):
        try:
            save(folder, 2)
        except Killed:
            killed = True
    found = files.recover(tmp_path)
    step = files.check(found).step
    assert step == 2 or (killed and step == 1)
    assert not files.staging_of(folder).parent.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"a-last", "b", "b-unfinished"}
    assert not files.unfinished_mark(found).exists()
    save(folder, 3)
    assert files.check(files.recover(tmp_path)).step == 3


@pytest.mark.parametrize("number", range(4))
def test_whenever_a_removal_is_killed_no_checkpoint_is_half_gone(number, tmp_path, monkeypatch):
    old, new = write(tmp_path / "old", 1), write(tmp_path / "new", 2)
    killed = False
    with die_at(monkeypatch, number):
        try:
            files.remove(old)
        except Killed:
            killed = True
    assert killed or not old.exists()
    assert files.recover(tmp_path) == new
    assert not (tmp_path / ".saving").exists() and not (tmp_path / ".broken").exists()
    if old.exists():
        files.check(old)


@pytest.mark.parametrize("number", range(9))
def test_a_save_that_fails_leaves_what_stood_there(number, tmp_path, monkeypatch):
    folder = write(tmp_path / "a-last", 1)
    files.unfinished_mark(folder).touch()
    failed = False
    with die_at(monkeypatch, number):
        try:
            save(folder, 2)
        except Killed:
            failed = True
    if failed:
        files.abandon(folder)
    assert files.check(folder).step in ((1, 2) if failed else (2,))
    assert not files.unfinished_mark(folder).exists() or not failed


# ------------------------------------------------------------------------------------------------------------ reasons


def test_reasons_are_told_with_a_remedy():
    assert explain_system_error(OSError(errno.ENOSPC, "x", "/a/b")) == (
        "no space left on the device (/a/b): free space there, or use another folder (exp_manager.exp_dir)"
    )
    assert explain_system_error(OSError(errno.EROFS, "x", b"/a")).startswith(
        "the file system is read-only (/a): have it"
    )
    assert explain_system_error(OSError(errno.EROFS, "x")).startswith("the file system is read-only: have it mounted")
    assert explain_system_error(OSError(errno.ENXIO, "x", "/a")).startswith("No such device or address (/a): see that")
    assert explain_system_error(ValueError("told")) == "told"
    assert explain_system_error(KeyError()) == "KeyError"


def test_the_first_error_of_the_system_is_the_reason():
    """torch's writer fails a second time when it closes its file."""
    try:
        try:
            raise OSError(errno.EFBIG, "x")
        except OSError:
            raise RuntimeError("unexpected position 64")  # noqa: B904
    except RuntimeError as error:
        assert explain_system_error(error).startswith(
            "a file would be larger than the limit: raise it with `ulimit -f`"
        )


def test_a_real_full_device_is_named():
    with pytest.raises(OSError) as error:
        files.write_durably("/dev/full", b"x" * 100)
    assert explain_system_error(error.value).startswith("no space left on the device")
