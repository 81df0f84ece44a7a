# SPDX-License-Identifier: Apache-2.0
"""The model of the sounds, on sequences whose boundaries are known since we drew them."""

import numpy as np
import pytest
import torch
from scipy.fft import dct

from nemo_mtbi.prepare.alignment.sounds import SILENCE, SoundModel, Spoken, cepstra, train_sounds, word_frames

VOCABULARY = 4
WORDS = ((0, 1), (2,), (3, 0), (1,), (2, 3))


def test_cepstra_are_the_discrete_cosine_transform_with_slopes():
    mel = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    values = cepstra(mel)
    plain = dct(mel.numpy(), type=2, norm="ortho", axis=0)[:13].T
    assert values.shape == (12, 39)
    np.testing.assert_allclose(values[:, :13], plain, atol=1e-4)
    # by definition: the slope of the straight line that fits five frames best
    line = np.polyfit(np.arange(-2, 3), plain[3:8], 1)[0]
    np.testing.assert_allclose(values[5, 13:26] / 2.0, line, atol=1e-4)


def test_cepstra_of_a_short_utterance():
    assert cepstra(torch.randn(80, 1)).shape == (1, 39)


def draw(seed, sounds):
    """An utterance, and the frames of its words: a token has three sounds, silence stands between some words."""
    rng = np.random.default_rng(seed)
    words = tuple(WORDS[i] for i in rng.permutation(len(WORDS))[:4])
    frames, times, onsets = [], [], []

    def say(row, least, most):
        for _ in range(rng.integers(least, most)):
            frames.append(sounds[row] + rng.normal(size=39))

    say(0, 5, 15)
    for word in words:
        start = len(frames)
        for token in word:
            onsets.append(len(frames))
            for part in range(3):
                say(1 + 3 * token + part, 3, 8)
        times.append((start, len(frames) - 1))
        if rng.random() < 0.5:
            say(0, 8, 20)
    say(0, 5, 15)
    return torch.tensor(np.array(frames), dtype=torch.float32), words, times, onsets


@pytest.fixture(scope="module")
def drawn():
    sounds = np.random.default_rng(7).normal(scale=1.5, size=(1 + 3 * VOCABULARY, 39))
    return [draw(seed, sounds) for seed in range(60)]


def spoken(drawn, shift):
    """What a CTC that is late by about ``shift`` frames, and has each token on 8 of them, says of it."""
    rng = np.random.default_rng(1)
    found = []
    for values, words, _, onsets in drawn:
        late = sorted(min(max(int(onset + shift + rng.integers(-4, 5)), 0), len(values) - 9) for onset in onsets)
        found.append(Spoken(values, words, tuple(late), tuple(onset + 8 for onset in late)))
    return found


def found_times(model, drawn):
    chains = [model.chain(words) for _, words, _, _ in drawn]
    paths = model.paths([values for values, *_ in drawn], chains)
    return [word_frames(p, c, words) for p, c, (_, words, _, _) in zip(paths, chains, drawn, strict=True)]


def test_boundaries_are_found_from_a_ctc_that_is_late(drawn):
    model = train_sounds(spoken(drawn, shift=5), VOCABULARY)
    times = found_times(model, drawn)
    errors = [
        abs(a - b)
        for found, (_, _, true, _) in zip(times, drawn, strict=True)
        for span, right in zip(found, true, strict=True)
        for a, b in zip(span, right, strict=True)
    ]
    assert np.median(errors) == 0 and np.mean(np.array(errors) <= 1) > 0.9


def test_an_utterance_alone_is_that_of_a_batch(drawn):
    model = train_sounds(spoken(drawn, shift=3)[:20], VOCABULARY, passes=2)
    together = found_times(model, drawn[:6])
    assert together == [found_times(model, [one])[0] for one in drawn[:6]]


def test_a_model_is_the_same_when_it_is_read_again(drawn, tmp_path):
    model = train_sounds(spoken(drawn, shift=3)[:20], VOCABULARY, passes=1)
    model.save(tmp_path / "sounds.safetensors")
    again = SoundModel.load(tmp_path / "sounds.safetensors")
    assert again.states == model.states
    assert torch.equal(again.means, model.means) and torch.equal(again.whitening, model.whitening)


def test_chains_and_words_without_a_sound():
    model = SoundModel(torch.zeros(1 + 2 * VOCABULARY, 39), torch.eye(39), 2)
    chain = model.chain([(), (1, 0), (), (3,)])
    assert chain.rows.tolist() == [SILENCE, 3, 4, 1, 2, SILENCE, 7, 8, SILENCE]
    assert chain.words.tolist() == [-1, 1, 1, 1, 1, -1, 3, 3, -1]
    path = torch.tensor([0, 1, 2, 2, 3, 4, 6, 7, 7])
    assert word_frames(path, chain, [(), (1, 0), (), (3,)]) == [None, (1, 5), None, (6, 8)]


def test_too_few_frames_have_no_times():
    model = SoundModel(torch.zeros(1 + 3 * VOCABULARY, 39), torch.eye(39), 3)
    chain = model.chain([(0, 1)])
    (path,) = model.paths([torch.zeros(5, 39)], [chain])
    assert word_frames(path, chain, [(0, 1)]) is None


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="CTC could align none"):
        train_sounds([], VOCABULARY)
