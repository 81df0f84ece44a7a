# SPDX-License-Identifier: Apache-2.0
"""The console command ``mtbi``: one subcommand for each thing that the package does."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Sequence

import nemo_mtbi

COMMANDS = {  # in the order of a project; one line each
    "plan": "print what a training run would do and how much memory it would take",
    "convert": "convert an LLM between Hugging Face and Megatron",
    "align": "find when each word of a corpus is spoken",
    "targets": "let the text LLM answer the tasks about the transcripts of a corpus",
    "train": "train the connector; without arguments, the embedded demo",
    "transcribe": "prompt a trained model with audio files",
    "evaluate": "compare systems on held-out wordings, held-out tasks and benchmarks",
}
ARGPARSE_COMMANDS = ("convert", "align")  # modules of this folder; all others read a YAML and KEY=VALUE overrides

HELP = f"""\
usage: mtbi COMMAND [KEY=VALUE ...] [--config-name NAME] [--config-path DIR] [--help]

Multi-task behavior imitation with speech-text interleaving for NVIDIA NeMo.

commands:
{chr(10).join(f"  {name:<11} {summary}" for name, summary in COMMANDS.items())}

mtbi COMMAND --help explains a command and prints its keys; --cfg job prints the configuration that it would run with.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: arguments behind ``mtbi``; ``None``: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"mtbi {nemo_mtbi.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: {_unknown(name)}", file=sys.stderr)
        return 2
    if name in ARGPARSE_COMMANDS:
        status: int = importlib.import_module(f"nemo_mtbi.commands.{name}").main(rest, f"mtbi {name}")
        return status
    _run(name, rest)
    return 0


def _unknown(name: str) -> str:
    """Return the message for an unknown command, with the nearest known one."""
    near = difflib.get_close_matches(name.removeprefix("mtbi_"), COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}"
    return f"unknown command {name!r}: {hint}"


def _run(name: str, arguments: Sequence[str]) -> None:
    """Run a command that Hydra configures."""
    from omegaconf import DictConfig

    from nemo_mtbi.commands.cli import hydra_main
    from nemo_mtbi.commands.hydra_commands import HYDRA_COMMANDS, config_folder

    command, whole = HYDRA_COMMANDS[name], list(sys.argv)

    def task(cfg: DictConfig) -> None:
        sys.argv = whole  # Lightning starts the other processes of this machine with the same command line
        command.run(cfg)

    description = inspect.cleandoc(command.run.__doc__ or "")
    sys.argv = [f"mtbi {name}", *arguments, *command.overrides]  # which Hydra and NeMo parse
    hydra_main(command.config_name, config_folder(), command.schema, description)(task)()


if __name__ == "__main__":
    sys.exit(main())
