# SPDX-License-Identifier: Apache-2.0
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.groups import ParallelConfig
from nemo_mtbi.parallel.stop import SIGNALS, StopOnSignal, explained


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
