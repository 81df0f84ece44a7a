# SPDX-License-Identifier: Apache-2.0
"""Word alignments for a corpus of cuts: in batches, shard by shard, resumable."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
from lhotse import CutSet, SupervisionSegment
from lhotse.cut.data import DataCut
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from nemo_mtbi.config.checks import Count, RaiseOrSkip, Section, above, between
from nemo_mtbi.data.audio import BadAudioError, load_samples
from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text
from nemo_mtbi.io.paths import make_folder
from nemo_mtbi.io.sources import FILES, SourcePolicy
from nemo_mtbi.prepare.alignment.ctc import CTCModel, TokenSpans
from nemo_mtbi.prepare.alignment.sounds import PASSES, SoundModel, Spoken, cepstra, train_sounds, word_frames
from nemo_mtbi.targets.store import shard_path, split_into_shards, write_shard

_DECISIVE = ("min_score", "learn_from", "seed", "shard_size")  # the others may change from run to run
SETTINGS_FILE, SOUNDS_FILE, REPORT_FILE = "settings.json", "sounds.safetensors", "alignment.json"


@dataclass(frozen=True)
class AlignConfig(Section):
    """How a corpus is aligned.

    Attributes:
        min_score: an utterance with a word below it gets no alignment, and is counted. A word's score is the geometric
            mean over its tokens of the largest probability that CTC gives the token on its frames.
        learn_from: utterances that the sounds are learned from, drawn from the whole corpus.
        seed: of that draw.
        batch_seconds: of audio that are aligned together.
        shard_size: cuts in a shard, the unit of resume.
        on_bad_audio: ``raise``, or ``skip``: a cut whose audio can't be read stays without an alignment.
        policy: what audio may be read from.
    """

    min_score: Annotated[float, between(0, 1, ", where 0 drops nothing")] = 0.01
    learn_from: Count = 500
    seed: int = 0
    batch_seconds: Annotated[float, above(0)] = 120.0
    shard_size: Count = 1000
    on_bad_audio: RaiseOrSkip = "raise"
    policy: SourcePolicy = FILES


@dataclass
class AlignmentReport:
    """Counts of an alignment, and its distance from the alignments that the corpus had before.

    Attributes:
        counts: ``cuts``, ``aligned`` (supervisions), ``words``, and what was left out by reason: ``no_text``,
            ``unknown_word``, ``too_short``, ``low_score``, ``bad_audio``.
        starts, ends: words by their distance in milliseconds from the alignments that the corpus had before.
    """

    counts: Counter = field(default_factory=Counter)
    starts: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as it is written to JSON."""
        content: dict[str, Any] = {"counts": dict(sorted(self.counts.items()))}
        if self.starts:
            content["against_the_former"] = {
                "words": self.starts.total(),
                "median_start_ms": _median(self.starts),
                "median_end_ms": _median(self.ends),
                "median_boundary_ms": _median(self.starts + self.ends),
            }
        return content

    def add(self, other: Mapping) -> None:
        """Add the report of a shard."""
        self.counts.update(other["counts"])
        for name in ("starts", "ends"):
            getattr(self, name).update({int(distance): count for distance, count in other[name].items()})


@dataclass(frozen=True)
class _Item:
    """One supervision with its audio and tokens. A word without a sound (a dash) has no tokens."""

    cut: DataCut
    segment: SupervisionSegment
    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    samples: Tensor


