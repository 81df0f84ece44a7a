# SPDX-License-Identifier: Apache-2.0
import io

import pytest
from rich.console import Console

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.rank_layout import RankPlace, rank_places
from nemo_mtbi.planning.layout_table import (
    MOST_ROWS,
    RankFacts,
    count_text,
    layout_table,
    own_facts,
    show_start,
    step_text,
)


def printed(content, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(content, highlight=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def facts_of(layout, world, layers=8):
    return [
        RankFacts(place, f"cuda:{place.rank % 8}", 7 if place.stage == 0 else 0, 10**6 * (place.stage + 1))
        for place in rank_places(layout, layers, world)
    ]


def test_one_process_is_one_line():
    fact = RankFacts(RankPlace(0, 0, 0, 0, ((0, 1, 2, 3),)), "host cpu", 608448, 4_555_232)
    lines = printed(layout_table([fact]))
    assert lines == ["one process: layers 0-3 on host cpu, 608k trained and 4.56M frozen parameters"]


def test_a_line_for_each_process():
    head, _, *lines = printed(layout_table(facts_of(ParallelConfig(2, 2, 2), 4)))
    assert head.split() == ["rank", "data", "tensor", "stage", "layers", "device", "trained", "frozen"]
    assert [line.split() for line in lines] == [
        ["0", "0", "0", "0", "0-1,", "4-5", "cuda:0", "7", "1M"],
        ["1", "0", "1", "0", "0-1,", "4-5", "cuda:1", "7", "1M"],
        ["2", "0", "0", "1", "2-3,", "6-7", "cuda:2", "0", "2M"],
        ["3", "0", "1", "1", "2-3,", "6-7", "cuda:3", "0", "2M"],
    ]


def test_many_processes_share_a_line_for_each_stage():
    head, _, *lines = printed(layout_table(facts_of(ParallelConfig(2, 4), 64)))
    assert 64 > MOST_ROWS and len(lines) == 4
    assert lines[1].split() == "16-31 0-7 0-1 1 2-3 cuda:0 … cuda:7 0 2M".split()


@pytest.mark.parametrize("width", [50, 60, 80, 120])
@pytest.mark.parametrize("world", [8, 64])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width, world):
    lines = printed(layout_table(facts_of(ParallelConfig(2, 4), world)), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("…") == (4 if world > MOST_ROWS else 0)  # from device to device: nothing is cut off
    assert "4M" in text


@pytest.mark.parametrize("number, text", [(0, "0"), (999, "999"), (1234, "1.23k"), (70_553_706_496, "70.6G")])
def test_numbers_are_short(number, text):
    assert count_text(number) == text


def test_sizes_of_a_step():
    assert step_text(1300, 1, 400) == "at most 1300 positions on 1 replica, in microbatches of at most 400"
    assert step_text(None, 2, 4) == "any number of positions on each of 2 replicas, in microbatches of at most 4"


def test_facts_of_this_process(speech_llm):
    groups.initialize()
    facts = own_facts(speech_llm)
    assert facts.place == RankPlace(0, 0, 0, 0, ((0, 1),)) and facts.device.endswith(" cpu")
    assert facts.trained == sum(value.numel() for value in speech_llm.connector.parameters())
    assert facts.trained + facts.frozen == sum(value.numel() for value in speech_llm.parameters())
    console = Console(file=io.StringIO(), width=200)
    show_start(speech_llm, console, 1300, 400)
    first, second = console.file.getvalue().splitlines()
    assert first.startswith("one process: layers 0-1 on ") and second.startswith("a step: at most 1300 positions")


def show_everywhere(folder):
    """Worker: only the first process prints, and it knows all of them."""
    from nemo_mtbi.config.connector import ConnectorConfig
    from nemo_mtbi.speech_llm.pretrained import load_speech_llm

    groups.initialize(ParallelConfig(1, 2))
    model, _ = load_speech_llm(f"{folder}/asr.nemo", f"{folder}/llm", ConnectorConfig(hidden_size=24))
    console = Console(file=io.StringIO(), width=200)
    show_start(model, console, 1300, 400)
    lines = [line for line in console.file.getvalue().splitlines() if line.strip()]
    if groups.pipeline_parallel_rank():
        assert not lines
    else:
        head, _, first, second, step = lines
        assert first.split()[:5] == ["0", "0", "0", "0", "0"] and second.split()[:5] == ["1", "0", "0", "1", "1"]
        trained = sum(value.numel() for value in model.connector.parameters())
        assert count_text(trained) in first and second.split()[-2] == "0"


@pytest.mark.slow
def test_the_first_process_prints_for_all(tmp_path, processes):
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

    tiny_text_llm(tmp_path / "llm")
    tiny_asr_nemo(tmp_path / "asr.nemo")
    processes(show_everywhere, tmp_path, timeout=120)
