# SPDX-License-Identifier: Apache-2.0
"""Speech-text interleaving: some words of an utterance are given as text, the rest stays speech.

An interleaved utterance is nothing but another layout for the audio slot of the prompt. At the level of embeddings the
encoder still gets the whole utterance, so a speech frame beside a written word depends on that word too. At the level
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
    """Time of a word.

    Attributes:
        start_s: in seconds from the start of the audio.
        end_s: the first moment after the word.
    """

    start_s: float
    end_s: float


def sentences(words: Sequence[str]) -> list[int]:
    """Return the number of each word's sentence; a word with a full stop, question mark or the like ends one."""
    numbers, number = [], 0
    for word in words:
        numbers.append(number)
        number += word.rstrip(CLOSING)[-1:] in tuple(SENTENCE_ENDS)
    return numbers


def choose_text(words: Sequence[str], config: InterleaveConfig, rng: random.Random) -> list[bool]:
    """Draw the words that are given as text.

    Args:
        words: of the transcript.
        config: shares and units.
        rng: random generator; the order of its draws is part of what makes runs reproducible.

    Returns:
        For each word whether it is written: all ``False`` for a row that stays speech (or has a single unit), all
        ``True`` for one that is text.
    """
    # 1. Which kind of row: interleaved, all text, or all speech.
    kind = rng.random()
    if kind >= config.probability:
        return [kind < config.probability + config.all_text] * len(words)
    # 2. Group the words into units. With a single unit there is nothing to mix.
    unit_of = sentences(words) if config.unit == "sentence" else list(range(len(words)))
    units = [len(list(group)) for _, group in groupby(unit_of)]  # words in each
    if len(units) < 2 or config.text_share == 0.0:
        return [False] * len(words)
    # 3. How many units are written: a share drawn for this row; at least one is, and at least one is not.
    count = min(max(round(rng.uniform(0.0, config.text_share) * len(units)), 1), len(units) - 1)
    # 4. Which ones. The first unit is kept out if the row begins with speech, and forced in if it begins with text.
    free = list(range(config.first == "speech", len(units)))  # units that may be written
    chosen = _draw_spans(free, count, config, rng) if config.unit == "span" else set(rng.sample(free, count))
    if config.first == "text" and 0 not in chosen:
        chosen = chosen - {min(chosen)} | {0}
    return [unit in chosen for unit, length in enumerate(units) for _ in range(length)]


def _draw_spans(free: Sequence[int], count: int, config: InterleaveConfig, rng: random.Random) -> set[int]:
    """Draw ``count`` of the units ``free``, in runs whose length is 1 + Poisson(mean_span - 1)."""
    chosen: set[int] = set()
    while len(chosen) < count:
        start = rng.randrange(len(free))
        for unit in free[start : start + 1 + _poisson(config.mean_span - 1.0, rng)]:
            if len(chosen) < count:
                chosen.add(unit)
    return chosen


def _poisson(mean: float, rng: random.Random) -> int:
    """Draw from the Poisson distribution by Knuth's method; the standard library has none."""
    limit, product, count = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        count += 1
    return count


def _frames_of_words(
    words: Sequence[WordSpan], num_frames: int, frame_seconds: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the frames of each word, and of the silence before each word and after the last.

    Every frame is in exactly one list.
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
    """Return the layout of the audio slot: speech frames, and token ids or pieces of text, in order of time.

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
    spoken, silence = _frames_of_words(words, num_frames, frame_seconds)
    written = [bool(word_tokens[i]) and (is_text[i] or not spoken[i]) for i in range(len(words))]
    layout: list[int | str] = []
    for i in range(len(words) + 1):  # the silence before each word, then the word; one more silence at the end
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
    """Content of the audio slot of a row, and the pieces of audio that it points into.

    Attributes:
        pieces: ``(start, end)`` in samples of what is encoded alone, in order: the whole utterance, spoken runs, or
            nothing. Each gives at least one frame.
        layout: values of the slot; the frames of all pieces are numbered on from piece to piece.
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
    """Return the audio slot of a row whose runs of spoken words are cut out of the wave and encoded alone.

    A run of spoken words is cut out with the silences about it: it begins where the written word before it ends, and
    ends where the next written one starts. A run that gives no frame is written; one without tokens is left out.

    Args:
        words: times of the words, in order.
        is_text: which words are given as text (:func:`choose_text`).
        word_tokens: token ids or pieces of text of each word, such that their concatenation is the transcript.
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
    num_frames = 0  # of all pieces so far
    start = 0  # sample at which the last of the written words ends
    for is_written, group in groupby(range(len(words)), key=written.__getitem__):
        run = list(group)  # neighbouring words that are all written, or all spoken
        if is_written:
            # The next piece begins behind the last of these words; words may overlap, so their order does not tell.
            start = max(start, *(round(words[index].end_s * sample_rate) for index in run))
            layout += text_only([word_tokens[index] for index in run])
            continue
        # The piece goes on up to the next word, which is written, or to the end of the utterance.
        end = num_samples if run[-1] == len(words) - 1 else round(words[run[-1] + 1].start_s * sample_rate)
        end = min(end, num_samples)
        count = frames(max(end - start, 0))
        if count:
            pieces.append((start, end))
            layout += speech(num_frames, count)
            num_frames += count
        else:  # too short for a single frame
            layout += text_only([word_tokens[index] for index in run])
    return AudioSlot(tuple(pieces), tuple(layout))


def text_only(word_tokens: Sequence[Sequence[int | str]]) -> list[int | str]:
    """Return the layout of an utterance that is all text."""
    return [token for tokens in word_tokens for token in tokens]


def speech_only(num_frames: int) -> list[int]:
    """Return the layout of an utterance that is all speech."""
    return speech(0, num_frames)
