# SPDX-License-Identifier: Apache-2.0
"""Cuts with their audio in few large files, for clusters: Lhotse Shar, and NeMo's tarred manifests.

Word times, behaviors and all else that a cut carries travel along.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording
from lhotse.cut.data import DataCut
from lhotse.utils import fastcopy

from nemo_mtbi.config.checks import RAISE_OR_SKIP, OneOf, at_least
from nemo_mtbi.data.audio import LOADING_ERRORS
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.io.paths import make_folder
from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.sources import FILES, ForbiddenSourceError, SourcePolicy, check_cut
from nemo_mtbi.io.text import in_one_line
from nemo_mtbi.targets.store import split_into_shards

FORMS = OneOf("shar", "tarred")


def export(
    cuts: Iterable[DataCut],
    out_dir: str | Path,
    form: str,
    shard_size: int,
    on_bad_audio: str = "raise",
    counts: Counter | None = None,
    policy: SourcePolicy = FILES,
) -> dict[str, Any]:
    """Write cuts with their audio.

    Args:
        cuts: single recordings, of one channel or several.
        out_dir: must be empty or missing.
        form: ``shar`` or ``tarred``.
        shard_size: cuts in a shard.
        on_bad_audio: ``raise``, or ``skip`` and count cuts whose audio can't be read.
        counts: gets ``cuts`` and ``bad_audio``.
        policy: what audio and arrays may be read from.

    Returns:
        An entry of NeMo's ``input_cfg`` that reads them.

    Raises:
        ValueError: unknown form, a folder that is not empty, no cuts, or one that is no single utterance.
        RuntimeError: another run writes into the folder.
    """
    out_dir = Path(out_dir).absolute()
    FORMS.check("form", form)
    at_least(1).check("shard_size", shard_size)
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} is not empty: give another folder, or old shards would be read with the new")
    RAISE_OR_SKIP.check("on_bad_audio", on_bad_audio)
    make_folder(out_dir, "--out")
    whole = _loaded(cuts, on_bad_audio, Counter() if counts is None else counts, policy)
    with exclusive(out_dir, "--out", out_dir / "export"):
        entry = (_shar if form == "shar" else _tarred)(whole, out_dir, shard_size)
    if not any(out_dir.iterdir()):
        raise ValueError("there are no cuts to write")
    return entry


def _loaded(cuts: Iterable[DataCut], on_bad_audio: str, counts: Counter, policy: SourcePolicy) -> Iterator[MonoCut]:
    """Yield cuts with their audio in memory, as one channel; word times count from the start of the cut."""
    for cut in cuts:
        if not isinstance(cut, DataCut) or len(cut.supervisions) != 1:
            raise ValueError(
                f"cut {cut.id} is not a recording with one supervision: make one cut of each utterance (Lhotse's "
                "trim_to_supervisions)"
            )
        (segment,) = cut.supervisions
        times = {
            kind: [item._replace(start=round(item.start - cut.start, 6)) for item in items]
            for kind, items in (segment.alignment or {}).items()
        }
        try:
            sound, held = _held(cut, policy)
        except ForbiddenSourceError:
            raise
        except LOADING_ERRORS as error:
            if on_bad_audio == "raise":
                raise ValueError(
                    f"the audio of cut {cut.id} can't be read: {in_one_line(error)}; mend it, or leave such cuts out "
                    "with --on-bad-audio skip, into an empty folder"
                ) from error
            counts["bad_audio"] += 1
            continue
        counts["cuts"] += 1
        segment = fastcopy(segment, alignment=times or None, channel=0)
        kept = {name: getattr(held, name) for name in ("id", "duration", "features", "custom")}
        yield MonoCut(**kept, start=0.0, channel=0, recording=sound, supervisions=[segment])


def _held(cut: MonoCut, policy: SourcePolicy) -> tuple[Recording, MonoCut]:
    """Return the audio of a cut in memory, and the cut with its arrays in memory."""
    check_cut(cut, policy)
    with Reading(policy, f"cut {cut.id}"):
        return Recording.from_bytes(_flac(cut), cut.recording.id), cut.move_to_memory(load_audio=False)


def _shar(cuts: Iterable[MonoCut], out_dir: Path, shard_size: int) -> dict[str, Any]:
    CutSet(cuts).to_shar(out_dir, fields={"recording": "flac"}, shard_size=shard_size)
    return {"type": "lhotse_shar", "shar_path": str(out_dir)}


def _tarred(cuts: Iterable[MonoCut], out_dir: Path, shard_size: int) -> dict[str, Any]:
    shards = 0
    for shards, shard in enumerate(split_into_shards(cuts, shard_size), start=1):
        number = shards - 1
        with (
            tarfile.open(out_dir / f"audio_{number}.tar", "w") as tar,
            open(out_dir / f"manifest_{number}.json", "w", encoding="utf-8") as manifest,
        ):
            for index, cut in enumerate(shard):
                name, content = f"{number:05d}-{index:06d}.flac", cut.recording.sources[0].source
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                line = {"audio_filepath": name, "duration": cut.duration, "shard_id": number, **_fields(cut)}
                manifest.write(_as_json(line, cut.id) + "\n")
    every = f"_OP_0..{shards - 1}_CL_"
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{out_dir}/manifest_{every}.json",
        "tarred_audio_filepaths": f"{out_dir}/audio_{every}.tar",
    }


def _as_json(line: dict[str, Any], cut_id: str) -> str:
    try:
        return json.dumps(line, ensure_ascii=False)
    except TypeError as error:  # a recording or an array in a custom field
        raise ValueError(
            f"cut {cut_id} carries what a line of a NeMo manifest can't hold ({error}): export it as shar, or remove "
            "the custom field"
        ) from error


def _flac(cut: DataCut) -> bytes:
    """Return 16-bit FLAC at the cut's own rate; several channels are averaged, as when audio is loaded for a model."""
    stream = io.BytesIO()
    samples = np.clip(cut.load_audio().mean(axis=0), -1.0, 1.0)
    soundfile.write(stream, samples, cut.sampling_rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _fields(cut: MonoCut) -> dict[str, Any]:
    """Return the other fields of a line of a NeMo manifest."""
    (segment,) = cut.supervisions
    fields: dict[str, Any] = {"id": cut.id, "text": segment.text}
    fields |= {key: value for key in ("language", "speaker") if (value := getattr(segment, key))}
    if "language" in fields:
        fields["lang"] = fields.pop("language")
    if segment.alignment:
        fields["alignment"] = {kind: [list(item) for item in items] for kind, items in segment.alignment.items()}
    return {**(segment.custom or {}), **(cut.custom or {}), **fields}
