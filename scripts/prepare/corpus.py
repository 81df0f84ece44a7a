#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""Cuts of a corpus as it is published, with transcripts for a text LLM and word times.

  python scripts/prepare/corpus.py librispeech LibriSpeech --out corpora/librispeech
  python scripts/prepare/corpus.py librispeech LibriSpeech --out corpora/librispeech --times LibriSpeech-Alignments \
      --texts librispeech-pc/train-clean-100.json
  python scripts/prepare/corpus.py manifest train.json more.json --out corpora/own --times words.ctm

The first word is a recipe of Lhotse (an unknown one lists all) or `manifest`. Each part of the corpus becomes
OUT/PART.jsonl.gz. Without word times go on with scripts/align.py.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from nemo_mtbi.io.display import printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of Lhotse, or `manifest`")
    parser.add_argument("source", nargs="+", type=Path, help="folder of the corpus, or NeMo manifests")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the cuts")
    parser.add_argument(
        "--times", type=Path, metavar="PATH", help="CTM file, or folder of TextGrids or of LibriSpeech-Alignments"
    )
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="cased and punctuated transcripts: NeMo manifests, or lines of `id text`; those without are left out",
    )
    parser.add_argument("--lower", action="store_true", help="transcripts in lower case: better than in upper case")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="further argument of the recipe"
    )
    parser.add_argument("--text-field", default="text", metavar="KEY", help="of NeMo manifests (%(default)s)")
    parser.add_argument("--lang-field", default="lang", metavar="KEY", help="of NeMo manifests (%(default)s)")
    parser.add_argument("--allow-remote", action="store_true", help="cuts may be read from http(s), s3 and the like")
    parser.add_argument("--allow-commands", action="store_true", help="cuts may run shell commands, as their source")
    return parser.parse_args(argv)


def read_option(option: str) -> tuple[str, object]:
    """The key and the value of --option.

    Raises:
        ValueError: if it is not KEY=VALUE with a value of YAML.
    """
    import yaml

    key, equals, value = option.partition("=")
    try:
        if key and equals:
            return key, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise ValueError(f"--option {option} must be KEY=VALUE, with a value of YAML such as true, 3 or [a, b]")


def spare_sources(arguments: argparse.Namespace, parts: Iterable[str]) -> None:
    """Refuse an --out where a part would replace what is read.

    A folder may be the corpus and --out at once: there a part only takes the place of what an earlier run has written.

    Raises:
        ValueError: names the file.
    """
    from nemo_mtbi.io.paths import named_files, refuse_overwriting

    written = [arguments.out / f"{part}.jsonl.gz" for part in parts]
    folders = [path for path in arguments.source if path.is_dir()]
    inside = [p for p in written if p.is_file() and not is_cuts(p) and any(is_in(p, folder) for folder in folders)]
    manifests = [name for path in arguments.source if path not in folders for name in named_files(path)]
    times = [arguments.times] if arguments.times and arguments.times.is_file() else []
    inputs = {"source": [*manifests, *inside], "--times": times, "--texts": arguments.texts or ()}
    refuse_overwriting(inputs, {"--out": written})


def is_in(path: Path, folder: Path) -> bool:
    """Return whether a path lies in a folder."""
    return path.resolve().is_relative_to(folder.resolve())


def is_cuts(path: Path) -> bool:
    """Return whether a compressed file holds cuts, as those that this script writes."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return '"type": "MonoCut"' in file.readline()
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def prepare(arguments: argparse.Namespace) -> Counter:
    """Writes the parts; returns what was counted.

    Raises:
        ValueError: if something does not fit; the message says what.
    """
    from lhotse import CutSet

    from nemo_mtbi.data.cut_files import write_cuts
    from nemo_mtbi.io.locks import exclusive
    from nemo_mtbi.io.paths import make_folder
    from nemo_mtbi.io.sources import SourcePolicy
    from nemo_mtbi.prepare.recipes import cuts_of_manifests, cuts_of_recipe
    from nemo_mtbi.prepare.word_alignments import read_texts, read_times, with_texts, with_times

    if arguments.recipe == "manifest":
        spare_sources(arguments, ["cuts"])
    times = read_times(arguments.times) if arguments.times else None
    texts = read_texts(arguments.texts or ())
    if arguments.recipe == "manifest":
        if arguments.option:
            raise ValueError("--option is for recipes of Lhotse: leave it out with `manifest`")
        policy = SourcePolicy(arguments.allow_remote, arguments.allow_commands)
        parts = {"cuts": cuts_of_manifests(arguments.source, arguments.text_field, arguments.lang_field, policy)}
    else:
        if len(arguments.source) != 1:
            raise ValueError("a recipe takes one folder")
        options = dict(map(read_option, arguments.option))
        parts = cuts_of_recipe(arguments.recipe, arguments.source[0], options)
    spare_sources(arguments, parts)
    counts: Counter = Counter()
    make_folder(arguments.out, "--out")
    with exclusive(arguments.out, "--out", arguments.out / "corpus"):
        for part, cuts in parts.items():
            if texts:
                cuts = with_texts(cuts, texts, counts)
            if arguments.lower:
                cuts = CutSet(cuts).transform_text(str.lower)
            kept = list(with_times(cuts, times, counts))
            counts["utterances"] += len(kept)
            counts["in upper case"] += sum(s.text.isupper() for cut in kept for s in cut.supervisions if s.text)
            write_cuts(arguments.out / f"{part}.jsonl.gz", kept)
            print(f"{arguments.out / part}.jsonl.gz: {len(kept)} utterances", flush=True)
    if not counts["utterances"]:
        raise ValueError(f"not one utterance is left ({dict(counts)}): do the ids of --texts belong to this corpus?")
    return counts


def main(argv: list[str] | None = None) -> int:
    """Prepare a corpus; return the exit status."""
    arguments = parse_arguments(argv)
    try:
        counts = prepare(arguments)
    except (ValueError, RuntimeError, OSError) as err:
        print(f"error: {printable(str(err))}", file=sys.stderr)
        return 1
    for name, count in sorted(counts.items()):
        if count:
            print(f"  {name}: {count}")
    if counts["in upper case"]:
        print("a text LLM answers transcripts in upper case differently: give --texts with case, or --lower")
    if counts["without word times"]:
        print("word times make interleaving possible: go on with scripts/align.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
