# SPDX-License-Identifier: Apache-2.0
import io
import time

import pytest
import target_fakes as fakes
from rich.console import Console

from nemo_mtbi.io import heartbeat
from nemo_mtbi.targets.plan import plan_shard, rows_at_once
from nemo_mtbi.targets.progress import TargetsMeter


def test_a_log_gets_lines_while_the_first_batch_takes_long(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    console = Console(file=io.StringIO(), width=40)
    with TargetsMeter(100, True, console) as meter:
        meter.ask(32)
        time.sleep(0.2)
        before = console.file.getvalue()
        meter.advance(8.0, 32, 16.0)
        time.sleep(0.2)
    lines = console.file.getvalue().splitlines()
    assert before.count("\n") > 2 and "0/100 cuts, the LLM is at its first 32 rows, 0:00:00 so far" in before
    assert lines[-1].startswith("behavior targets · 8/100 cuts, 32 rows, 2.0 rows/s, 0:03:04 left")


def test_nothing_is_shown_where_nothing_is_wanted(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.01)
    console = Console(file=io.StringIO())
    with TargetsMeter(1, False, console) as meter:
        meter.advance(1.0, 1, 1.0)
        time.sleep(0.05)
    assert console.file.getvalue() == ""


def test_an_error_ends_the_lines():
    console = Console(file=io.StringIO())
    meter = TargetsMeter(1, True, console)
    with pytest.raises(KeyboardInterrupt), meter:
        raise KeyboardInterrupt
    assert not meter._heartbeat._thread.is_alive()


@pytest.mark.parametrize(("parameters", "rows"), [(2_000_000, 64), (135_000_000, 31), (1_700_000_000, 8), (0, 64)])
def test_a_larger_llm_answers_fewer_rows_at_once_on_a_cpu(parameters, rows):
    assert rows_at_once(parameters) == rows


@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
def test_batches_are_cut_and_keep_their_order(rows):
    cuts = list(fakes.make_cuts())
    requests, batches = plan_shard(cuts, fakes.PLAN, fakes.POOL, fakes.CHAT)
    same, cut = plan_shard(cuts, fakes.PLAN, fakes.POOL, fakes.CHAT, rows)
    assert same == requests and sum(cut, []) == sum(batches, []) and max(map(len, cut)) <= rows
    assert rows < 1000 or cut == batches


def test_a_kill_loses_one_batch_of_few_rows(tmp_path):
    whole = fakes.FakeLLM()
    fakes.generate(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        fakes.generate(tmp_path / "a", fakes.FakeLLM(fatal=5), batch_rows=1)
    llm = fakes.FakeLLM()
    fakes.generate(tmp_path / "a", llm, batch_rows=1)
    asked = sum(map(len, llm.batches))
    assert asked == sum(map(len, whole.batches)) - 5 and fakes.content(tmp_path / "a") == fakes.content(
        tmp_path / "whole"
    )


@pytest.mark.parametrize(("first", "second"), [(None, 1), (2, None), (2, 3)])
def test_a_shard_in_the_making_keeps_its_batches(tmp_path, first, second):
    """Whatever the machine or version that goes on would choose: other batches may round other answers."""
    whole = fakes.FakeLLM()
    fakes.generate(tmp_path / "whole", whole, batch_rows=first, shard_size=100)
    with pytest.raises(KeyboardInterrupt):
        fakes.generate(tmp_path / "a", fakes.FakeLLM(fatal=3), batch_rows=first, shard_size=100)
    llm = fakes.FakeLLM()
    fakes.generate(tmp_path / "a", llm, batch_rows=second, shard_size=100)
    assert llm.batches == whole.batches[3:] and fakes.content(tmp_path / "a") == fakes.content(tmp_path / "whole")
