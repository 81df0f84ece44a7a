# SPDX-License-Identifier: Apache-2.0
"""The pages: their links lead somewhere, and every command that they show is one that the commands take."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_mtbi.commands import align, convert, mtbi
from nemo_mtbi.commands.hydra_commands import HYDRA_COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = {
    "examples/mtbi_train.py": "train",
    "examples/mtbi_generate_targets.py": "targets",
    "examples/mtbi_transcribe.py": "transcribe",
    "examples/mtbi_eval.py": "evaluate",
    "scripts/align.py": "align",
    "scripts/convert_hf.py": "convert",
}


def shown(page):
    """Command lines of the shell blocks of a page, as words without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ours(words):
    """The name of our command and its arguments; ``None`` for other programs."""
    for number, word in enumerate(words):
        if word in SCRIPTS:
            return SCRIPTS[word], words[number + 1 :]
    return (words[1], words[2:]) if words[0] == "mtbi" else None


COMMANDS = [(page.name, *command) for page in PAGES for words in shown(page) if (command := ours(words))]


@pytest.mark.parametrize(("page", "name", "arguments"), COMMANDS)
def test_a_command_that_is_shown_is_taken(page, name, arguments):
    assert name in mtbi.COMMANDS
    if name == "align":
        align.parse_arguments(arguments)
    elif name == "convert":
        convert.parse_arguments(arguments)
    else:
        command = HYDRA_COMMANDS[name]
        overrides, config = list(arguments), command.config_name
        if "--config-name" in overrides:
            place = overrides.index("--config-name")
            _, config = overrides.pop(place), overrides.pop(place)
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            assert compose(config, overrides=overrides)


def test_every_command_is_shown():
    assert {name for _, name, _ in COMMANDS} >= set(mtbi.COMMANDS) - {"plan"}
    assert "`mtbi plan`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
