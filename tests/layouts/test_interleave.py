# SPDX-License-Identifier: Apache-2.0
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.config.interleave import InterleaveConfig, InterleaveSchedule
from nemo_mtbi.layouts.interleave import (
    WordSpan,
    choose_text,
    interleave,
    interleave_wave,
    sentences,
    speech_only,
    text_only,
)

FRAME = 0.16


@st.composite
def utterances(draw):
    """Words with silences and overlaps between them, some too short for a frame, some without tokens."""
    number = draw(st.integers(0, 8))
    time, words = 0.0, []
    for _ in range(number):
        time += draw(st.sampled_from([0.0, 0.0, 0.05, 0.3, -0.1]))
        start = max(time, words[-1].start_s if words else 0.0)
        time = start + draw(st.sampled_from([0.0, 0.02, 0.1, 0.2, 0.5]))
        words.append(WordSpan(start, time))
    num_frames = draw(st.integers(0, int(max(time, 0) / FRAME) + 5))
    chosen = draw(st.lists(st.booleans(), min_size=number, max_size=number))
    word_tokens = [[100 * i + j for j in range(draw(st.integers(0, 3)))] for i in range(number)]
    return words, chosen, word_tokens, num_frames


def owners(words, num_frames):
    """The definition, frame by frame: the first word whose times hold the midpoint."""
    middles = [(f + 0.5) * FRAME for f in range(num_frames)]
    return [next((i for i, w in enumerate(words) if w.start_s <= m < w.end_s), None) for m in middles]


@given(utterances())
def test_nothing_is_lost_doubled_or_out_of_order(utterance):
    words, chosen, word_tokens, num_frames = utterance
    layout = interleave(words, chosen, word_tokens, num_frames, FRAME)
    frames = [-(v + 1) for v in layout if v < 0]
    assert frames == sorted(set(frames))
    assert all(f < num_frames for f in frames)
    owner = owners(words, num_frames)
    owned = {i: [f for f in range(num_frames) if owner[f] == i] for i in range(len(words))}
    written_values = [v for v in layout if v >= 0]
    expected_text = []
    for i, tokens in enumerate(word_tokens):
        spoken = [f for f in owned[i] if f in frames]
        assert spoken in ([], owned[i])  # a word is spoken as a whole or not at all
        written = bool(tokens) and (chosen[i] or not owned[i])
        assert bool(spoken) == (bool(owned[i]) and not written)
        if written:
            expected_text += tokens
    assert written_values == expected_text  # each written word once, in order


@given(utterances())
def test_silence_goes_only_inside_a_run_of_written_words(utterance):
    words, chosen, word_tokens, num_frames = utterance
    layout = interleave(words, chosen, word_tokens, num_frames, FRAME)
    owner = owners(words, num_frames)
    written = [bool(t) and (chosen[i] or i not in owner) for i, t in enumerate(word_tokens)]
    for frame in range(num_frames):
        if owner[frame] is not None:
            continue
        middle = (frame + 0.5) * FRAME
        after = next((i for i, w in enumerate(words) if w.end_s > middle), len(words))
        inside = 0 < after < len(words) and written[after - 1] and written[after]
        assert (-(frame + 1) in layout) != inside


@given(utterances())
def test_text_and_speech_stand_in_the_order_of_the_words(utterance):
    words, chosen, word_tokens, num_frames = utterance
    owner = owners(words, num_frames)
    order = []
    for value in interleave(words, chosen, word_tokens, num_frames, FRAME):
        index = value // 100 if value >= 0 else owner[-(value + 1)]
        if index is not None:
            order.append(index)
    assert order == sorted(order)


@given(utterances())
def test_without_chosen_words_and_with_long_words_it_is_all_speech(utterance):
    words, _, word_tokens, num_frames = utterance
    keep = [(w, t) for i, (w, t) in enumerate(zip(words, word_tokens, strict=True)) if i in owners(words, num_frames)]
    layout = interleave([w for w, _ in keep], [False] * len(keep), [t for _, t in keep], num_frames, FRAME)
    assert layout == speech_only(num_frames)


