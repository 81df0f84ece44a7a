# SPDX-License-Identifier: Apache-2.0
"""Comments of the configurations: what they cite exists, and what they list is what the code knows."""

import re
from pathlib import Path

import pytest
import yaml

from nemo_mtbi.config.checks import choices
from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.interleave import InterleaveConfig
from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.evaluation.settings import SystemConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("conf/**/*.yaml"))
BASE = {"pretrained_asr": "demo", "pretrained_llm": "demo"}


def together(*names: str) -> str:
    """The text of several configurations of ``conf/``."""
    return "\n".join((ROOT / "conf" / f"{name}.yaml").read_text(encoding="utf-8") for name in names)


def comment(text: str, key: str) -> str:
    """A key's line with the comment lines that follow it."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(rf" +{key}", line))
    end = next(number for number in range(start + 1, len(lines)) if not lines[number].strip().startswith("#"))
    return "\n".join(lines[start:end])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_sections_that_are_cited_exist(path):
    text = path.read_text(encoding="utf-8")
    for page, section in re.findall(r'([\w/]+\.md)[^"\n]*"([^"]+)"', text):
        assert section in re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"(?:scripts|examples|nemo_mtbi|conf|docs)/[\w./]+\.(?:py|sh|yaml|md)", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("line", "section", "name"),
    [
        ("kind: conv", ConnectorConfig, "kind"),
        ("unit:", InterleaveConfig, "unit"),
        ("first:", InterleaveConfig, "first"),
        ("level:", InterleaveConfig, "level"),
        ("divergence:", LossConfig, "divergence"),
    ],
)
def test_choices_are_all_named(line, section, name):
    text = comment(together("mtbi_demo", "mtbi_base"), line)
    assert [choice for choice in choices(section, name) if not re.search(rf"\b{choice}\b", text)] == []


def test_kinds_of_systems_are_all_shown():
    systems = yaml.safe_load((ROOT / "conf" / "mtbi_eval.yaml").read_text(encoding="utf-8"))["systems"]
    assert {system["kind"] for system in systems.values()} == set(choices(SystemConfig, "kind"))


@pytest.mark.parametrize("name", ["mtbi_demo", "mtbi_large"])
@pytest.mark.parametrize("key", ["encoder", "chat", "llm", "lora"])
def test_sections_that_are_shown_in_comments_are_legal(name, key):
    text = comment(together(name, "mtbi_base"), f"{key}: null")
    for shown in re.findall(r"\{(?:[^{}]|\{[^{}]*\})*\}", text):
        parse_model_config({**BASE, key: yaml.safe_load(shown)})
