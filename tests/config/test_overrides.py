# SPDX-License-Identifier: Apache-2.0
"""Values on the command line."""

import logging
import re
import shlex
from dataclasses import dataclass, field

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_mtbi.commands.cli import hydra_main
from nemo_mtbi.config.overrides import keep_text, read_overrides


@dataclass
class Inner:
    line: str | None = None
    hours: float | None = None


@dataclass
class Schema:
    prompt: str | None = None
    audio: list[str] | None = None
    size: int = 3
    systems: dict[str, Inner] = field(default_factory=dict)
    inner: Inner | None = None


def hydra(text):
    return OverridesParser.create().parse_override(text).value()


def kept(*given):
    changed = keep_text(read_overrides(given), Schema)
    return [hydra(changed.get(text, text)) for text in given]


TEXTS = (
    "what's this?",
    "a=b",
    "stop!",
    "who, and where?",
    "これは何ですか",
    "où est-ce ?",
    "[laughs] what?",
    "(a) or (b)",
    'say "it"',
    'it\'s "both" \\',
    "a; b #1 <c>",
)


@pytest.mark.parametrize("value", TEXTS)
def test_the_message_quotes_what_cannot_be_read(value):
    with pytest.raises(ValueError, match="quote the value twice.*prompts_file=FILE") as error:
        read_overrides([f"prompt={value}"])
    (advice,) = re.findall(r"for the shell: (.*?)(?:; a list stands.*)?; or write it", str(error.value), re.DOTALL)
    (typed,) = shlex.split(advice)  # what a shell makes of it
    assert typed.startswith("prompt=") and hydra(typed) == value


@pytest.mark.parametrize(
    "text, advice",
    [("audio=a.wav,b.flac", 'audio=["a.wav","b.flac"]'), ("audio=[aé.wav, b.wav]", 'audio=["aé.wav","b.wav"]')],
)
def test_lists_are_quoted_item_by_item(text, advice):
    with pytest.raises(ValueError, match=re.escape(advice)):
        read_overrides([text])
    assert hydra(advice) in (["a.wav", "b.flac"], ["aé.wav", "b.wav"])


def test_several_values_are_legal_where_many_runs_are_asked_for():
    assert list(read_overrides(["size=1,2"], multirun=True)) == ["size=1,2"]


@pytest.mark.parametrize("value", ["1e5", "true", "1_000", "-0.50", "nan", "007", "False", "inf", "12"])
def test_text_stays_what_was_typed(value):
    assert kept(f"prompt={value}", f"+systems.a.line={value}", f"inner.line={value}") == [value] * 3


def test_numbers_null_and_quoted_text_stay_too():
    given = (
        "size=5",
        "systems.a.hours=1e5",
        "prompt=null",
        "prompt='1e5'",
        "other.prompt=5",
        "size.prompt=1",
        "~prompt",
    )
    assert keep_text(read_overrides(given), Schema) == {}
    assert kept("prompt=null") == [None]


def test_names_of_files_in_a_list_stay_text():
    assert kept("audio=[1e5,007.wav,'a, b', 3]", "audio=2024") == [["1e5", "007.wav", "a, b", "3"], ["2024"]]


@pytest.mark.parametrize("value", ["[laughs]", "{a: 1}"])
def test_brackets_around_a_text_are_told(value):
    with pytest.raises(ValueError, match="quote the value twice"):
        keep_text(read_overrides([f"prompt={value}"]), Schema)


def test_the_commands_say_which_of_their_keys_are_text():
    from nemo_mtbi.commands.hydra_commands import HYDRA_COMMANDS

    keys = ("prompt", "title", "output_dir", "systems.a.line", "model.chat.system", "name", "exp_manager.name")
    found = {}
    for name in ("transcribe", "evaluate", "targets", "train"):
        schema = HYDRA_COMMANDS[name].schema()
        found[name] = [key for key in keys if keep_text(read_overrides([f"{key}=5"]), schema)]
    assert found == {
        "transcribe": ["prompt"],
        "evaluate": ["title", "output_dir", "systems.a.line"],
        "targets": ["output_dir"],
        "train": ["model.chat.system", "name", "exp_manager.name"],
    }


@pytest.fixture
def logging_as_it_was():
    """Hydra sets the handlers of the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_script_gets_text_as_it_was_typed(tmp_path, monkeypatch, capsys, logging_as_it_was):
    (tmp_path / "thing.yaml").write_text("prompt: null\nsize: 3\naudio: null\n")
    monkeypatch.chdir(tmp_path)
    seen = []
    main = hydra_main(config_name="thing", config_path=tmp_path, schema=lambda: Schema)(seen.append)
    monkeypatch.setattr("sys.argv", ["script.py", "prompt=1e5", "size=1e5", "audio=[1,2.50]"])
    main()
    assert seen == [{"prompt": "1e5", "size": 1e5, "audio": ["1", "2.50"]}]
    monkeypatch.setattr("sys.argv", ["script.py", "prompt=what's this?"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and len(seen) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: \"prompt=what's this?\" can't be read")
