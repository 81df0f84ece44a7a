# SPDX-License-Identifier: Apache-2.0
"""Speech-text interleaving: some words of an utterance are given as text, the rest stays speech.

An interleaved utterance is nothing but another layout for the audio slot of the prompt. The encoder still hears the
whole utterance, so a speech frame beside a written word has heard that word too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemo_mtbi.data.layout import speech

UNITS = ("word", "span")


@dataclass(frozen=True)
class InterleaveConfig:
    """How often and how much of an utterance is given as text.

    Attributes:
        probability: share of the rows that are interleaved; the others stay all speech.
        unit: ``word`` chooses single words, ``span`` runs of neighbouring words.
        text_share: upper bound of the share of words given as text. Every interleaved row draws its own share
            uniformly from 0 to this bound; at least one word is written and at least one stays speech.
        mean_span: mean length of a span in words; the length is 1 + Poisson(mean_span - 1).

    Raises:
        ValueError: if a value is out of range.
    """

    probability: float = 0.5
    unit: str = "span"
    text_share: float = 0.5
    mean_span: float = 3.0

    def __post_init__(self):
        for name in ("probability", "text_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"interleave.{name} is a share and must lie between 0 and 1, got {value}")
        if self.unit not in UNITS:
            raise ValueError(f"interleave.unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        if not 1.0 <= self.mean_span <= 100.0:
            raise ValueError(f"interleave.mean_span counts words and must lie between 1 and 100, got {self.mean_span}")


@dataclass(frozen=True)
class WordSpan:
    """When a word is spoken, in seconds from the start of the audio; ``end_s`` is the first moment after it."""

    start_s: float
    end_s: float


def choose_text(num_words: int, config: InterleaveConfig, rng: random.Random) -> list[bool]:
    """Draws the words that are given as text; all ``False`` for a row that stays speech (or has a single word)."""
    chosen = [False] * num_words
    if rng.random() >= config.probability or num_words < 2 or config.text_share == 0.0:
        return chosen
    share = rng.uniform(0.0, config.text_share)
    count = min(max(round(share * num_words), 1), num_words - 1)
    if config.unit == "word":
        for index in rng.sample(range(num_words), count):
            chosen[index] = True
        return chosen
    while count:
        start = rng.randrange(num_words)
        for index in range(start, min(start + 1 + _poisson(config.mean_span - 1.0, rng), num_words)):
            if count and not chosen[index]:
                chosen[index] = True
                count -= 1
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
    word_tokens: Sequence[Sequence[int]],
    num_frames: int,
    frame_seconds: float,
) -> list[int]:
    """Layout values for the audio slot: speech frames of the utterance and token ids, in the order of time.

    The frames of a run of written words, and of the silences inside the run, are left out; all other silences stay. A
    word that owns no frame is written, whatever ``is_text`` says; a word without tokens stays speech.

    Args:
        words: times of the words, in order.
        is_text: which words are given as text (:func:`choose_text`).
        word_tokens: token ids of each word, such that their concatenation is the transcript.
        num_frames: connector frames of the utterance.
        frame_seconds: time from one frame to the next.

    Raises:
        ValueError: if the three lists differ in length, or the times are not in order.
    """
    if not len(words) == len(is_text) == len(word_tokens):
        raise ValueError(
            f"{len(words)} word times, {len(is_text)} choices and {len(word_tokens)} token lists: one of each per word"
        )
    if any(word.end_s < word.start_s for word in words) or any(b.start_s < a.start_s for a, b in pairwise(words)):
        raise ValueError("the word times are not in order: check the alignment, or drop it and the row stays speech")
    spoken, silence = _segments(words, num_frames, frame_seconds)
    written = [bool(word_tokens[i]) and (is_text[i] or not spoken[i]) for i in range(len(words))]
    layout: list[int] = []
    for i in range(len(words) + 1):
        inside_run = 0 < i < len(words) and written[i - 1] and written[i]
        frames = [] if inside_run else list(silence[i])
        if i < len(words) and not written[i]:
            frames += spoken[i]
        layout += [-(frame + 1) for frame in frames]
        if i < len(words) and written[i]:
            layout += word_tokens[i]
    return layout


def text_only(word_tokens: Sequence[Sequence[int]]) -> list[int]:
    """The whole utterance as text."""
    return [token for tokens in word_tokens for token in tokens]


def speech_only(num_frames: int) -> list[int]:
    """The whole utterance as speech."""
    return speech(0, num_frames)
