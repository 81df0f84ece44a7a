# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from nemo_mtbi.data.frames import FrameCounter
from nemo_mtbi.modules.encoder_cache import EncoderCache


@pytest.fixture(scope="module")
def encoder(asr_model):
    from nemo_mtbi.modules.speech_encoder import SpeechEncoder

    return SpeechEncoder(asr_model)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(3, 16000, generator=generator), torch.tensor([16000, 9000, 12345])


class Counting:
    """An encoder that counts what it is asked."""

    def __init__(self, encoder):
        self.encoder, self.shape, self.asked = encoder, encoder.shape, []

    def __call__(self, audio, lengths):
        self.asked += lengths.tolist()
        return self.encoder(audio, lengths)


def test_frames_are_those_of_the_encoder_and_made_once(encoder, batch, tmp_path):
    counting, cache = Counting(encoder), EncoderCache(tmp_path, "f" * 64, torch.float32)
    expected, lengths = encoder(*batch)
    for _ in range(2):
        found, valid = cache.encode(counting, *batch)
        assert valid.tolist() == lengths.tolist() and found.shape == expected.shape
        for one, other, n in zip(found, expected, valid.tolist(), strict=True):
            torch.testing.assert_close(one[:n], other[:n], rtol=1e-4, atol=1e-4)
            assert not one[n:].any()
    assert counting.asked == batch[1].tolist() and (cache.hits, cache.misses) == (3, 3)


def test_another_run_finds_them_whatever_stands_beside_them(encoder, batch, tmp_path):
    audio, lengths = batch
    first, _ = EncoderCache(tmp_path, "f" * 64, torch.float32).encode(encoder, audio, lengths)
    counting = Counting(encoder)
    other = EncoderCache(tmp_path, "f" * 64, torch.float32)
    alone, valid = other.encode(counting, audio[1:2, :9000], lengths[1:2])
    assert counting.asked == [] and torch.equal(alone[0], first[1, : int(valid)])
    assert alone.shape[1] == FrameCounter(encoder.shape.stages, 16000)(9000)
    padded, _ = other.encode(counting, torch.nn.functional.pad(audio[1:2], (0, 5000)), lengths[1:2])
    assert padded.shape[1] == FrameCounter(encoder.shape.stages, 16000)(21000) and counting.asked == []
    EncoderCache(tmp_path, "e" * 64, torch.float32).encode(counting, audio[:1], lengths[:1])
    other.encode(counting, 2 * audio[:1], lengths[:1])
    assert counting.asked == [16000, 16000]  # another encoder, other samples


def test_memory_is_bounded(encoder, batch, tmp_path):
    cache, counting = EncoderCache(tmp_path, "f" * 64, torch.float32, memory_bytes=1), Counting(encoder)
    for _ in range(2):
        cache.encode(counting, *batch)
    assert len(counting.asked) == 3 and not cache._held and cache._held_bytes == 0


def test_a_broken_file_is_named(encoder, batch, tmp_path):
    EncoderCache(tmp_path, "f" * 64, torch.float32).encode(encoder, *batch)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RuntimeError, match="safetensors can't be read .*: remove it"):
        EncoderCache(tmp_path, "f" * 64, torch.float32).encode(encoder, *batch)
