# SPDX-License-Identifier: Apache-2.0
"""Transcripts from elsewhere for a cascade: a JSONL with ``id`` or ``audio_filepath`` and the text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_mtbi.evaluation.items import Clip, EvalSet
from nemo_mtbi.io.text import read_json_lines

_SHOWN = 5


@dataclass
class Hypotheses:
    """Transcripts by id or audio file of their utterance.

    Attributes:
        key: Key of the configuration, with the path, for messages.
        ids: Text and line number by ``id``.
        files: Text and line number by the resolved path of the audio.
    """

    key: str
    ids: dict[str, tuple[str, int]] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)

    def text(self, clip: Clip) -> str | None:
        """Return the text of an utterance; None if there is no line for it."""
        entry = self.ids.get(clip.id)
        for path in _audio_of(clip):
            entry = entry or self.files.get(os.path.realpath(path))
        return None if entry is None else entry[0]

    def check(self, sets: Sequence[EvalSet]) -> None:
        """Raise ValueError unless each utterance of each set has a text of its own; names those without."""
        for chosen in sets:
            missing = [clip.id for clip in chosen.clips if self.text(clip) is None]
            if missing:
                more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
                raise ValueError(
                    f"{self.key} lacks {len(missing)} of the {len(chosen.clips)} utterances of set {chosen.name!r}: "
                    f"{', '.join(missing[:_SHOWN])}{more}. Add a line with the id (or audio_filepath) and the text of "
                    "each, or leave the set or the system out"
                )
            self._refuse_shared(chosen)
        self._refuse_other_sets(sets)

    def _refuse_shared(self, chosen: EvalSet) -> None:
        """Raise ValueError if a line names a recording of several utterances: which of them it means is unknown."""
        by_file = [clip for clip in chosen.clips if clip.id not in self.ids]
        counts = Counter(os.path.realpath(path) for clip in by_file for path in _audio_of(clip))
        for clip in by_file:
            for path in _audio_of(clip):
                if counts[os.path.realpath(path)] > 1:
                    raise ValueError(
                        f"{self.key} names {path} by audio_filepath, but several utterances of set {chosen.name!r} "
                        f"are parts of it, such as {clip.id}: give their ids"
                    )

    def _refuse_other_sets(self, sets: Sequence[EvalSet]) -> None:
        """Raise ValueError if an id is one utterance in one set and another in a second set."""
        seen: dict[str, tuple[list[Any], str]] = {}
        for chosen in sets:
            for clip in chosen.clips:
                if clip.id not in self.ids:
                    continue
                identity, other = seen.setdefault(clip.id, (clip.identity, chosen.name))
                if identity != clip.identity:
                    raise ValueError(
                        f"{self.key} has one text for the id {clip.id}, which is another utterance in set "
                        f"{chosen.name!r} than in {other!r}: name them by audio_filepath, or evaluate the sets apart"
                    )


def read_hypotheses(path: str | Path, key: str) -> Hypotheses:
    """Read the transcripts of a cascade.

    A line has ``id`` or ``audio_filepath`` (absolute, or relative to the file or to the working folder), and the text
    in ``pred_text``, as NeMo's and our own transcription write it (``text`` is the reference there), else in ``text``.

    Args:
        path: Of the JSONL.
        key: Key of the configuration that named it, for messages.

    Raises:
        ValueError: the file can't be read, a line lacks a field, or two lines give one utterance different texts.
    """
    path = Path(path).expanduser()
    hypotheses = Hypotheses(f"{key}={path}")
    for number, line in read_json_lines(path, key):
        place = f"line {number} of {path}"
        text = line.get("pred_text", line.get("text"))
        names = {name: line[name] for name in ("id", "audio_filepath") if isinstance(line.get(name), str)}
        if not names or not isinstance(text, str):
            raise ValueError(f"{place} must have id or audio_filepath, and pred_text or text, each a text in quotes")
        if "id" in names:
            _add(hypotheses.ids, names["id"], text, number, place)
        else:
            for audio in _places_of(path, names["audio_filepath"]):
                _add(hypotheses.files, audio, text, number, place)
    return hypotheses


def _add(texts: dict[str, tuple[str, int]], name: str, text: str, number: int, place: str) -> None:
    other, line = texts.setdefault(name, (text, number))
    if other != text:
        raise ValueError(f"{place} gives {name} another text than line {line}: keep one of them")


def _places_of(path: Path, audio: str) -> set[str]:
    """Return the resolved paths that a recording named in a file may have."""
    given = Path(audio).expanduser()
    return {os.path.realpath(given), os.path.realpath(path.parent / given)}


def _audio_of(clip: Clip) -> Iterator[str]:
    """Yield the path of the audio of an utterance, if it is one file."""
    if isinstance(clip.audio, Path):
        yield str(clip.audio)
        return
    recording = getattr(clip.audio, "recording", None)
    sources: Sequence[Any] = recording.sources if recording is not None else ()
    if len(sources) == 1 and sources[0].type == "file":
        yield str(sources[0].source)
