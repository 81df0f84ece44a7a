# SPDX-License-Identifier: Apache-2.0
"""Checks the kind of a manifest by its first line."""

from __future__ import annotations

from pathlib import Path

from nemo_mtbi.io.text import parse_json_object
from nemo_mtbi.io.text_files import TextFile

_MAKE = "make cuts of NeMo manifests with scripts/prepare/corpus.py manifest"


def check_manifest(path: str | Path, key: str, kind: str) -> None:
    """Refuse what can't be a manifest, by its first line.

    Args:
        path: a local file.
        key: configuration key or option that named it, for messages; may be empty.
        kind: what is wanted: ``cuts`` of Lhotse, entries of a ``nemo`` manifest, or any JSON ``lines``.

    Raises:
        ValueError: a folder, an empty file, the other kind of manifest, or not JSON lines; names the file and the
            remedy.
    """
    named = f"{key}={path}" if key else str(path)
    if Path(path).is_dir():
        raise ValueError(f"{named} is a folder: name the manifest in it")
    if not Path(path).exists():
        raise ValueError(f"{named} does not exist: give a manifest")
    try:
        with TextFile(path) as file:
            line = next(file, None)
    except OSError as error:
        raise ValueError(f"{named} can't be read: {error.strerror or error}") from error
    if line is None:
        raise ValueError(f"{named} holds no {'cuts' if kind == 'cuts' else 'entries'}: it is empty")
    if kind == "cuts" and ".jsonl" not in Path(path).suffixes and "audio_filepath" not in line:
        return  # one JSON or YAML document, which Lhotse reads as a whole
    entry = parse_json_object(line, f"the first line of {named}")
    if kind == "cuts" and "audio_filepath" in entry:
        raise ValueError(f"{named} is a NeMo manifest and holds no cuts: give it as manifest_filepath, or {_MAKE}")
    if kind == "nemo" and "audio_filepath" not in entry:
        cuts = "recording" in entry or "tracks" in entry
        why = "it is a Lhotse cut: give the file as cuts_path" if cuts else "it must have the key audio_filepath"
        raise ValueError(f"the first line of {named} is not an entry of a NeMo manifest: {why}")
