# SPDX-License-Identifier: Apache-2.0
"""Shares of a step's positions and samples that hold data, as the data loader makes steps."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from assets import SAMPLE_RATE, words

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.data.behaviors import BEHAVIORS, PROVENANCE
from nemo_mtbi.data.cut_files import CUTS_FILE, write_cuts
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.demo.corpora.corpus import SyntheticUtterance, to_cut, write_flac
from nemo_mtbi.layouts.frames import FrameCounter

ROWS = 4
BATCH_TOKENS, MICRO_BATCH_TOKENS = 16384, 8192


def make_corpus(folder: Path, count: int) -> Path:
    """Write utterances of noise, 4 to 16 s long, with :data:`ROWS` behaviors each; return their manifest."""
    manifest = folder / f"corpus-{count}" / CUTS_FILE
    if manifest.is_file():
        return manifest
    rng, vocabulary, cuts = random.Random(0), words(3000), []

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(low, high)))

    for index in range(count):
        seconds = rng.uniform(4.0, 16.0)
        samples = (0.1 * np.random.default_rng(index).standard_normal(int(seconds * SAMPLE_RATE))).astype(np.float32)
        spoken = tuple(sentence(1, 1) for _ in range(int(2.5 * seconds)))
        edges = np.linspace(0, len(samples), len(spoken) + 1).astype(int).tolist()
        spans = tuple(zip(edges[:-1], edges[1:], strict=True))
        path = manifest.parent / "audio" / f"u{index:04d}.flac"
        write_flac(path, samples)
        cut = to_cut(SyntheticUtterance(path.stem, samples, spoken, spans, "noise"), path)
        behaviors = [
            {"task": f"t{n}", "prompt": sentence(4, 16), "response": sentence(4, 30), "truncated": False}
            for n in range(ROWS)
        ]
        cut.custom = {BEHAVIORS: behaviors, PROVENANCE: {"llm": "none", "chat": "none", "decoding": {}}}
        cuts.append(cut)
    write_cuts(manifest, cuts)
    return manifest


def measure_fill(manifest: Path, chat: ChatFormat, frames: FrameCounter) -> dict[str, float]:
    """Return the shares over one pass.

    Returns:
        ``decoder``: positions that hold a token or a frame, of rows x longest row of all microbatches. ``encoder``:
        samples of speech, of utterances x longest utterance of all steps. ``step``: positions that hold something, of
        ``batch_tokens``, on average over the steps but the last.
    """
    section = {
        "cuts_path": str(manifest),
        "rows_per_cut": ROWS,
        "batch_tokens": BATCH_TOKENS,
        "use_bucketing": True,
        "num_buckets": 4,
        "shuffle": True,
        "seed": 0,
        "num_workers": 0,
    }
    loader = build_dataloader(section, MTBIDataset(chat, frames, MICRO_BATCH_TOKENS), allow_foreign=True)
    used, padded, samples, padded_samples, steps = 0, 0, 0, 0, []
    for batch in loader:
        positions = sum(int(microbatch.lengths.sum()) for microbatch in batch.microbatches)
        used += positions
        padded += sum(microbatch.layout.numel() for microbatch in batch.microbatches)
        samples += int(batch.audio_lengths.sum())
        padded_samples += batch.audio.numel()
        steps.append(positions / BATCH_TOKENS)
    full = steps[:-1] or steps
    return {"decoder": used / padded, "encoder": samples / padded_samples, "step": sum(full) / len(full)}
