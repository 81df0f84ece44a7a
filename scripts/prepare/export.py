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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", required=True, type=Path, metavar="FILE", help="Lhotse cuts, such as in.jsonl.gz")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="an empty folder, or one to be made")
    parser.add_argument("--format", required=True, choices=("shar", "tarred"))
    parser.add_argument(
        "--on-bad-audio", choices=("raise", "skip"), default="raise", help="cuts that can't be read (%(default)s)"
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="cuts in a shard (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    import yaml
    from rich.console import Console
    from rich.progress import track

    from nemo_mtbi.data.export import export
    from nemo_mtbi.data.prepare import open_cuts

    try:
        cuts, total = open_cuts(arguments.cuts)
        shown = track(cuts, "writing", total=total, console=Console(stderr=True))
        counts: Counter = Counter()
        entry = export(shown, arguments.out, arguments.format, arguments.shard_size, arguments.on_bad_audio, counts)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    print(f"# {counts['cuts']} cuts; left out because their audio can't be read: {counts['bad_audio']}")
    print(yaml.safe_dump({"input_cfg": [{**entry, "weight": 1.0}]}, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
