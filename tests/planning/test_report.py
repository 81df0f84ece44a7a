# SPDX-License-Identifier: Apache-2.0
import io
import re

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from nemo_mtbi.planning.build import make_plan
from nemo_mtbi.planning.plan import Plan
from nemo_mtbi.planning.report import show_plan, size_text


@pytest.fixture
def shown(model_section, monkeypatch):
    """``shown(width, trainer={}, **model)``: the lines of the plan of the tiny model."""
    monkeypatch.delenv("RANK", raising=False)

    def run(width, trainer=None, **model):
        cfg = {"model": model_section(**model), "trainer": {"devices": 1, "accelerator": "cpu", **(trainer or {})}}
        console = Console(file=io.StringIO(), width=width)
        show_plan(make_plan(OmegaConf.create(cfg), environ={}), console)
        return console.file.getvalue().splitlines()

    return run


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_it_fits_any_terminal(width, shown):
    keys = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    lines = shown(width, {"devices": 4}, **keys)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    text = " ".join(" ".join(lines).split())
    for part in ("4 processes; a replica of the model is tensor 2 x pipeline 2", "arXiv 2205.05198", "stage 1"):
        assert part in text
    assert "steps per epoch · 2" in text and text.endswith("nothing of this would be refused")


def test_the_arithmetic_that_is_shown_gives_what_is_shown(shown):
    pattern = re.compile(r"^  .*?: (\d.*) B(?: / (\d+))? = ([\d.]+) (B|KiB|MiB|GiB)$")
    found = [
        match.groups()
        for match in map(pattern.match, shown(200, {"devices": 2}, tensor_model_parallel_size=2))
        if match
    ]
    assert len(found) > 10
    for product, share, value, unit in found:
        size = 1
        for factor in product.split(" x "):
            size *= int(factor.split()[0])
        assert size_text(size // int(share or 1)) == f"{value} {unit}"


def test_what_is_refused_is_said_and_nothing_is_called_ready(shown):
    lines = shown(200, {"devices": 3}, tensor_model_parallel_size=4)
    assert sum(line.startswith("refused · ") for line in lines) == 2
    assert not any("ready" in line for line in lines)


def test_a_run_that_prepares_data_says_so_before_it_is_called_ready():
    console = Console(file=io.StringIO(), width=200)
    show_plan(Plan(preparation=["24,000 questions are put to the LLM"]), console)
    *_, made, ready = console.file.getvalue().splitlines()
    assert made == "before training · 24,000 questions are put to the LLM"
    assert ready.startswith("ready · nothing of this would be refused; what stands under 'before training'")


def test_only_the_first_process_prints(shown, monkeypatch):
    assert shown(80)
    monkeypatch.setenv("RANK", "1")
    assert shown(80) == []


@pytest.mark.parametrize("size, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 * 2**30, "5.00 GiB")])
def test_sizes_for_people(size, text):
    assert size_text(size) == text
