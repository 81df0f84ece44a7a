# SPDX-License-Identifier: Apache-2.0
"""Speech-text interleaving: some words of an utterance are given as text, the rest stays speech.

An interleaved utterance is nothing but another layout for the audio slot of the prompt. At the level of embeddings the
encoder still hears the whole utterance, so a speech frame beside a written word has heard that word too. At the level
of the wave each run of spoken words is cut out and encoded alone, at the price of encoding it for each row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from nemo_mtbi.config.interleave import InterleaveConfig
from nemo_mtbi.layouts.layout import speech

SENTENCE_ENDS, CLOSING = ".?!…。？！।", "\"'”’»)]}"


@dataclass(frozen=True)
class WordSpan:
    """When a word is spoken, in seconds from the start of the audio; ``end_s`` is the first moment after it."""

    start_s: float
    end_s: float


def sentences(words: Sequence[str]) -> list[int]:
    """The number of the sentence of each word: one ends behind a word with a full stop, question mark or the like."""
    numbers, number = [], 0
    for word in words:
        numbers.append(number)
        number += word.rstrip(CLOSING)[-1:] in tuple(SENTENCE_ENDS)
    return numbers


def choose_text(words: Sequence[str], config: InterleaveConfig, rng: random.Random) -> list[bool]:
    """Draws the words that are given as text.

    Returns:
        For each word whether it is written: all ``False`` for a row that stays speech (or has a single unit), all
        ``True`` for one that is text.
    """
    kind = rng.random()
    if kind >= config.probability:
        return [kind < config.probability + config.all_text] * len(words)
    unit_of = sentences(words) if config.unit == "sentence" else list(range(len(words)))
    units = [len(list(group)) for _, group in groupby(unit_of)]  # words in each
    if len(units) < 2 or config.text_share == 0.0:
        return [False] * len(words)
    count = min(max(round(rng.uniform(0.0, config.text_share) * len(units)), 1), len(units) - 1)
    free = list(range(config.first == "speech", len(units)))  # units that may be written
    chosen = _draw_spans(free, count, config, rng) if config.unit == "span" else set(rng.sample(free, count))
    if config.first == "text" and 0 not in chosen:
        chosen = chosen - {min(chosen)} | {0}
    return [unit in chosen for unit, length in enumerate(units) for _ in range(length)]


def _draw_spans(free: Sequence[int], count: int, config: InterleaveConfig, rng: random.Random) -> set[int]:
    """``count`` of ``free``, in runs."""
    chosen: set[int] = set()
    while len(chosen) < count:
        start = rng.randrange(len(free))
        for unit in free[start : start + 1 + _poisson(config.mean_span - 1.0, rng)]:
            if len(chosen) < count:
                chosen.add(unit)
    return chosen


def _poisson(mean: float, rng: random.Random) -> int:
    """Knuth's method: the standard library has no Poisson distribution."""
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count


