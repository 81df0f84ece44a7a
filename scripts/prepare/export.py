#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Writes cuts with their audio into few large files, for clusters: Lhotse Shar or NeMo's tarred manifests.

  python scripts/prepare/export.py --cuts targets/cuts.jsonl.gz --out shar --format shar
  python scripts/prepare/export.py --cuts targets/cuts.jsonl.gz --out tarred --format tarred --shard-size 500

Word times and behaviors travel along. It ends with what to put under model.train_ds.input_cfg, which also blends:
the `weight` of an entry is its share of what is read.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from nemo_mtbi.io.display import printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", required=True, type=Path, metavar="FILE", help="Lhotse cuts, such as in.jsonl.gz")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="an empty folder, or one to be made")
    parser.add_argument("--format", required=True, choices=("shar", "tarred"))
    parser.add_argument(
        "--on-bad-audio", choices=("raise", "skip"), default="raise", help="cuts that can't be read (%(default)s)"
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="cuts in a shard (%(default)s)")
    parser.add_argument("--allow-remote", action="store_true", help="cuts may be read from http(s), s3 and the like")
    parser.add_argument("--allow-commands", action="store_true", help="cuts may run shell commands, as their source")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Export a manifest; return the exit status."""
    arguments = parse_arguments(argv)
    import yaml
    from rich.console import Console
    from rich.progress import track

    from nemo_mtbi.io.paths import refuse_overwriting
    from nemo_mtbi.io.sources import SourcePolicy
    from nemo_mtbi.prepare.export import export
    from nemo_mtbi.prepare.recipes import open_cuts

    try:
        refuse_overwriting({"--cuts": [arguments.cuts]}, {"--out": [arguments.out]})
        policy = SourcePolicy(arguments.allow_remote, arguments.allow_commands)
        cuts, total = open_cuts(arguments.cuts, policy, arguments.on_bad_audio == "skip")
        shown = track(cuts, "writing", total=total, console=Console(stderr=True))
        counts: Counter = Counter()
        form, size, on_bad = arguments.format, arguments.shard_size, arguments.on_bad_audio
        entry = export(shown, arguments.out, form, size, on_bad, counts, policy)
    except (ValueError, RuntimeError, OSError) as err:
        print(f"error: {printable(str(err))}", file=sys.stderr)
        return 1
    print(f"# {counts['cuts']} cuts; left out because their audio can't be read: {counts['bad_audio']}")
    if cuts.left_out:
        print("# left out because their values can't be used: " + str(dict(cuts.left_out)))
    print(yaml.safe_dump({"input_cfg": [{**entry, "weight": 1.0}]}, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
