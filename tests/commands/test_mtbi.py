# SPDX-License-Identifier: Apache-2.0
"""The console command: what it lists, what it refuses, and that it is the same as the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nemo_mtbi
from nemo_mtbi.commands import mtbi
from nemo_mtbi.commands.hydra_commands import HYDRA_COMMANDS, config_folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "train": "examples/mtbi_train.py",
    "targets": "examples/mtbi_generate_targets.py",
    "transcribe": "examples/mtbi_transcribe.py",
    "evaluate": "examples/mtbi_eval.py",
    "align": "scripts/align.py",
    "convert": "scripts/convert_hf.py",
}
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(['torch', 'nemo', 'lhotse', 'lightning', 'numpy'])); "


def run(*words, cwd):
    """Runs a command line in a process of its own, where heavy modules can't be imported."""
    code = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", BLOCKED + code, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


def test_the_commands_are_listed_with_a_line_each(capsys):
    assert mtbi.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = lines[lines.index("commands:") + 1 : lines.index("", lines.index("commands:"))]
    assert [line.split()[0] for line in listed] == list(mtbi.COMMANDS)
    assert {*HYDRA_COMMANDS, *mtbi.ARGPARSE_COMMANDS} == set(mtbi.COMMANDS) == {*SCRIPTS, "plan"}


def test_without_a_command_it_lists_them_and_fails(capsys):
    assert mtbi.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_the_version(capsys):
    assert mtbi.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mtbi {nemo_mtbi.__version__}\n"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("eval", "did you mean 'evaluate'?"),
        ("mtbi_train", "did you mean 'train'?"),
        ("generate_targets", "did you mean 'targets'?"),
        ("xyz", "known are plan, convert, align, targets, train, transcribe, evaluate"),
    ],
)
def test_an_unknown_command_names_the_nearest(given, hint, capsys):
    assert mtbi.main([given]) == 2
    assert capsys.readouterr().err == f"error: unknown command {given!r}: {hint}\n"


def test_the_configurations_of_the_repository_are_used_in_place():
    assert config_folder() == ROOT / "conf"
    for command in HYDRA_COMMANDS.values():
        assert (config_folder() / f"{command.config_name}.yaml").is_file()


def test_help_and_configuration_are_shown_in_an_empty_folder_without_torch(tmp_path):
    code = "import json, sys\nfrom nemo_mtbi.commands.mtbi import main\n"
    lines = [
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        for name in mtbi.COMMANDS
    ]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + "\n" + code + "".join(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for name in mtbi.COMMANDS:
        assert f"  mtbi {name}" in done.stdout, "an example of each command"
    assert done.stdout.count("Each key is explained in ") == len(HYDRA_COMMANDS)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name in HYDRA_COMMANDS])
def test_a_command_composes_the_configuration_of_its_script(name, tmp_path):
    keys = ["--cfg", "job", "cuda=3"] if name != "train" else ["--cfg", "job", "trainer.max_steps=20"]
    ours = run(str(ROOT / "nemo_mtbi" / "commands" / "mtbi.py"), name, *keys, cwd=tmp_path)
    theirs = run(str(ROOT / SCRIPTS[name]), *keys, cwd=tmp_path)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout
    assert yaml.safe_load(ours.stdout)


def test_plan_is_training_with_one_key_more(tmp_path):
    script = str(ROOT / "nemo_mtbi" / "commands" / "mtbi.py")
    ours = run(script, "plan", "--cfg", "job", "plan=false", cwd=tmp_path)
    assert yaml.safe_load(ours.stdout)["plan"] is True


def test_a_relative_config_path_is_that_of_the_working_directory(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text("size: 3\n")
    script = str(ROOT / "nemo_mtbi" / "commands" / "mtbi.py")
    done = run(script, "train", "--config-path", "mine", "--config-name=small", "--cfg=job", "size=4", cwd=tmp_path)
    assert done.stdout == "size: 4\n", done.stderr
    done = run(script, "train", "--config-path=none", "--cfg=job", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: --config-path=none is not a folder: give a path that exists below {tmp_path}\n"


@pytest.mark.parametrize("name", mtbi.ARGPARSE_COMMANDS)
def test_a_command_with_options_has_those_of_its_script(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        mtbi.main([name, "--help"])
    assert end.value.code == 0
    ours = capsys.readouterr().out
    theirs = run(str(ROOT / SCRIPTS[name]), "--help", cwd=tmp_path).stdout
    assert ours.startswith(f"usage: mtbi {name} ")
    assert options(ours) == options(theirs) != set()


def options(text):
    return {word.strip(",]}") for word in text.split() if word.startswith(("--", "to-"))}


def test_the_task_sees_the_whole_command_line(monkeypatch, tmp_path):
    """Lightning starts the other processes of a machine with it."""
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/bin/mtbi", "train", "a=1"])

    def hydra_main(config_name, config_path, schema, description):
        seen.append((config_name, list(sys.argv)))
        assert description.startswith("Trains the connector")
        return lambda task: lambda: task({"name": "x"})

    command = HYDRA_COMMANDS["train"]
    monkeypatch.setattr("nemo_mtbi.commands.cli.hydra_main", hydra_main)
    monkeypatch.setitem(HYDRA_COMMANDS, "train", type(command)(**{**vars(command), "run": _documented(seen)}))
    assert mtbi.main() == 0
    assert json.dumps(seen) == json.dumps([("mtbi_demo", ["mtbi train", "a=1"]), ["/bin/mtbi", "train", "a=1"]])


def _documented(seen):
    def task(cfg):
        """Trains the connector."""
        seen.append(list(sys.argv))

    return task