class CorpusAligner:
    """Aligns cuts with a CTC model and a model of the sounds.

    Args:
        ctc: the model.
        config: how.
    """

    def __init__(self, ctc: CTCModel, config: AlignConfig):
        self.ctc, self.config = ctc, config
        self.sounds: SoundModel | None = None

    # ------------------------------------------------------------------------------------------------------- audio

    def _items(self, cuts: Iterable[DataCut], counts: Counter) -> Iterator[_Item]:
        """Yield the supervisions that can be aligned; count the others."""
        for cut in cuts:
            if not isinstance(cut, DataCut):
                raise ValueError(f"cut {cut.id} is a {type(cut).__name__}: alignment takes single recordings")
            for segment in cut.supervisions:
                words = tuple((segment.text or "").split())
                tokens = [self.ctc.tokens(word) for word in words]
                known = tuple(tuple(row) for row in tokens if row is not None)
                if not any(known):
                    counts["no_text" if len(known) == len(words) else "unknown_word"] += 1
                elif len(known) < len(words):
                    counts["unknown_word"] += 1
                else:
                    samples = self._samples(cut, segment, counts)
                    if samples is not None:
                        yield _Item(cut, segment, words, known, samples)

    def _samples(self, cut: DataCut, segment: SupervisionSegment, counts: Counter) -> Tensor | None:
        whole = segment.start <= 0 and segment.end >= cut.duration
        part = cut if whole else cut.truncate(offset=max(segment.start, 0.0), duration=segment.duration)
        try:
            return load_samples(part, self.ctc.counter, self.config.policy)
        except BadAudioError as error:
            if self.config.on_bad_audio == "raise":
                raise ValueError(f"cut {cut.id}: {error}; on_bad_audio=skip leaves such cuts without times") from error
            counts["bad_audio"] += 1
            return None

    def _batches(self, items: Iterable[_Item]) -> Iterator[list[_Item]]:
        limit = self.config.batch_seconds * self.ctc.sample_rate
        batch: list[_Item] = []
        for item in items:
            longest = max(len(other.samples) for other in (*batch, item))
            if batch and longest * (len(batch) + 1) > limit:
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _encode(self, batch: Sequence[_Item]) -> tuple[list[TokenSpans | None], list[Tensor]]:
        output = self.ctc.encode([item.samples for item in batch])
        spans = self.ctc.align(output, [[t for word in item.tokens for t in word] for item in batch])
        lengths = output.feature_lengths.tolist()
        values = [cepstra(mel[:, :length]) for mel, length in zip(output.features, lengths, strict=True)]
        return spans, values

    # ------------------------------------------------------------------------------------------------------ training

    def learn(self, cuts: Iterable[DataCut], progress: Progress) -> SoundModel:
        """Train the model of the sounds on a part of the corpus.

        Raises:
            ValueError: if CTC can align none of it.
        """
        chosen = _reservoir(cuts, self.config.learn_from, self.config.seed)
        bar = progress.add_task("aligning a part by CTC", total=len(chosen))
        stride, spoken = self.ctc.stride, []
        for batch in self._batches(self._items(chosen, Counter())):
            spans, values = self._encode(batch)
            progress.advance(bar, len(batch))
            for item, own, cepstral in zip(batch, spans, values, strict=True):
                if own is None or min(_scores(item.tokens, own)) < self.config.min_score:
                    continue
                onsets = tuple(first * stride for first in own.first)
                ends = tuple((last + 1) * stride for last in own.last)
                spoken.append(Spoken(cepstral.cpu(), tuple(filter(None, item.tokens)), onsets, ends))
        progress.update(bar, completed=len(chosen))
        bar = progress.add_task("learning its sounds", total=PASSES)
        sounds = train_sounds(spoken, len(self.ctc.pieces), report=lambda: progress.advance(bar))
        progress.update(bar, completed=PASSES)
        self.sounds = sounds
        return sounds

    # ----------------------------------------------------------------------------------------------------- alignment

    def shard(self, cuts: Sequence[DataCut]) -> tuple[list[DataCut], dict]:
        """Return the cuts of a shard with their alignments, and the counts of its report."""
        report = AlignmentReport()
        alignments: dict[tuple[str, str], list[AlignmentItem]] = {}
        for batch in self._batches(self._items(cuts, report.counts)):
            for item, alignment in zip(batch, self._align(batch, report.counts), strict=True):
                if alignment is not None:
                    alignments[item.cut.id, item.segment.id] = alignment
                    _compare(item.segment, alignment, report)
        report.counts["cuts"] += len(cuts)
        aligned = [_with_alignments(cut, alignments) for cut in cuts]
        return aligned, {name: dict(sorted(vars(report)[name].items())) for name in ("counts", "starts", "ends")}

    def _align(self, batch: Sequence[_Item], counts: Counter) -> Iterator[list[AlignmentItem] | None]:
        if self.sounds is None:
            raise RuntimeError("the aligner has no model of the sounds: call learn() first, or set `sounds`")
        spans, values = self._encode(batch)
        chains = [self.sounds.chain(item.tokens) for item in batch]
        paths = self.sounds.paths(values, chains)
        for item, own, chain, path in zip(batch, spans, chains, paths, strict=True):
            frames = None if own is None else word_frames(path, chain, item.tokens)
            if own is None or not frames:
                counts["too_short"] += 1
                yield None
                continue
            scores = _scores(item.tokens, own)
            if min(scores) < self.config.min_score:
                counts["low_score"] += 1
                yield None
                continue
            counts["aligned"] += 1
            counts["words"] += len(item.words)
            yield self._times(item, frames, scores)

    def _times(
        self, item: _Item, frames: Sequence[tuple[int, int] | None], scores: Sequence[float]
    ) -> list[AlignmentItem]:
        """Return the words in the time of the recording, as Lhotse keeps alignments."""
        hop = self.ctc.hop / self.ctc.sample_rate
        length = len(item.samples) / self.ctc.sample_rate
        offset = item.cut.start + max(item.segment.start, 0.0)
        now, alignment = 0.0, []
        for word, span, score in zip(item.words, frames, scores, strict=True):
            # a frame stands for the hop about its center; a word without a sound lasts no time
            start, end = (now, now) if span is None else ((span[0] - 0.5) * hop, (span[1] + 0.5) * hop)
            start, now = max(start, 0.0), min(end, length)
            alignment.append(AlignmentItem(word, round(offset + start, 4), round(now - start, 4), round(score, 4)))
        return alignment


