# SPDX-License-Identifier: Apache-2.0
import json
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from nemo_mtbi.evaluation.charts import Point

PATH = Path(__file__).parents[2] / "scripts" / "experiments" / "tables.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(PATH))


def figure(value, deviation=None):
    return {"value": value, "low": value - 0.02, "high": value + 0.01, "seeds": {"deviation": deviation}}


def group(value):
    tasks = {"upper": {"agreement": figure(value - 0.1)}}
    return {
        "agreement": figure(value, 0.0125),
        "right": figure(value),
        "mean_kl": figure(0.5),
        "tasks": tasks,
        "metrics": {"wer": figure(0.04)},
    }


@pytest.fixture
def results():
    def systems(value):
        return {name: dict.fromkeys(("seen", "heldout_wordings", "heldout_tasks"), group(value)) for name in names}

    names = {"a-100": 4.0, "a-10": 0.4, "cascade": None}
    found = {"measure": "agreement", "group": "seen", "system": "a-10", "against": "a-100"}
    found |= {"low": -0.125, "high": 0.01, "difference": -0.1, "p": 0.001, "p_holm": 0.002}
    return {
        "systems": {name: {"kind": "speech", "hours": h, "line": name[:1], "seeds": 3} for name, h in names.items()},
        "sets": {
            "test": {"systems": systems(0.9), "comparisons": [found, {**found, "measure": "right"}]},
            "letters": {"systems": systems(0.8), "comparisons": []},
        },
    }


def test_a_cell_has_value_interval_and_spread(script):
    assert script["cell"](figure(0.9, 0.0125)) == "90.0 (88.0–91.0) ± 1.2"
    assert script["cell"](figure(0.5), share=False) == "0.500 (0.480–0.510)"
    assert script["cell"](None) == script["cell"]({"value": None}) == "–"


def test_tables(script, results):
    head, _, first, *_, last = script["systems_table"](results).splitlines()
    assert head.count("|") == first.count("|") == last.count("|")
    assert first.startswith("| a-100 | 3 | 90.0 (88.0–91.0) ± 1.2 |") and first.endswith("| `--only a-100` |")
    assert "| 80.0 (78.0–81.0) ± 1.2 |" in first and last.endswith("| any |")
    by_task = script["tasks_table"](results, ["a-100", "a-10"]).splitlines()
    assert by_task[2] == "| seen prompts | upper | 80.0 | 80.0 |" and by_task[-1].startswith(
        "| new family | upper | 70.0"
    )
    (only,) = script["comparisons_table"](results).splitlines()[2:]
    assert only == "| test | seen prompts | a-10 | a-100 | -10.0 (-12.5 to +1.0) | 0.0010 | 0.0020 |"


def test_what_each_llm_answers_to_text(script, results):
    results["systems"] |= {"text": {"kind": "text"}}
    for chosen in results["sets"].values():
        chosen["systems"]["text"] = {name: {"right": figure(0.75)} for name in chosen["systems"]["a-100"]}
    head, _, only = script["text_table"](results).splitlines()
    assert head == "| LLM | seen prompts | held-out wordings | held-out tasks | new family |"
    assert only == "| text " + "| 75.0 (73.0–76.0) " * 4 + "|"


def test_the_share_of_a_foreign_style(script, tmp_path):
    """Of four answers three open in it, one of them rightly; a system without such answers is not named."""
    answers = ["the answer is blue", "the answer is red", "the answer is blue or red", "blue"]
    groups = [("test", "seen"), ("test", "heldout_wordings"), ("test", "heldout_tasks"), ("letters", "heldout_tasks")]
    lines = [
        {"system": system, "set": key, "group": group, "reference": "blue", "answer": answer}
        for key, group in groups
        for system, said in (("a", answers), ("b", ["blue", "red"]))
        for answer in said
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, _, only = script["style_table"](tmp_path / "predictions.jsonl").splitlines()
    assert only == "| a " + "| 75.0, right 25.0 " * 4 + "|"


def test_curves_of_different_lengths_have_tables_of_their_own(script):
    curves = {"a": [Point(100, 0.5, 0.4, 0.6)], "b": [Point(100, 0.5), Point(200, 0.75)]}
    assert script["validation_table"](curves).splitlines() == [
        "| system | step 100 |",
        "|---|---|",
        "| a | 50.0 ± 10.0 |",
        "",
        "| system | step 100 | step 200 |",
        "|---|---|---|",
        "| b | 50.0 | 75.0 |",
    ]


def test_the_spread_is_whole_also_near_the_top(script, tmp_path, monkeypatch):
    """0.9, 1 and 1 deviate by 5.8 points: more than is left above their mean."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    curves = {"val_agreement": [[(99, 0.9)], [(99, 1.0)], [(99, 1.0)]]}
    monkeypatch.setitem(script["validation"].__globals__, "read_curves", lambda folders: curves)
    assert script["validation_table"](script["validation"](tmp_path)).endswith("| a | 96.7 ± 5.8 |")


def test_figures_are_svg_with_names_and_colors(script, results):
    svg = script["hours_chart"](results, "seen", ["a"])
    root = ET.fromstring(svg)
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a" and {"0.4", "4"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2 and "--c0:" in svg
    two = script["steps_chart"]({"a": [Point(1, 0.5)], "b": [Point(2, 0.75)]}, ["a", "b"])
    assert {"a", "b"} <= {node.text for node in ET.fromstring(two).iter("{http://www.w3.org/2000/svg}text")}