def _segments(
    words: Sequence[WordSpan], num_frames: int, frame_seconds: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Frames of each word, and of the silence before each word and after the last. Every frame is in one list.

    A frame belongs to the word in whose ``[start, end)`` its midpoint lies, to the earlier one where words overlap.
    """
    spoken: list[list[int]] = [[] for _ in words]
    silence: list[list[int]] = [[] for _ in range(len(words) + 1)]
    word = 0
    for frame in range(num_frames):
        middle = (frame + 0.5) * frame_seconds
        while word < len(words) and words[word].end_s <= middle:
            word += 1
        inside = word < len(words) and words[word].start_s <= middle
        (spoken if inside else silence)[word].append(frame)
    return spoken, silence


def interleave(
    words: Sequence[WordSpan],
    is_text: Sequence[bool],
    word_tokens: Sequence[Sequence[int | str]],
    num_frames: int,
    frame_seconds: float,
) -> list[int | str]:
    """Values for the audio slot: speech frames of the utterance, and token ids or pieces of text, in order of time.

    The frames of a run of written words, and of the silences inside the run, are left out; all other silences stay. A
    word that owns no frame is written, whatever ``is_text`` says; a word without tokens stays speech.

    Args:
        words: times of the words, in order.
        is_text: which words are given as text (:func:`choose_text`).
        word_tokens: token ids or pieces of text of each word, such that their concatenation is the transcript.
        num_frames: connector frames of the utterance.
        frame_seconds: time from one frame to the next.

    Raises:
        ValueError: if the three lists differ in length, or the times are not in order.
    """
    _check(words, is_text, word_tokens)
    spoken, silence = _segments(words, num_frames, frame_seconds)
    written = [bool(word_tokens[i]) and (is_text[i] or not spoken[i]) for i in range(len(words))]
    layout: list[int | str] = []
    for i in range(len(words) + 1):
        inside_run = 0 < i < len(words) and written[i - 1] and written[i]
        frames = [] if inside_run else list(silence[i])
        if i < len(words) and not written[i]:
            frames += spoken[i]
        layout += [-(frame + 1) for frame in frames]
        if i < len(words) and written[i]:
            layout += word_tokens[i]
    return layout


def _check(words: Sequence[WordSpan], is_text: Sequence[bool], word_tokens: Sequence[Sequence[int | str]]) -> None:
    if not len(words) == len(is_text) == len(word_tokens):
        raise ValueError(
            f"{len(words)} word times, {len(is_text)} choices and {len(word_tokens)} token lists: one of each per word"
        )
    if any(word.end_s < word.start_s for word in words) or any(b.start_s < a.start_s for a, b in pairwise(words)):
        raise ValueError("the word times are not in order: check the alignment, or drop it and the row stays speech")


@dataclass(frozen=True)
class AudioSlot:
    """What a row hears.

    Attributes:
        pieces: ``(start, end)`` in samples of what is encoded alone, in order: the whole utterance, spoken runs, or
            nothing. None owns less than one frame.
        layout: the audio slot; the frames of all pieces are numbered on from piece to piece.
    """

    pieces: tuple[tuple[int, int], ...]
    layout: tuple[int | str, ...]


def interleave_wave(
    words: Sequence[WordSpan],
    is_text: Sequence[bool],
    word_tokens: Sequence[Sequence[int | str]],
    num_samples: int,
    sample_rate: int,
    frames: Callable[[int], int],
) -> AudioSlot:
    """The same as :func:`interleave`, at the level of the wave.

    A run of spoken words is cut out with the silences about it: it begins where the written word before it ends, and
    ends where the next written one starts. A run that owns no frame is written; one without tokens is left out.

    Args:
        words, is_text, word_tokens: see :func:`interleave`.
        num_samples: of the utterance.
        sample_rate: in hertz.
        frames: connector frames of a number of samples.

    Raises:
        ValueError: if the three lists differ in length, or the times are not in order.
    """
    _check(words, is_text, word_tokens)
    written = [bool(is_text[i]) and bool(word_tokens[i]) for i in range(len(words))]
    pieces: list[tuple[int, int]] = []
    layout: list[int | str] = []
    owned = start = 0  # frames so far; where the last of the written words ends
    for is_written, group in groupby(range(len(words)), key=written.__getitem__):
        run = list(group)
        end = num_samples if run[-1] == len(words) - 1 else round(words[run[-1] + 1].start_s * sample_rate)
        end = min(end, num_samples)
        count = 0 if is_written else frames(max(end - start, 0))
        if is_written:
            start = max(start, *(round(words[index].end_s * sample_rate) for index in run))
        if count:
            pieces.append((start, end))
            layout += speech(owned, count)
            owned += count
        else:
            layout += [token for index in run for token in word_tokens[index]]
    return AudioSlot(tuple(pieces), tuple(layout))


def text_only(word_tokens: Sequence[Sequence[int | str]]) -> list[int | str]:
    """The whole utterance as text."""
    return [token for tokens in word_tokens for token in tokens]


def speech_only(num_frames: int) -> list[int]:
    """The whole utterance as speech."""
    return speech(0, num_frames)
