# SPDX-License-Identifier: Apache-2.0
import gzip
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from lhotse import CutSet, MonoCut
from omegaconf import OmegaConf

from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.evaluation.settings import parse_eval_config

PATH = Path(__file__).parents[2] / "scripts" / "experiments" / "generalization.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(PATH.parent))
    try:
        import side_by_side

        return {**vars(side_by_side), **runpy.run_path(str(PATH))}
    finally:
        sys.path.remove(str(PATH.parent))


def test_the_plan(script):
    found = script["runs"]()
    assert len(found) == len(set(found)) == 8 * 5 + 3 * 4 * 3 + (4 + 3 + 1 + 1 + 1) * 3
    assert [run.seed for run in found] == sorted(run.seed for run in found)
    assert {path.stem for path in (PATH.parents[2] / "conf" / "rival").glob("*.yaml")} == {
        run.line.partition("+")[0] for run in found
    }
    assert {run.system for run in script["runs"]("continuation-1")} == {"continuation-10", "continuation-100"}
    assert {run.system for run in script["runs"]("mtbi_kl")} == {"mtbi_kl-100"}
    assert {run.system for run in script["runs"]("+long")} == {
        f"{rival}+long-100" for rival in ("mtbi", "imitation", "transcription_sft")
    }
    (run,) = [run for run in script["runs"]("+long") if run.name == "seed0" and run.line.startswith("mtbi")]
    command = run.command(Path("out"), [])  # the last of two that name a key counts
    assert command.index("trainer.max_steps=1100") > command.index("trainer.max_steps=400")


def test_commands_can_be_read_by_the_example(script, tmp_path):
    shown = subprocess.run(
        [sys.executable, str(PATH), "--out", str(tmp_path), "--only", "continuation-10", "--dry-run", "seed=9"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(shown) == 3 and shown[0].endswith("seed=9")  # and not continuation-100
    assert "data.train_utterances=300 " in shown[0] and " name=seed0 seed=0 " in shown[0]
    assert " +rival=continuation seed=9" in shown[0]


def test_what_is_finished_is_not_repeated_and_what_fails_is_told(script, tmp_path, monkeypatch, capsys):
    first, second, third, fourth = script["runs"]("mtbi_kl")[:4]
    (first.folder(tmp_path)).mkdir(parents=True)
    first.nemo(tmp_path).touch()
    writes = f"import pathlib; pathlib.Path(r'{second.nemo(tmp_path)}').touch(); print('well')"
    second.folder(tmp_path).mkdir(parents=True)
    commands = {
        second: [sys.executable, "-c", writes],
        third: [sys.executable, "-c", "print('why'); raise SystemExit(3)"],
        fourth: [sys.executable, "-c", "print('stopped by a signal')"],
    }
    monkeypatch.setattr(type(first), "command", lambda run, out, extra: commands[run])
    failed = script["train_all"]([first, second, third, fourth], tmp_path, 2, [])
    assert [job.name for job in failed] == ["mtbi_kl-100 seed2", "mtbi_kl-100 seed3"]
    assert (tmp_path / "logs" / "mtbi_kl-100-seed1.txt").read_text() == "well\n"
    assert (tmp_path / "logs" / "mtbi_kl-100-seed2.txt").read_text() == "why\n"
    said = capsys.readouterr().out
    assert "1 of 4 trainings are finished" in said and "seed2 FAILED, see" in said


def test_the_evaluation_has_a_system_for_each_amount(script, tmp_path):
    cuts = tmp_path / "cache" / "synthetic-test-1" / "cuts.jsonl.gz"
    cuts.parent.mkdir(parents=True)
    cuts.write_bytes(gzip.compress(b""))
    for run in script["runs"]():
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        run.nemo(tmp_path).touch()
    found = script["evaluation"](tmp_path, script["runs"](), 4.0)
    assert parse_eval_config(found).compare_with == "mtbi-100"  # as examples/mtbi_eval.py reads it
    assert list(found["systems"])[:2] == ["mtbi-100", "mtbi_kl-100"] and found["compare_with"] == "mtbi-100"
    assert len(found["systems"]) == 8 + 3 * 4 + 2 + 2 * (4 + 1) + 3 + 1 + 1
    parts = script["parts_of"](found)
    assert set(parts) == {name for name in found["systems"] if not name.startswith("text")}
    for name, part in parts.items():
        family = {name, "text", *([f"text of {name}"] if "+lora" in name else [])}
        assert set(parse_eval_config(part).systems) == family and part["sets"] == found["sets"]
    assert found["sets"]["letters"]["only"] == ["spell"] and len(found["sets"]["test"]["only"]) == 25
    assert "spell" not in found["sets"]["test"]["only"]
    system = found["systems"]["continuation-30"]
    assert (system["hours"], system["line"], len(system["nemo"])) == (1.2, "continuation", 3)
    assert system["nemo"][1] == str(tmp_path / "runs" / "continuation-30" / "seed1" / "seed1.nemo")


def sibling(name):
    """Another experiment's script."""
    sys.path.insert(0, str(PATH.parent))
    try:
        return runpy.run_path(str(PATH.with_name(name)))
    finally:
        sys.path.remove(str(PATH.parent))


def test_connectors_are_compared_at_one_rate(tmp_path):
    from nemo_mtbi.config.checks import choices
    from nemo_mtbi.config.connector import ConnectorConfig

    connectors = sibling("connectors.py")
    found = connectors["runs"]()
    kinds = choices(ConnectorConfig, "kind")
    assert {run.line for run in found} == set(kinds) and len(found) == 3 * len(kinds)
    (run,) = [run for run in connectors["runs"]("cif") if run.seed == 0]
    assert "model.connector.kind=cif" in run.command(tmp_path, []) and run.system == "cif-100"


def test_ways_of_interleaving_are_compared_on_a_tenth_of_the_speech(tmp_path):
    """Each way is a configuration that the example accepts."""
    interleaving = sibling("interleaving.py")
    found = interleaving["runs"]()
    assert len(found) == 21 and {run.percent for run in found} == {10}
    with initialize_config_dir(str(PATH.parents[2] / "conf"), version_base=None):
        demo = compose("mtbi_demo")
    OmegaConf.set_struct(demo, False)
    ways = {}
    for name, keys in interleaving["KEYS"].items():
        changed = OmegaConf.merge(demo, OmegaConf.from_dotlist(list(keys)))
        ways[name] = parse_model_config(changed.model).interleave
    assert ways["never"] is None and ways["schedule"].schedule.text_share == 0.9
    assert len({repr(way) for way in ways.values()}) == len(ways)  # no two are the same


def test_hours_are_those_of_all_the_speech(script, tmp_path):
    """Also where only a part of it was made: 3 utterances of 3000 last 9 s in all."""
    folder = tmp_path / "cache" / "synthetic-train-0"
    folder.mkdir(parents=True)
    cuts = [MonoCut(str(n), 0, n + 2.0, 0) for n in range(3)]
    CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl.gz")
    assert script["hours_of_speech"](tmp_path) == pytest.approx(3.0 * 3000 / 3600)
