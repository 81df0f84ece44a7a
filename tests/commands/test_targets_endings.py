# SPDX-License-Identifier: Apache-2.0
"""How a run that makes targets ends early: Ctrl-C, another run in its folder, a process that is lost."""

import gzip
import os
import signal
import time

import pytest
import torch.distributed as dist
import yaml

from nemo_mtbi.commands.targets import run
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.inference import follow
from nemo_mtbi.parallel import groups, peers
from nemo_mtbi.parallel.peers import Peer
from nemo_mtbi.parallel.stop import explained
from nemo_mtbi.targets.store import own_share
from nemo_mtbi.testing import tiny_cuts


@pytest.fixture
def config(llm_dir, tmp_path):
    """``config(folder)``: a run that makes four shards of two cuts."""
    tasks = [{"name": "repeat", "scoring": "wer", "split": "train", "prompts": {"train": ["say it"]}}]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    cuts = tiny_cuts(tmp_path / "cuts", 8, behaviors=False)
    section = {"pretrained_llm": str(llm_dir), "tasks": str(tmp_path / "tasks.yaml"), "cuts_path": str(cuts)}
    section |= {"shard_size": 2, "generation": {"max_new_tokens": 4}, "cuda": -1}
    return lambda folder: {**section, "output_dir": str(folder)}


def content(report):
    with gzip.open(report.train_on.removeprefix("cuts_path=")) as file:
        return file.read()


def test_an_interrupted_run_says_how_to_go_on_and_does(config, tmp_path, monkeypatch, capfd):
    expected = content(run(config(tmp_path / "whole"), progress=False))
    ask, asked = follow.Leader.layouts, []

    def interrupted(leader, layouts):
        asked.append(layouts)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return ask(leader, layouts)

    monkeypatch.setattr(follow.Leader, "layouts", interrupted)
    with pytest.raises(SystemExit) as caught:
        run(config(tmp_path / "x"), progress=False)
    assert caught.value.code == 130
    assert capfd.readouterr().err.endswith(
        "SIGINT has ended process 0 of 1 while it made targets. What was finished is kept: start the same command "
        "again to go on\n"
    )
    report = run(config(tmp_path / "x"), progress=False)
    assert report.counts["reused_shards"] == 2 and content(report) == expected


def test_a_second_run_of_the_same_share_is_refused(config, tmp_path):
    with own_share(tmp_path / "x"):
        with pytest.raises(RuntimeError, match=rf"output_dir={tmp_path}/x is being written by another run"):
            run(config(tmp_path / "x"), progress=False)
    run(config(tmp_path / "x"), progress=False)


def ended_child():
    child = os.fork()
    if child == 0:
        os._exit(0)
    while not Peer(Peer.here().machine, child).has_ended():  # nobody has asked for its status yet
        time.sleep(0.01)
    return child


def test_a_process_that_has_ended_is_known_by_its_number(monkeypatch):
    machine, me = Peer.here().machine, os.getpid()
    child = ended_child()
    monkeypatch.setattr(peers, "_peers", [Peer(machine, me), Peer(machine, child), Peer("elsewhere", child)])
    assert peers.ended() == [1]
    os.waitpid(child, 0)
    assert peers.ended() == [1]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"lost another one.*\(Connection closed by peer.*\): process 1 has ended\."
    ):
        with explained():
            raise RuntimeError("[/a/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:9113")


def test_targets_that_a_lost_process_should_have_made_are_an_error(config, tmp_path, monkeypatch):
    groups.initialize()
    child = ended_child()
    os.waitpid(child, 0)
    monkeypatch.setattr(groups, "data_parallel_size", lambda: 2)  # this is the first of two replicas
    monkeypatch.setattr(peers, "_peers", [Peer.here(), Peer.here()])
    assert "2 of 4 shards are missing" in run(config(tmp_path / "x"), progress=False).waiting
    monkeypatch.setattr(peers, "_peers", [Peer.here(), Peer(Peer.here().machine, child)])
    with pytest.raises(RuntimeError, match="process 1 has ended before its targets were made: .*2 of 4 shards are"):
        run(config(tmp_path / "x"), progress=False)


def failing():
    """Worker: the leader of a replica fails between two batches, and the other process fails with it."""
    groups.initialize(ParallelConfig(2), 60)
    if groups.is_reader():
        with pytest.raises(OSError, match="no space"), follow.Leader(None):
            raise OSError("no space")
    else:
        with pytest.raises(RuntimeError, match="first process of this model replica failed: OSError: no space"):
            follow.follow(None)


@pytest.mark.slow
def test_processes_that_follow_fail_with_their_leader(processes):
    processes(failing)
