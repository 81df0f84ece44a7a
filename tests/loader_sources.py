# SPDX-License-Identifier: Apache-2.0
"""Data sources of every kind that NeMo reads, for the tests of the loader."""

import json
import tarfile
from pathlib import Path

from lhotse import CutSet

from nemo_mtbi.config.interleave import InterleaveConfig
from nemo_mtbi.data.dataset import MTBIDataset

PLAIN = {"batch_size": 4, "shuffle": False, "use_lhotse": True}


def make_dataset(chat, frames):
    return MTBIDataset(chat, frames, 400, interleave=InterleaveConfig(), with_rows=True)


def content(batch):
    """Everything that a batch says, comparable."""
    return (
        tuple(batch.cut_ids),
        tuple((row.cut_id, row.task, row.instruction) for row in batch.rows),
        tuple((m.layout.numpy().tobytes(), m.labels.numpy().tobytes()) for m in batch.microbatches),
        batch.audio.numpy().tobytes(),
    )


def tarred(corpus, cuts):
    """A NeMo tarred data set of one shard."""
    for line in cuts:
        line.custom["shard_id"] = 0
    corpus.manifest(cuts, "manifest_0")
    path = corpus.folder / "manifest_0.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    with tarfile.open(corpus.folder / "audio_0.tar", "w") as tar:
        for line in lines:
            tar.add(line["audio_filepath"], Path(line["audio_filepath"]).name)
            line["audio_filepath"] = Path(line["audio_filepath"]).name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"manifest_filepath": str(path), "tarred_audio_filepaths": str(corpus.folder / "audio_0.tar")}


def shar(corpus, cuts, name="shar"):
    folder = corpus.folder / name
    folder.mkdir()
    CutSet.from_cuts(cuts).to_shar(folder, fields={"recording": "flac"}, shard_size=3)
    return {"shar_path": str(folder)}


def group(corpus, cuts):
    """Two plain sources and a group in a group, with weights."""
    half = len(cuts) // 2
    return {
        "input_cfg": [
            {"type": "lhotse", "cuts_path": corpus.jsonl(cuts[:half], "a"), "weight": 0.5},
            {
                "type": "group",
                "weight": 0.5,
                "input_cfg": [{"type": "nemo", "manifest_filepath": corpus.manifest(cuts[half:]), "weight": 1.0}],
            },
        ]
    }


def as_file(corpus, cuts):
    path = corpus.folder / "input_cfg.yaml"
    path.write_text(json.dumps(group(corpus, cuts)["input_cfg"]))
    return {"input_cfg": str(path)}


SOURCES = {
    "cuts_path": lambda corpus, cuts: {"cuts_path": corpus.jsonl(cuts)},
    "manifest_filepath": lambda corpus, cuts: {"manifest_filepath": corpus.manifest(cuts)},
    "manifests": lambda corpus, cuts: {
        "manifest_filepath": [[corpus.manifest(cuts[:3], "a")], [corpus.manifest(cuts[3:], "b")]]
    },
    "tarred": tarred,
    "shar": shar,
    "input_cfg": group,
    "input_cfg as a file": as_file,
}
ENDLESS = set(SOURCES) - {"cuts_path", "manifest_filepath"}
