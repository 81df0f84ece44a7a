# SPDX-License-Identifier: Apache-2.0
"""Word times from elsewhere: CTM, TextGrids (Montreal Forced Aligner) and LibriSpeech-Alignments, and transcripts.

Aligners write words in their own way: upper case, without punctuation, with silences between. A speech LLM's teacher
wants the transcript as people write it. :func:`fit_words` puts the times of the one on the words of the other.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lhotse import MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy

from nemo_mtbi.io.text import parse_json_object, read_lines

Times = Mapping[str, Sequence[AlignmentItem]]  # by the id of an utterance, or of a recording
SILENCES = {"", "<eps>", "<sil>", "sil", "sp", "spn", "<unk>"}
_BLANKS = " \t\r"  # between the fields of a CTM line
_BLANK = re.compile(f"[{_BLANKS}]+")
_TOLERANCE = 0.02  # seconds by which a word may stand over its utterance's edges


def bare(word: str) -> str:
    """Return a word without case, accents' encodings and punctuation, to compare."""
    return "".join(c for c in unicodedata.normalize("NFKC", word).casefold() if c.isalnum())


def fit_words(words: Sequence[str], items: Sequence[AlignmentItem]) -> list[AlignmentItem] | None:
    """Return the times of ``items`` on ``words``.

    Args:
        words: of the transcript, with case and punctuation.
        items: of an aligner, silences among them.

    Returns:
        One item for each word, a word without letters or digits (a dash) lasting no time; ``None`` if they are not the
        same words in the same order.
    """
    spoken = [item for item in items if item.symbol.strip().lower() not in SILENCES and bare(item.symbol)]
    if [bare(word) for word in words if bare(word)] != [bare(item.symbol) for item in spoken]:
        return None
    times = iter(spoken)
    fitted: list[AlignmentItem] = []
    now = spoken[0].start if spoken else 0.0
    for word in words:
        item = next(times)._replace(symbol=word) if bare(word) else AlignmentItem(word, now, 0.0)
        now = item.end
        fitted.append(item)
    return fitted


# ------------------------------------------------------------------------------------------------------------- readers


def read_times(path: str | Path) -> Times:
    """Return word times of a CTM file, of a folder of TextGrids, or of a folder of LibriSpeech-Alignments.

    Raises:
        ValueError: if it is none of them, or a line is malformed.
    """
    path = Path(path)
    if path.is_file():
        return _read_ctm(path)
    if texts := sorted(path.rglob("*.alignment.txt")):
        return {name: items for text in texts for name, items in _read_alignments(text)}
    if grids := sorted(path.rglob("*.TextGrid")):
        return {grid.stem: _read_textgrid(grid) for grid in grids}
    raise ValueError(
        f"{path} is neither a CTM file nor a folder with .TextGrid or .alignment.txt files: check the path"
    )


