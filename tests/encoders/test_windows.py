# SPDX-License-Identifier: Apache-2.0
"""Windows give each frame once, and from well inside of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.windows import Windows
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

RATE = 16000
WHISPER = (LengthStage(160, 160), LengthStage(3, 1, 2), LengthStage(3, 2, 2))
WAVE_STAGES = tuple(map(LengthStage, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)))
FASTCONFORMER = (LengthStage(672, 160, 512), *[LengthStage(3, 2, 2)] * 3)


@given(
    samples=st.integers(1, 60 * RATE),
    stages=st.sampled_from([WHISPER, WAVE_STAGES, FASTCONFORMER]),
    window=st.sampled_from([3.0, 7.7, 30.0]),
    overlap=st.sampled_from([0.1, 0.5, 1.03]),
)
@settings(max_examples=150, deadline=None)
def test_windows_give_each_frame_once(samples, stages, window, overlap):
    """From 1 sample to 60 s: the count is exact, and frames come from at least half an overlap inside a window."""
    counter = FrameCounter(stages, RATE)
    step = counter.samples_per_frame
    half = int(overlap * RATE) // (2 * step) * step

    def encode(pieces):
        """Frames that say which sample they begin at, within their window and as the window heard it."""
        count = counter(len(pieces[0]))
        inside = torch.arange(count, dtype=torch.float32) * step
        heard = [torch.nn.functional.pad(piece[::step], (0, 1), value=-1.0)[:count] for piece in pieces]
        return torch.stack([torch.stack([inside, row], -1) for row in heard])

    windows = Windows(counter, EncoderConfig(window_seconds=window, overlap_seconds=overlap), 2)
    audio = torch.arange(samples, dtype=torch.float32)[None]
    encoded, lengths = windows.encode(audio, torch.tensor([samples]), encode)
    count = counter(samples)
    assert lengths.tolist() == [count] and encoded.shape == (1, count, 2)
    begins = torch.arange(count) * float(step)
    told = encoded[0, :, 1]
    assert torch.equal(told[told >= 0], begins[told >= 0]) and (told >= 0).sum() >= count - 1
    inside = encoded[0, :, 0]
    later = (inside != begins).nonzero()
    if len(later):
        assert inside[later[0]] >= half


def test_an_encoder_that_gives_less_than_it_says_is_refused():
    windows = Windows(FrameCounter(WHISPER, RATE), EncoderConfig(), 2)
    with pytest.raises(RuntimeError, match="the encoder gives 3 frames for 16000 samples, but .* says 50"):
        windows.encode(torch.zeros(1, RATE), torch.tensor([RATE]), lambda pieces: torch.zeros(len(pieces), 3, 2))


def test_utterances_without_a_frame():
    windows = Windows(FrameCounter(WHISPER, RATE), EncoderConfig(), 2)
    encoded, lengths = windows.encode(torch.zeros(2, 100), torch.tensor([100, 20]), None)
    assert encoded.shape == (2, 0, 2) and lengths.tolist() == [0, 0]
