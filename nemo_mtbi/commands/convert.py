# SPDX-License-Identifier: Apache-2.0
"""Converts LLMs between Hugging Face and Megatron; memory holds at most one shard at a time.

  mtbi convert to-megatron Qwen2.5-7B-Instruct qwen2.5-7b    # for model.pretrained_llm=qwen2.5-7b
  mtbi convert to-hf qwen2.5-7b Qwen2.5-7B-again

(python scripts/convert_hf.py in a clone.) Megatron's form is a folder with llm.yaml, the tokenizer, and weights/, a
distributed checkpoint that loads at any tensor and pipeline parallel size. A Hugging Face directory can also be given
as model.pretrained_llm as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_mtbi.io.display import printable

if TYPE_CHECKING:
    from nemo_mtbi.llm.weights import WeightSource


def parse_arguments(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Return the options of a command line; ``None``: that of this process."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    forth = commands.add_parser("to-megatron", help="from Hugging Face")
    back = commands.add_parser("to-hf", help="to Hugging Face")
    for command in (forth, back):
        command.add_argument("source", type=Path, help="directory of the LLM")
        command.add_argument("out", type=Path, help="new directory")
        command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file (%(default)s)")
    forth.add_argument("--chat-format", metavar="NAME", help="NeMo's name, such as llama3; by default the template")
    forth.add_argument("--system", metavar="TEXT", help="system prompt; by default the template's own")
    back.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config.json to write; by default that of the directory, or one of its llm.yaml",
    )
    arguments = parser.parse_args(argv)
    if not arguments.shard_gb > 0:
        parser.error(f"--shard-gb must be above 0, got {arguments.shard_gb}")
    return arguments


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes, print the peak of memory at the end, and yield a function that advances the bar."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from nemo_mtbi.io.heartbeat import Heartbeat, bar_text

    with (
        Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar,
        Heartbeat(lambda: bar_text(bar), bar.console),
    ):
        task = bar.add_task("bytes of weights", total=total)
        yield lambda n: bar.advance(task, n)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def size_of(source: WeightSource) -> int:
    """Return the bytes of all weights."""
    first = {name: source.rows(name, 0, 0, 1).dtype.itemsize for name in source.names()}
    return sum(math.prod(source.shape(name)) * size for name, size in first.items())


def spare_the_source(arguments: argparse.Namespace) -> None:
    """Refuse a new folder whose making would replace what is read."""
    from nemo_mtbi.io.paths import refuse_overwriting

    out, config = arguments.out, getattr(arguments, "config", None)
    source = sorted(arguments.source.iterdir()) if arguments.source.is_dir() else []  # a new folder in it is legal
    inputs = {"source": source, "--config": [config] if config else []}
    refuse_overwriting(inputs, {"out": [out, out.with_name(f"{out.name}.partial")]})


def to_megatron(arguments: argparse.Namespace) -> None:
    """Write a Hugging Face directory as a text LLM directory with a distributed checkpoint of Megatron.

    Raises:
        ValueError: if files are missing, or the output would replace an input.
    """
    from nemo_mtbi.config.chat import ChatConfig
    from nemo_mtbi.io.atomic import building
    from nemo_mtbi.llm.convert.megatron import write_megatron
    from nemo_mtbi.llm.directory import MEGATRON, HFDirectory

    directory = HFDirectory(arguments.source)
    if directory.missing():
        raise ValueError(f"{arguments.source} lacks {', '.join(directory.missing())}: give a Hugging Face directory")
    spare_the_source(arguments)
    config = ChatConfig(format=arguments.chat_format, system=arguments.system)
    source, chat = directory.weights(), directory.chat(config)
    with building(arguments.out) as staging:
        with progress(size_of(source)) as advance:
            sizes, shard = directory.architecture, int(arguments.shard_gb * 10**9)
            write_megatron(staging / MEGATRON, source, sizes.num_layers, sizes.num_experts, advance, shard)
        for name, content in directory.texts(chat).items():
            (staging / name).write_bytes(content)
        for companion in directory.companions():
            (staging / companion).parent.mkdir(exist_ok=True)
            shutil.copyfile(arguments.source / companion, staging / companion)
    print(f"train with model.pretrained_llm={arguments.out}")


def to_hf(arguments: argparse.Namespace) -> None:
    """Write a text LLM directory as a Hugging Face directory.

    Raises:
        ValueError: if files are missing, ``--config`` is that of another LLM, or the output would replace an input.
    """
    from nemo_mtbi.llm.convert.hf import CONFIG, architecture_of, read_hf_config
    from nemo_mtbi.llm.convert.hf_export import config_of, write_hf
    from nemo_mtbi.llm.directory import SENTENCEPIECE, TOKENIZER_FILES, OwnDirectory

    directory = OwnDirectory(arguments.source)
    if directory.missing():
        raise ValueError(f"{arguments.source} lacks {', '.join(directory.missing())}: give a text LLM directory")
    spare_the_source(arguments)
    file, sizes = arguments.config or arguments.source / CONFIG, directory.architecture
    sizes = replace(sizes, kv_channels=sizes.head_channels)  # files of Hugging Face always name it
    if arguments.config or file.is_file():
        config = read_hf_config(file)
        if architecture_of(config) != sizes:
            raise ValueError(f"{file} describes another LLM than {arguments.source}: give the config.json of that one")
        others: dict[str, Path | bytes] = {CONFIG: file}
    else:  # an LLM without a config.json: it was not made from Hugging Face's files
        config = config_of(sizes, directory.tokenizer)
        others = {CONFIG: json.dumps(config, indent=2).encode()}
    if not (arguments.source / CONFIG).is_file() and (arguments.source / SENTENCEPIECE).is_file():
        # other classes of transformers split its words otherwise
        others["tokenizer_config.json"] = json.dumps({"tokenizer_class": "LlamaTokenizer"}, indent=2).encode()
    names = [*(Path(name) for name in TOKENIZER_FILES if name != CONFIG), *directory.companions()]
    others |= {str(name): arguments.source / name for name in names if (arguments.source / name).is_file()}
    source = directory.weights()
    with progress(size_of(source)) as advance:
        write_hf(
            arguments.out,
            source,
            sizes,
            config["model_type"],
            others,
            advance,
            int(arguments.shard_gb * 10**9),
        )
    print(f"load with transformers: AutoModelForCausalLM.from_pretrained({str(arguments.out)!r})")


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status; ``argv`` and ``prog``: ``None`` for those of this process."""
    arguments = parse_arguments(argv, prog)
    try:
        {"to-megatron": to_megatron, "to-hf": to_hf}[arguments.command](arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0
