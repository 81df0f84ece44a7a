# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

stages = st.builds(
    LengthStage,
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 6),
)


@given(stages, st.integers(1, 200))
def test_a_stage_counts_what_a_convolution_makes(stage, length):
    padded = length + stage.padding
    if padded < stage.kernel:
        assert stage(length) == 0
        return
    convolution = torch.nn.Conv1d(1, 1, stage.kernel, stage.stride)
    assert stage(length) == convolution(torch.zeros(1, 1, padded)).shape[-1]


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 200))
def test_a_stage_that_rounds_up_counts_what_pooling_in_ceil_mode_makes(kernel, stride, length):
    if length < kernel or stride > kernel:
        return  # torch drops a window that begins in the padding, which needs stride > kernel
    pooled = torch.nn.functional.max_pool1d(torch.zeros(1, 1, length), kernel, stride, ceil_mode=True)
    assert LengthStage(kernel, stride, ceil=True)(length) == pooled.shape[-1]


@given(st.lists(stages, min_size=1, max_size=4), st.integers(0, 2000))
def test_more_samples_never_make_fewer_frames(parts, length):
    count = FrameCounter(tuple(parts), 16_000)
    assert 0 <= count(length) <= count(length + 1)


def test_too_short_audio_owns_no_frame(frames):
    assert frames(0) == 0
    assert [frames(n) for n in (159, 1280 * 2)] == [0, 1]
    assert frames(16_000) == 6


def test_time_of_a_frame(frames):
    assert frames.samples_per_frame == 160 * 16
    assert frames.frame_seconds == pytest.approx(0.16)


def test_pickles(frames):
    assert pickle.loads(pickle.dumps(frames)) == frames