def _scores(tokens: Sequence[Sequence[int]], spans: TokenSpans) -> list[float]:
    """Return the score of each word; 1 for one without a sound."""
    scores, position = [], 0
    for word in tokens:
        best = torch.tensor(spans.probability[position : position + len(word)], dtype=torch.float64)
        scores.append(float(best.log().mean().exp()) if len(word) else 1.0)
        position += len(word)
    return scores


def _compare(segment: SupervisionSegment, alignment: Sequence[AlignmentItem], report: AlignmentReport) -> None:
    former = [item for item in (segment.alignment or {}).get("word", ()) if item.symbol.strip()]
    if [item.symbol for item in former] == [item.symbol for item in alignment]:
        for a, b in zip(former, alignment, strict=True):
            report.starts[round(1000 * abs(a.start - b.start))] += 1
            report.ends[round(1000 * abs(a.end - b.end))] += 1


def _median(counted: Counter) -> int:
    """Return the median of distances by how often they came; the lower one of two."""
    half, distances = (counted.total() + 1) // 2, sorted(counted)
    below = accumulate(counted[distance] for distance in distances)
    return next(distance for distance, words in zip(distances, below, strict=True) if words >= half)


def _with_alignments(cut: DataCut, alignments: Mapping[tuple[str, str], list[AlignmentItem]]) -> DataCut:
    """Return the cut with new word alignments, and without those that it had."""

    def aligned(segment: SupervisionSegment) -> SupervisionSegment:
        rest = {kind: items for kind, items in (segment.alignment or {}).items() if kind != "word"}
        words = alignments.get((cut.id, segment.id))
        return fastcopy(segment, alignment={**rest, "word": words} if words else rest or None)

    return fastcopy(cut, supervisions=[aligned(segment) for segment in cut.supervisions])


def _reservoir(cuts: Iterable[DataCut], size: int, seed: int) -> list[DataCut]:
    """Return an even draw from a stream, in its order (Vitter's algorithm R)."""
    rng, kept = random.Random(seed), []
    for number, cut in enumerate(cuts):
        if number < size:
            kept.append((number, cut))
        elif (place := rng.randrange(number + 1)) < size:
            kept[place] = (number, cut)
    return [cut for _, cut in sorted(kept, key=lambda entry: entry[0])]


# ------------------------------------------------------------------------------------------------------------- corpus


def align_corpus(
    cuts: CutSet,
    out_dir: str | Path,
    ctc: CTCModel,
    config: AlignConfig,
    *,
    source: str,
    total: int | None = None,
    console: Console | None = None,
) -> AlignmentReport:
    """Align a corpus, or what is left of it after a run that was killed.

    Args:
        cuts: read lazily, twice: the sounds are learned first.
        out_dir: of the shards, the sounds and the report.
        ctc: the model.
        config: how.
        source: names model and corpus, so that shards of others are not taken for these.
        total: number of cuts, for the progress bar.
        console: where it is shown.

    Raises:
        ValueError: if the folder holds alignments made otherwise, or a cut can't be aligned at all.
    """
    folder = make_folder(out_dir, "--out")
    _check_settings(folder, {**{name: getattr(config, name) for name in _DECISIVE}, "source": source})
    aligner, report = CorpusAligner(ctc, config), AlignmentReport()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress, Heartbeat(lambda: bar_text(progress), progress.console):
        if (folder / SOUNDS_FILE).is_file():
            sounds = SoundModel.load(folder / SOUNDS_FILE)
        else:
            sounds = aligner.learn(cuts, progress)
            sounds.save(folder / SOUNDS_FILE)
        aligner.sounds = sounds.to(ctc.device)
        bar = progress.add_task("aligning", total=total)
        for number, shard in enumerate(split_into_shards(cuts, config.shard_size)):
            path = shard_path(folder, number)
            counts_file = path.with_name(path.name.replace(".jsonl.gz", ".json"))  # written behind its shard
            if not counts_file.is_file():
                aligned, counted = aligner.shard(shard)
                write_shard(path, aligned)
                _write_json(counts_file, counted)
            report.add(json.loads(counts_file.read_text()))
            progress.advance(bar, len(shard))
    _write_json(folder / REPORT_FILE, report.as_dict())
    return report


def _check_settings(folder: Path, settings: Mapping) -> None:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        _write_json(path, settings)
    former = json.loads(path.read_text())
    other = sorted(key for key in settings if settings[key] != former.get(key))
    if other:
        raise ValueError(
            f"{folder} holds alignments made with other {', '.join(other)}: give another folder, or remove this one"
        )


def _write_json(path: Path, content: Mapping) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
