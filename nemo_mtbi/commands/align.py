# SPDX-License-Identifier: Apache-2.0
"""Aligns the words of a corpus with its speech, with any NeMo CTC or hybrid model.

  mtbi align --cuts train.jsonl.gz --asr stt_en_fastconformer_ctc_large.nemo --out aligned

(python scripts/align.py in a clone.) CTC says which frames belong to which word; a model of the sounds, trained on the
corpus itself, moves the boundaries to within about 20 ms. Utterances whose transcript does not fit stay without word
times and are counted. Run the command again to resume after an interruption. Target generation and training read
aligned/cuts.jsonl.gz.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nemo_mtbi.io.display import printable


def parse_arguments(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Return the options of a command line; ``None``: that of this process."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", required=True, type=Path, metavar="FILE", help="Lhotse cuts, such as in.jsonl.gz")
    parser.add_argument("--asr", required=True, metavar="NEMO", help="a .nemo with a CTC head, or `demo`")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--min-score",
        type=float,
        default=0.01,
        metavar="P",
        help="utterances with a word below it stay without times (%(default)s)",
    )
    parser.add_argument(
        "--learn-from", type=int, default=500, metavar="N", help="utterances to train the sounds on (%(default)s)"
    )
    parser.add_argument("--batch-seconds", type=float, default=120.0, metavar="S", help="of audio (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="cuts in a shard (%(default)s)")
    parser.add_argument("--on-bad-audio", choices=("raise", "skip"), default="raise", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of utterances to learn from (%(default)s)")
    parser.add_argument("--device", default=None, metavar="NAME", help="such as cuda:1; a GPU if there is one")
    parser.add_argument("--allow-remote", action="store_true", help="cuts may be read from http(s), s3 and the like")
    parser.add_argument("--allow-commands", action="store_true", help="cuts may run shell commands, as their source")
    return parser.parse_args(argv)


def align(arguments: argparse.Namespace) -> dict[str, Any]:
    """Align a corpus, join its shards and return the report.

    Args:
        arguments: as :func:`parse_arguments` returns them.

    Raises:
        ValueError: if the output would replace an input, or ``--asr`` is not a model with a CTC head.
        RuntimeError: if another run writes into the same folder.
    """
    import torch
    from rich.console import Console

    from nemo_mtbi.io.file_digests import file_digest
    from nemo_mtbi.io.paths import refuse_overwriting
    from nemo_mtbi.io.sources import SourcePolicy
    from nemo_mtbi.prepare.alignment.corpus import REPORT_FILE, SETTINGS_FILE, SOUNDS_FILE, AlignConfig, align_corpus
    from nemo_mtbi.prepare.alignment.ctc import CTCModel
    from nemo_mtbi.prepare.recipes import open_cuts
    from nemo_mtbi.speech_llm.pretrained import resolve
    from nemo_mtbi.targets.store import join_shards, own_share, written_files

    settings = [arguments.out / name for name in (SETTINGS_FILE, SOUNDS_FILE, REPORT_FILE)]
    inputs = {"--cuts": [arguments.cuts], "--asr": [] if arguments.asr == "demo" else [arguments.asr]}
    refuse_overwriting(inputs, {"--out": [*written_files(arguments.out), *settings]})
    names = ("min_score", "learn_from", "seed", "batch_seconds", "shard_size", "on_bad_audio")
    policy = SourcePolicy(arguments.allow_remote, arguments.allow_commands)
    config = AlignConfig(**{name: getattr(arguments, name) for name in names}, policy=policy)
    cuts, total = open_cuts(arguments.cuts, policy, arguments.on_bad_audio == "skip")
    model = resolve(arguments.asr, "--asr", "encoder.nemo")
    if not model.is_file():
        raise ValueError(f"--asr={arguments.asr} is a folder: alignment takes a .nemo file with a CTC head")
    source = f"{file_digest(model)} {file_digest(arguments.cuts)}"
    ctc = CTCModel.load(arguments.asr)
    ctc.to(torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    console = Console(stderr=True)
    with own_share(arguments.out, "--out"):
        report = align_corpus(cuts, arguments.out, ctc, config, source=source, total=total, console=console)
        return {**report.as_dict(), "left_out": dict(cuts.left_out), "cuts": str(join_shards(arguments.out))}


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit status; ``argv`` and ``prog``: ``None`` for those of this process."""
    arguments = parse_arguments(argv, prog)
    try:
        report = align(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1))
    return 0
