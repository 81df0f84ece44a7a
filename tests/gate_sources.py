# SPDX-License-Identifier: Apache-2.0
"""Manifests and readers for the tests of the gate."""

import gzip
import json
from collections import Counter
from pathlib import Path

from loader_sources import PLAIN

from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader


def make(chat, frames, policy="raise"):
    return MTBIDataset(chat, frames, 400, on_bad_audio=policy, with_rows=True)


def read(config, dataset, most=3):
    """Cut ids that come, and what was left out by reason, of the first batches."""
    ids, skipped = [], Counter()
    for number, batch in enumerate(build_dataloader({**PLAIN, **config}, dataset)):
        ids += batch.cut_ids
        skipped.update(batch.skipped)
        if number + 1 == most:
            break
    return ids, skipped


def written(corpus, lines, name="cuts.jsonl.gz"):
    path = corpus.folder / name
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def conversation(number, audio, **turn):
    return {
        "id": f"c{number}",
        "conversations": [
            {"from": "User", "value": "say it", "type": "text"},
            {"from": "User", "value": str(audio), "type": "audio", **turn},
            {"from": "Assistant", "value": "red boat", "type": "text"},
        ],
    }


def in_layout(corpus, lines, kind, **extra):
    path = written(corpus, lines, f"{kind}.jsonl")
    entry = {"type": kind, "manifest_filepath": path, "audio_locator_tag": "<audio>", "force_finite": True, **extra}
    return {"input_cfg": [entry]}


def nemo_lines(corpus, change, **extra):
    path = corpus.manifest(corpus.cuts(3), **extra)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines[1] |= change
    return {"manifest_filepath": written(corpus, lines, "manifest.json")}