def test_by_hand():
    # frames:    0 silence | 1,2 "a" | 3 silence | 4 "b" | 5,6 "c" | 7 silence
    words = [WordSpan(0.2, 0.45), WordSpan(0.65, 0.8), WordSpan(0.8, 1.1)]
    tokens = [[10], [20, 21], [30]]
    assert interleave(words, [False, True, False], tokens, 8, FRAME) == [-1, -2, -3, -4, 20, 21, -6, -7, -8]
    assert interleave(words, [True, True, False], tokens, 8, FRAME) == [-1, 10, 20, 21, -6, -7, -8]
    assert interleave(words, [True, True, True], tokens, 8, FRAME) == [-1, 10, 20, 21, 30, -8]
    assert text_only(tokens) == [10, 20, 21, 30]


def test_a_word_that_owns_no_frame_is_written():
    words = [WordSpan(0.0, 0.3), WordSpan(0.3, 0.35), WordSpan(0.35, 0.6)]
    assert interleave(words, [False] * 3, [[1], [2], [3]], 3, FRAME) == [-1, -2, 2, -3]


def test_bad_times_and_lengths_are_errors():
    with pytest.raises(ValueError, match="one of each per word"):
        interleave([WordSpan(0, 1)], [True, False], [[1]], 3, FRAME)
    with pytest.raises(ValueError, match="not in order"):
        interleave([WordSpan(1, 2), WordSpan(0, 1)], [True, False], [[1], [2]], 3, FRAME)
    with pytest.raises(ValueError, match="not in order"):
        interleave([WordSpan(2, 1)], [True], [[1]], 3, FRAME)


# ----------------------------------------------------------------------------------------------- at the level of waves


