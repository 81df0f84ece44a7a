# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_mtbi.encoders.cache import EncoderCache
from nemo_mtbi.layouts.frames import FrameCounter


@pytest.fixture(scope="module")
def encoder(asr_model):
    from nemo_mtbi.encoders.nemo import NemoEncoder

    return NemoEncoder(asr_model)


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


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda paths: damage(paths[0], -20),  # a number
        lambda paths: damage(paths[0], 30),  # of the header
        lambda paths: paths[0].write_bytes(paths[0].read_bytes()[:20]),
        lambda paths: paths[0].write_bytes(paths[0].read_bytes() + b"x"),
        lambda paths: paths[0].write_bytes(b""),
        lambda paths: shutil.copy(paths[1], paths[0]),  # another utterance
        lambda paths: save_file(load_file(paths[0]), paths[0]),  # without a digest
    ],
)
def test_a_damaged_entry_is_made_again(encoder, batch, tmp_path, harm, caplog):
    expected, _ = EncoderCache(tmp_path, "f" * 64, torch.float32).encode(encoder, *batch)
    paths = sorted(tmp_path.rglob("*.safetensors"))
    kept = paths[0].read_bytes()
    harm(paths)
    cache = EncoderCache(tmp_path, "f" * 64, torch.float32)
    with caplog.at_level("WARNING"):
        found, _ = cache.encode(encoder, *batch)
    assert torch.equal(found, expected)
    assert (cache.hits, cache.misses, cache.damaged) == (2, 1, 1)
    assert f"{paths[0]} is damaged: the utterance is encoded again" in caplog.text
    assert paths[0].read_bytes() == kept


def test_a_file_that_may_not_be_read_is_named(encoder, batch, tmp_path):
    EncoderCache(tmp_path, "f" * 64, torch.float32).encode(encoder, *batch)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
        path.mkdir()
    with pytest.raises(RuntimeError, match="safetensors can't be read .*: make it readable, or remove it"):
        EncoderCache(tmp_path, "f" * 64, torch.float32).encode(encoder, *batch)


def test_encoders_whose_fingerprints_begin_alike_share_nothing(encoder, batch, tmp_path):
    names = {"sha256:" + 63 * "a" + end for end in "bc"}
    assert len({EncoderCache(tmp_path, name, torch.float32).folder for name in names}) == 2
    one, other = (EncoderCache(tmp_path, name, torch.float32) for name in sorted(names))
    one.encode(encoder, *batch)
    for path in one.folder.rglob("*.safetensors"):  # an entry of another encoder is none
        target = other.folder / path.relative_to(one.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    other.encode(encoder, *batch)
    assert (other.hits, other.misses, other.damaged) == (0, 3, 3)
