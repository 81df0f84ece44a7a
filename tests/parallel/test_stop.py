# SPDX-License-Identifier: Apache-2.0
import errno
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups, stop
from nemo_mtbi.parallel.stop import SIGNALS, Remedies, StopOnSignal, explained


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_the_next_agreed_step(number):
    before = signal.getsignal(number)
    callback = StopOnSignal(lambda: callback.requested is not None)
    trainer = SimpleNamespace(should_stop=False, fit_loop=SimpleNamespace(min_epochs=1))
    callback.on_train_start(trainer, None)
    callback.on_train_batch_end(trainer, None)
    assert not trainer.should_stop and callback.requested is None
    os.kill(os.getpid(), number)
    callback.on_train_batch_end(trainer, None)
    assert trainer.should_stop and callback.stopped and not trainer.fit_loop.min_epochs
    assert callback.requested == signal.Signals(number).name
    callback.on_train_end(trainer, None)
    assert signal.getsignal(number) == before


def test_an_error_gives_the_signals_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    callback = StopOnSignal(lambda: False)
    callback.on_train_start(None, None)
    assert [signal.getsignal(number) for number in SIGNALS] != before
    callback.on_exception(None, None, ValueError())
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_errors_pass_unchanged():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, explained():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_of_training_ends_the_process_with_a_reason(number, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, explained():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{signal.Signals(number).name} has ended process 1 of 2 outside of training.")
    assert ("its own last lines say why" in last) == (number != signal.SIGINT) and "resume_if_exists=true" in last
    assert signal.getsignal(number) == before


def test_a_signal_does_not_hide_the_failure_that_a_process_has_itself(capfd):
    with pytest.raises(ValueError, match="^mine$"), explained():
        try:
            raise ValueError("mine")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not capfd.readouterr().err


def test_a_signal_while_training_is_told_once(capfd):
    callback = StopOnSignal(lambda: False)
    callback.on_train_start(None, None)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_train_end(None, None)
    assert capfd.readouterr().err.count("SIGTERM: process 0 of 1 saves and stops after this step") == 1


def interrupted(seconds):
    """Worker that is forked: Ctrl-C twice while training, as torchrun passes it on or as a person presses it."""
    callback = StopOnSignal(lambda: False)
    callback.on_train_start(None, None)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(callback.requested == "SIGINT")


@pytest.mark.parametrize("launched, seconds, ends", [(False, 0, True), (True, 0, False), (True, 0.2, True)])
def test_a_second_interrupt_ends_at_once(launched, seconds, ends, monkeypatch):
    """torchrun passes on the first one, which a terminal has sent to all processes already."""
    monkeypatch.setattr(stop, "FORWARDED_SECONDS", 0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x") if launched else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
    child = os.fork()
    if child == 0:
        interrupted(seconds)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGINT if ends else 1)


def test_a_time_limit_gives_the_signals_back():
    """NeMo's ends a fit without any other hook."""
    before = [signal.getsignal(number) for number in SIGNALS]
    callback = StopOnSignal(lambda: False)
    callback.on_train_start(None, None)
    callback.teardown(None, None, "fit")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_is_advised_may_be_learned_later(capfd):
    with pytest.raises(SystemExit), explained() as remedies:
        remedies.go_on = "Type this"
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "SIGINT has ended process 0 of 1 outside of training. Type this\n"
    with pytest.raises(RuntimeError, match=r"or use another folder \(output_dir\)\. Type that$"):
        with explained(Remedies("Type that", "output_dir")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/events")


def test_a_full_disk_is_told_with_a_remedy():
    with pytest.raises(
        RuntimeError, match=r"^process 0 of 1 could not go on: no space left.*\(/x/events\): free"
    ) as e:
        with explained():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/events")
    assert "resume_if_exists=true" in str(e.value) and isinstance(e.value.__cause__, OSError)
    with pytest.raises(FileNotFoundError), explained():
        open("/nowhere/at/all")


@pytest.mark.parametrize(
    "name, key",
    [
        ("/home/me/.cache/nemo_mtbi/x/y.flac", " (data.cache_dir)"),
        ("/home/me/.cache", " (data.cache_dir)"),  # it has to be made first
        ("/exp/tiny/events", " (exp_manager.exp_dir)"),
        ("/tmp/elsewhere", ""),
        (None, " (exp_manager.exp_dir)"),
    ],
)
def test_a_file_that_cant_be_written_is_told_with_the_key_of_its_folder(name, key):
    places = {"/home/me/.cache/nemo_mtbi": "data.cache_dir", "/exp/tiny": "exp_manager.exp_dir"}
    where = rf" \({name}\)" if name else ""
    remedy = re.escape(f", or use another folder{key}. Start again")
    with pytest.raises(
        RuntimeError, match=f"the file system is read-only{where}: have it mounted for writing{remedy}"
    ):
        with explained(Remedies(places=places)):
            try:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)  # as Path.mkdir does
            except FileNotFoundError:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)  # noqa: B904


def test_a_process_that_never_came_is_a_lost_one(monkeypatch):
    """The groups do not stand yet when the others have not arrived."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    error = dist.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined.")
    with pytest.raises(RuntimeError, match=r"lost another one.*\(Timed out after 21 seconds waiting for clients\)"):
        with explained():
            raise error


def test_where_the_transport_failed_in_its_source_is_left_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    text = "[/a/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9113: Connection reset by peer. This is typical"
    with pytest.raises(
        RuntimeError, match=r"dist_timeout \(Read error \[127.0.0.1\]:9113: Connection reset by peer\)"
    ):
        with explained():
            raise RuntimeError(text)


def late_process():
    """Worker: one process does not join a collective in time; the other one says so and what to do."""
    groups.initialize(ParallelConfig(2), timeout=3)
    started = time.monotonic()
    if dist.get_rank() == 0:
        with (
            pytest.raises(RuntimeError, match="process 0 of 2 has lost another one.*resume_if_exists=true"),
            explained(),
        ):
            dist.all_reduce(torch.zeros(1), group=groups.tensor_parallel_group())
        assert time.monotonic() - started < 10
    else:
        time.sleep(6)


@pytest.mark.slow
def test_a_process_that_is_late_ends_the_others(processes):
    processes(late_process)


def test_an_error_without_a_number_keeps_its_text():
    """Libraries raise them; the system has no text for ``None``."""
    assert Remedies().about(OSError("the disk is odd")) == "the disk is odd"