@given(utterances(), st.integers(1, 40))
def test_pieces_of_the_wave_are_in_order_and_hold_no_written_word(utterance, smallest):
    words, chosen, word_tokens, num_frames = utterance
    rate, samples = 100, 16 * num_frames
    row = interleave_wave(words, chosen, word_tokens, samples, rate, lambda n: n // smallest)
    flat = [moment for piece in row.pieces for moment in piece]
    assert flat == sorted(flat) and all(0 <= moment <= samples for moment in flat)
    assert [-(v + 1) for v in row.layout if v < 0] == list(range(sum((b - a) // smallest for a, b in row.pieces)))
    for word, written, tokens in zip(words, chosen, word_tokens, strict=True):
        if written and tokens:
            start, end = round(word.start_s * rate), round(word.end_s * rate)
            assert all(b <= start or a >= end or start >= end for a, b in row.pieces)
    text = [v for v in row.layout if v >= 0]
    assert text == sorted(text) and set(text) >= {
        t for w, ts in zip(chosen, word_tokens, strict=True) if w for t in ts
    }


def test_pieces_by_hand():
    words = [WordSpan(0.2, 0.4), WordSpan(0.6, 0.8), WordSpan(0.9, 1.1)]
    tokens = [[10], [20, 21], [30]]

    def cut(*chosen):
        row = interleave_wave(words, chosen, tokens, 150, 100, lambda n: n // 15)
        return row.pieces, list(row.layout)

    assert cut(False, False, False) == (((0, 150),), [-n for n in range(1, 11)])
    assert cut(False, True, False) == (((0, 60), (80, 150)), [-1, -2, -3, -4, 20, 21, -5, -6, -7, -8])
    assert cut(True, True, False) == (((80, 150),), [10, 20, 21, -1, -2, -3, -4])
    assert cut(True, True, True) == ((), [10, 20, 21, 30])
    # between two written words too little is left for a frame
    narrow = [WordSpan(0.0, 0.5), WordSpan(0.5, 0.6), WordSpan(0.6, 1.5)]
    assert interleave_wave(narrow, (True, False, True), tokens, 150, 100, lambda n: n // 15).pieces == ()


# -------------------------------------------------------------------------------------------------------- which words


def test_sentences_end_with_their_punctuation():
    assert sentences('He said: "go!" Then he left. Did he'.split()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sentences([]) == []


@given(
    st.lists(st.sampled_from(["a", "b.", "c?"]), max_size=30),
    st.sampled_from(["word", "span", "sentence"]),
    st.floats(0, 1),
    st.sampled_from(["any", "text", "speech"]),
    st.integers(0, 10_000),
)
def test_a_choice_leaves_at_least_one_unit_speech_and_keeps_the_share(words, unit, share, first, seed):
    config = InterleaveConfig(probability=1.0, unit=unit, text_share=share, first=first)
    chosen = choose_text(words, config, random.Random(seed))
    assert len(chosen) == len(words)
    of = sentences(words) if unit == "sentence" else range(len(words))
    units = dict(zip(of, chosen, strict=True))
    assert [units[n] for n in of] == chosen  # a sentence is written whole
    written, number = sum(units.values()), len(units)
    assert written <= max(share * number + 0.5, 1) and written <= max(number - 1, 0)
    assert any(chosen) == (number >= 2 and share > 0)
    if any(chosen) and first != "any":
        assert chosen[0] == (first == "text")
    assert chosen == choose_text(words, config, random.Random(seed))


def test_probability_is_the_share_of_interleaved_rows():
    words = ["word"] * 10
    config = InterleaveConfig(probability=0.3, all_text=0.2)
    rows = [choose_text(words, config, random.Random(seed)) for seed in range(4000)]
    assert abs(sum(any(row) and not all(row) for row in rows) / 4000 - 0.3) < 0.03
    assert abs(sum(map(all, rows)) / 4000 - 0.2) < 0.03
    assert not any(choose_text(words, InterleaveConfig(probability=0.0), random.Random(0)))


def test_a_schedule_goes_in_a_straight_line():
    config = InterleaveConfig(0.2, text_share=0.5, schedule=InterleaveSchedule(epochs=4, probability=0.8))
    assert [round(config.at(epoch).probability, 6) for epoch in range(6)] == [0.8, 0.65, 0.5, 0.35, 0.2, 0.2]
    assert {config.at(epoch).text_share for epoch in range(6)} == {0.5} and config.at(1).schedule is None
    assert InterleaveConfig(0.2).at(3) == InterleaveConfig(0.2)


def run_lengths(unit, mean_span):
    config = InterleaveConfig(probability=1.0, unit=unit, text_share=0.1, mean_span=mean_span)
    lengths = []
    for seed in range(300):
        run = 0
        for chosen in [*choose_text(["word"] * 400, config, random.Random(seed)), False]:
            if chosen:
                run += 1
            elif run:
                lengths.append(run)
                run = 0
    return lengths


def test_spans_have_the_mean_length_that_was_asked_for():
    assert statistics.mean(run_lengths("word", 5.0)) < 1.2
    assert statistics.mean(run_lengths("span", 1.0)) < 1.2
    assert 4.3 < statistics.mean(run_lengths("span", 5.0)) < 6.0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"probability": 1.5}, "interleave.probability"),
        ({"text_share": -0.1}, "interleave.text_share"),
        ({"unit": "syllable"}, "must be one of word, span, sentence"),
        ({"first": "words"}, "interleave.first is 'words'; it must be one of any, text, speech"),
        ({"level": "mel"}, "interleave.level is 'mel'; it must be embedding or wave"),
        ({"all_text": 0.6}, "together they must be at most 1"),
        ({"mean_span": 0.0}, "interleave.mean_span"),
    ],
)
def test_values_out_of_range_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        InterleaveConfig(**values)


@pytest.mark.parametrize("values, key", [({"probability": 2.0}, "probability"), ({"epochs": 0}, "epochs")])
def test_values_of_a_schedule_out_of_range_are_errors(values, key):
    with pytest.raises(ValueError, match=f"model.interleave.schedule.{key} is"):
        InterleaveSchedule(**values)