def _read_ctm(path: Path) -> Times:
    """Return word times of lines ``recording channel start duration word [confidence]``."""
    words: dict[str, list[AlignmentItem]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        parts = _BLANK.split(line.strip(_BLANKS))  # a word may hold a space that does not break
        if not parts[0] or parts[0].startswith(";;"):
            continue
        try:
            name, _, start, duration, word, *score = parts
            item = AlignmentItem(word, float(start), float(duration), float(score[0]) if score else None)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not a line of a CTM file: {line!r}") from error
        words.setdefault(name, []).append(item)
    if not words:
        raise ValueError(f"{path} holds no word times: give a CTM file with lines")
    return {name: sorted(items, key=lambda item: item.start) for name, items in words.items()}


def _read_alignments(path: Path) -> Iterator[tuple[str, list[AlignmentItem]]]:
    """Return word times of lines ``id ",WORD,WORD," "0.1,0.4,1.2,2.0"``: words or silences, and their ends."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            name, words, ends = line.split()
            edges = [0.0, *map(float, ends.replace('"', "").split(","))]
            spoken = zip(words.replace('"', "").split(","), edges, edges[1:], strict=False)
            yield name, [AlignmentItem(word, start, round(end - start, 8)) for word, start, end in spoken]
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not a line of LibriSpeech-Alignments: {line[:60]!r}"
            ) from error


def _read_textgrid(path: Path) -> list[AlignmentItem]:
    try:
        from praatio import textgrid
    except ModuleNotFoundError as error:
        raise RuntimeError("reading TextGrids needs praatio: pip install nemo_mtbi[prepare]") from error
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False)
    except Exception as error:  # praatio has no kinds of its own for a file that is none of its forms
        raise ValueError(f"{path} can't be read as a TextGrid ({type(error).__name__}: {error})") from error
    tiers = [name for name in grid.tierNames if name.lower() in ("words", "word") or name.lower().endswith("- words")]
    if len(tiers) != 1:
        raise ValueError(f"{path} has the tiers {', '.join(grid.tierNames)}: one must be named words")
    return [AlignmentItem(e.label, e.start, round(e.end - e.start, 6)) for e in grid.getTier(tiers[0]).entries]


def read_texts(paths: Sequence[str | Path]) -> dict[str, str]:
    """Return transcripts by utterance.

    Args:
        paths: each a NeMo manifest (the stem of ``audio_filepath`` is the id), JSON lines with ``id`` and ``text``, or
            lines of ``id text``.

    Raises:
        ValueError: if a line is none of them, or an id comes twice.
    """
    texts: dict[str, str] = {}
    for path in paths:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            name, text = _entry(line, place)
            if name in texts:
                raise ValueError(f"{place}: a second text of {name}")
            texts[name] = text
    if paths and not texts:
        raise ValueError(f"{', '.join(map(str, paths))} without a single text: each line must have an id and a text")
    return texts


def _entry(line: str, place: str) -> tuple[str, str]:
    """Return the id and the text of a line of transcripts."""
    if line.lstrip().startswith("{"):
        entry = parse_json_object(line, place)
        audio = entry.get("audio_filepath")
        name, text = entry.get("id") or (Path(audio).stem if isinstance(audio, str) else None), entry.get("text")
    else:
        name, text = (*line.split(maxsplit=1), None)[:2]
    if not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f"{place} has no id and text: {line[:80]!r}; write `id text`, or JSON with id and text")
    return name, text


# ---------------------------------------------------------------------------------------------------------------- cuts


def with_texts(cuts: Iterable[MonoCut], texts: Mapping[str, str], counts: Counter) -> Iterator[MonoCut]:
    """Yield the cuts with these transcripts, by the id of the supervision; cuts without one are counted."""
    for cut in cuts:
        missing = [segment.id for segment in cut.supervisions if segment.id not in texts]
        if missing:
            counts["left out, without a text"] += 1
        else:
            yield fastcopy(cut, supervisions=[fastcopy(s, text=texts[s.id]) for s in cut.supervisions])


def with_times(cuts: Iterable[MonoCut], times: Times | None, counts: Counter) -> Iterator[MonoCut]:
    """Return the cuts with word times that fit their transcripts; what does not fit is counted.

    Args:
        cuts: with transcripts.
        times: by the id of a supervision or of a recording, from the start of the recording; ``None``: those that the
            supervisions have.
        counts: ``with word times``, ``without``, ``word times of another transcript``.
    """
    for cut in cuts:
        yield fastcopy(cut, supervisions=[_timed(cut, segment, times, counts) for segment in cut.supervisions])


def _timed(cut: MonoCut, segment: SupervisionSegment, times: Times | None, counts: Counter) -> SupervisionSegment:
    kept = {kind: items for kind, items in (segment.alignment or {}).items() if kind != "word"}
    start = cut.start + segment.start  # in the recording
    if times is None:
        items = (segment.alignment or {}).get("word", ())
    else:
        inside = (start - _TOLERANCE, start + segment.duration + _TOLERANCE)
        words = times.get(segment.id) or times.get(segment.recording_id) or ()
        items = [item for item in words if inside[0] <= item.start and item.end <= inside[1]]
    fitted = fit_words((segment.text or "").split(), items) if items else None
    if fitted:
        counts["with word times"] += 1
        kept["word"] = fitted
    else:
        counts["word times of another transcript" if items else "without word times"] += 1
    return fastcopy(segment, alignment=kept or None)
