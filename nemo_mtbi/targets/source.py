# SPDX-License-Identifier: Apache-2.0
"""Sources of targets: cuts that stay valid in another folder, and the files of a Shar corpus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.lazy import count_newlines_fast

from nemo_mtbi.data.nemo_cuts import restore_piece


def whole_and_absolute(cut: Cut) -> Cut:
    """Return a cut of NeMo's reader as long as its entry says, with absolute paths."""
    return absolute_paths(restore_piece(cut))


def absolute_paths(cut: Cut) -> Cut:
    """Return ``cut`` with absolute paths of its audio files; it is changed in place."""
    for part in [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]:
        if not isinstance(part, PaddingCut) and part.has_recording:
            for source in part.recording.sources:
                if source.type == "file":
                    source.source = os.path.abspath(source.source)
    return cut


def shar_fields(shar_path: Any) -> dict[str, list[str]]:
    """Return the files of one Shar corpus by field, in order of their shards.

    Args:
        shar_path: its folder, or a mapping of fields to paths as NeMo takes it.

    Raises:
        ValueError: if it is neither, or has no cuts.
    """
    from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths

    fields: dict[str, list[str]] = {}
    if isinstance(shar_path, (str, Path)):
        for path in sorted(Path(shar_path).absolute().glob("*.*")):
            fields.setdefault(path.name.split(".")[0], []).append(str(path))
    elif isinstance(shar_path, Mapping):
        fields = {
            key: [os.path.abspath(path) for path in expand_sharded_filepaths(paths)]
            for key, paths in shar_path.items()
        }
    if not fields.get("cuts"):
        raise ValueError(
            f"shar_path={shar_path} must be the folder of one Shar corpus, or a mapping with the key cuts"
        )
    return fields


def shar_shard_size(files: list[str]) -> int:
    """Return the number of cuts in each shard of a Shar corpus.

    Ours must have as many, since cuts and audio are read side by side.

    Raises:
        ValueError: if they differ.
    """
    sizes = [count_newlines_fast(path) for path in files]
    if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:
        raise ValueError(
            f"the shards of this Shar corpus hold {min(sizes)} to {max(sizes)} cuts, and targets are made for shards "
            "of one size (the last may be smaller): write it again with Lhotse and a single shard_size"
        )
    return sizes[0]
