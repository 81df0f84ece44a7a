# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.layouts.layout import (
    IGNORE,
    MicroBatch,
    Row,
    StepBatch,
    collate,
    group_by_length,
    make_row,
    speech,
)

tokens = st.integers(0, 50)


@st.composite
def steps(draw):
    """Utterances with frame counts, and rows that point at them (or at none)."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        utterance = draw(st.one_of(st.none(), st.integers(0, len(counts) - 1)))
        frames = [] if utterance is None else speech(0, draw(st.integers(0, counts[utterance])))
        prompt = draw(st.lists(tokens, min_size=1, max_size=4)) + frames + draw(st.lists(tokens, max_size=3))
        rows.append(make_row(prompt, draw(st.lists(tokens, min_size=1, max_size=5)), utterance))
    return counts, rows


def build(counts, rows, micro_batch_tokens=20):
    return collate([torch.ones(10 * n) for n in counts], counts, rows, micro_batch_tokens)


def test_a_row_predicts_each_response_token_from_the_position_before_it():
    row = make_row([7, -1, 8], [4, 5, 2], utterance=0)
    assert row.layout == (7, -1, 8, 4, 5)
    assert row.labels == (IGNORE, IGNORE, 4, 5, 2)


@pytest.mark.parametrize("prompt, response", [([], [1]), ([1], [])])
def test_a_row_needs_a_prompt_and_a_response(prompt, response):
    with pytest.raises(ValueError, match="needs a prompt and a response"):
        make_row(prompt, response)


@given(steps())
def test_every_row_comes_back_from_its_microbatch(step):
    counts, rows = step
    offsets = [sum(counts[:u]) for u in range(len(counts))]
    expected = sorted(
        (
            tuple(v if v >= 0 else v - offsets[row.utterance] for v in row.layout),
            row.labels,
        )
        for row in rows
    )
    batch = build(counts, rows)
    found = []
    for micro in batch.microbatches:
        for r, length in enumerate(micro.lengths.tolist()):
            found.append((tuple(micro.layout[r, :length].tolist()), tuple(micro.labels[r, :length].tolist())))
            assert (micro.labels[r, length:] == IGNORE).all()
    assert sorted(found) == expected
    assert batch.num_frames == sum(counts)
    assert batch.audio.shape == (len(counts), 10 * max(counts))
    assert batch.audio_lengths.tolist() == [10 * n for n in counts]


@given(steps())
def test_targets_are_the_labels_in_the_order_of_megatrons_hidden_states(step):
    batch = build(*step)
    count = 0
    for micro in batch.microbatches:
        num_rows = len(micro.lengths)
        expected = [
            (t * num_rows + r, int(micro.labels[r, t]))
            for t in range(micro.labels.shape[1])
            for r in range(num_rows)
            if micro.labels[r, t] != IGNORE
        ]
        assert list(zip(micro.response_index.tolist(), micro.targets.tolist(), strict=True)) == expected
        count += len(expected)
    assert batch.num_targets == count


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_groups_partition_the_rows_and_keep_the_bound(lengths, bound):
    groups = group_by_length(lengths, bound)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= bound


def test_a_layout_past_the_last_frame_is_an_error():
    row = make_row([1, *speech(0, 3)], [2], utterance=0)
    with pytest.raises(ValueError, match="points at speech frame 2, but there are only 2 frames"):
        collate([torch.ones(5)], [2], [row], 100, ["a"])


def test_speech_in_a_row_without_utterance_is_an_error():
    with pytest.raises(ValueError, match="row without audio"):
        collate([], [], [Row((1, -1), (IGNORE, 2))], 100)


def test_no_row_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        collate([], [], [], 100)


def test_text_rows_need_no_audio():
    batch = collate([], [], [make_row([1], [2, 3])], 100)
    assert batch.num_frames == 0 and batch.num_targets == 2


def test_the_pad_value_is_no_target_even_if_it_is_a_token():
    micro = MicroBatch.from_rows([make_row([1, 2, 3], [0, 0]), make_row([1], [0])], [])
    assert micro.targets.tolist() == [0, 0, 0]
    assert micro.lengths.tolist() == [4, 1]


def test_an_empty_step_carries_only_its_counts():
    batch = StepBatch.empty({"silent": 2})
    assert (batch.num_frames, batch.num_targets, batch.microbatches, batch.cut_ids) == (0, 0, [], [])
    assert batch.to("cpu").skipped == {"silent": 2}


def test_to_moves_and_keeps():
    batch = build([2], [make_row([1, -1], [2], 0)])
    batch.skipped["empty"] = 1
    moved = batch.to("cpu")
    assert moved.skipped == {"empty": 1}
    assert torch.equal(moved.microbatches[0].layout, batch.microbatches[0].layout)


# ---------------------------------------------------------------------------------------------------------- text twins


@st.composite
def steps_with_twins(draw):
    """Rows whose response tokens are all different, so that a token names its place; those that hear have a twin."""
    counts, rows = draw(steps())
    made, following = [], 1000
    for row in rows:
        length = len(row.response)
        response = range(following, following + length)
        following += length
        row = make_row(row.layout[: len(row.layout) - length + 1], response, row.utterance)
        text = draw(st.lists(tokens, min_size=1, max_size=9))
        made.append(replace(row, twin=make_row(text, response)) if row.has_speech else row)
    return counts, made


@given(steps_with_twins(), st.integers(1, 40))
def test_student_and_teacher_predict_the_same_token(step, micro_batch_tokens):
    batch = build(*step, micro_batch_tokens)
    taught = [token for twin in batch.twins for token in twin.targets.tolist()]
    compared = []
    for micro in batch.microbatches:
        tokens_of_rows = micro.targets[micro.paired].tolist()
        assert tokens_of_rows == [taught[place] for place in micro.twin_index.tolist()]
        assert micro.paired.tolist() == sorted(micro.paired.tolist())
        compared += tokens_of_rows
    assert sorted(compared) == sorted(taught) == [token for row in step[1] if row.has_speech for token in row.response]
    for twin in batch.twins:
        assert (twin.layout >= 0).all()
        assert len(twin.lengths) == 1 or twin.layout.numel() <= micro_batch_tokens


@given(steps_with_twins())
def test_twins_change_nothing_else(step):
    counts, rows = step
    batch, without = build(*step), build(counts, [replace(row, twin=None) for row in rows])
    assert (without.twins is None) == any(row.has_speech for row in rows)
    assert batch.num_targets == without.num_targets
    for one, other in zip(batch.microbatches, without.microbatches, strict=True):
        for name in ("layout", "labels", "lengths", "response_index"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert len(other.paired) == len(other.twin_index) == 0


HEARD = make_row([1, -1, 2], [7, 8], 0)


@pytest.mark.parametrize("twin", [make_row([1, 5, 2], [7, 9]), make_row([1], [7]), make_row([1, -1], [7, 8])])
def test_a_twin_that_does_not_fit_its_row_is_an_error(twin):
    with pytest.raises(ValueError, match="the text twin of a must be text and predict the same 2 response tokens"):
        collate([torch.ones(5)], [2], [replace(HEARD, twin=twin)], 100, ["a"])


def test_twins_of_some_rows_only_are_an_error():
    with pytest.raises(ValueError, match="only some rows with speech have a text twin"):
        collate([torch.ones(5)], [2], [HEARD, replace(HEARD, twin=make_row([1, 2], [7, 8]))], 100)


def test_to_moves_twins():
    batch = build([2], [replace(HEARD, twin=make_row([1, 5], [7, 8]))])
    moved = batch.to("meta")
    parts = (*moved.microbatches, *moved.twins)
    assert {value.device.type for part in parts for value in vars(part).values()} == {"meta"}
    assert StepBatch.empty({}).to("meta").twins == []
