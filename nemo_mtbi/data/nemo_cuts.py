# SPDX-License-Identifier: Apache-2.0
"""Corrects cuts of NeMo's manifest reader that are shorter than their entries say."""

from __future__ import annotations

import re
from pathlib import Path

from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples, fastcopy

EDGE = 0.5  # seconds by which an entry may go past the end of its file: what Lhotse lets a file be shorter
_LONGER = 1.0  # seconds: how much longer than the piece its file is taken to be


def restore_piece(cut: Cut) -> Cut:
    """Return a piece of a file with the length that its entry says; other cuts as they are.

    NeMo cuts a piece short, without a word, where it takes the file to end:

    - An entry with ``sampling_rate`` and ``offset``: NeMo does not open the file and takes its length to be that of
      the piece. A piece that begins at the offset then loses as many seconds as the offset has.
    - An entry that goes past the end of its file.

    The identifier of the cut, which ends in offset and duration, still tells. The file is taken to be longer than the
    piece: its length is unknown, and the piece alone is read. Where the file can't give it, loading fails.
    """
    promised = promised_seconds(cut) if isinstance(cut, DataCut) and cut.has_recording else None
    if promised is None:
        return cut
    recording, source = cut.recording, cut.recording.sources[0]
    # NeMo names a file that it has not opened by its path, and Lhotse one that it has by its stem.
    unopened = source.type != "memory" and recording.id != Path(source.source).stem
    if unopened:
        promised = recording.duration
    elif cut.duration >= promised - EDGE:
        return cut
    samples = compute_num_samples(cut.start + promised + _LONGER, recording.sampling_rate)
    recording = fastcopy(recording, duration=samples / recording.sampling_rate, num_samples=samples)
    segments = [fastcopy(segment, duration=promised) for segment in cut.supervisions]
    return fastcopy(cut, duration=promised, recording=recording, supervisions=segments)


def promised_seconds(cut: DataCut) -> float | None:
    """Return the duration in the entry of a piece of a file, in hundredths of a second as its identifier tells it.

    ``None`` where the entry had no offset, or the cut does not come from NeMo's reader.
    """
    times = re.fullmatch(r"-(\d{6,})-(\d{6,})", cut.id.removeprefix(cut.recording.id))
    return int(times[2]) / 1e2 if times and int(times[1]) == round(cut.start * 1e2) else None
