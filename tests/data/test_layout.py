# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.data.layout import (
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
