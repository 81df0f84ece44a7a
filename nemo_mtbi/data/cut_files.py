# SPDX-License-Identifier: Apache-2.0
"""Writes cuts to disk."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from lhotse.cut import MonoCut

CUTS_FILE = "cuts.jsonl.gz"


def write_cuts(path: Path, cuts: Iterable[MonoCut]) -> None:
    """Write cuts as ``.jsonl.gz``; equal cuts give equal bytes (no time stamp, no file name in the gzip header)."""
    with open(path, "wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
        for cut in cuts:
            stream.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
