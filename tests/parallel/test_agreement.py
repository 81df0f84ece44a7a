# SPDX-License-Identifier: Apache-2.0
"""What fails in one process is the same error in all."""

import pytest
import torch.distributed as dist

from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.agreement import agreed, together


def raise_in(ranks, error):
    """An action that fails in some processes."""

    def action():
        if dist.get_rank() in ranks:
            raise error
        return dist.get_rank()

    return action


def agree_job():
    groups.initialize(timeout=60)
    assert together("x", dist.get_rank) == [0, 1, 2]
    assert together("x", lambda: None) == [None, None, None]
    for ranks, error, expected in (
        ([1], OSError("disk"), (RuntimeError, "x: disk [process 1]")),
        ([0], ValueError("key"), (ValueError, "x: key [process 0]")),
        ([1, 2], KeyError(), (RuntimeError, "x: KeyError [process 1]")),
        ([0, 1, 2], ValueError("all"), (ValueError, "x: all [process 0]")),
    ):
        with pytest.raises(expected[0]) as caught:
            together("x", raise_in(ranks, error))
        assert type(caught.value) is expected[0] and str(caught.value) == expected[1]
        assert caught.value.__cause__ is (error if dist.get_rank() in ranks else None)
    with pytest.raises(RuntimeError, match="x: told: OSError"):
        together("x", raise_in([2], OSError()), lambda error: f"told: {type(error).__name__}")


def test_all_processes_have_what_each_has_got_or_the_same_error(processes):
    processes(agree_job, count=3)


def lost_job():
    groups.initialize(timeout=60)
    if dist.get_rank() == 1:
        groups.shut_down()  # closes its connections, as a process does that dies
        return
    with pytest.raises(RuntimeError) as caught:
        together("x", raise_in([0], OSError("mine")))
    assert str(caught.value) == "x: mine"  # it can't tell the other, but it tells its own reason


def test_a_process_that_is_gone_does_not_hide_the_reason(processes):
    processes(lost_job, count=2)


def test_an_error_in_a_single_process_stays_what_it_is():
    class Own(ValueError):
        pass

    error = Own("why")

    def work():
        raise error

    assert agreed(lambda: 7) == 7
    with pytest.raises(Own) as raised:
        agreed(work)
    assert raised.value is error
