# SPDX-License-Identifier: Apache-2.0
"""A model of what tokens sound like, learned from the corpus itself, that says when each of them begins and ends.

Each token is a chain of a few states, between words stands silence that may be left out, and each state is a Gaussian
over cepstra with one covariance for all: the hidden Markov model of speech recognition before neural networks
(Rabiner 1989), trained by alternating between the best path and the means along it (Viterbi training). It sees 90 ms
and nothing of the words around, so a boundary lies where the sound changes. Where CTC puts tokens is enough to begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.prepare.alignment.viterbi import IMPOSSIBLE, best_path

CEPSTRA = 13
_WINDOW = 2  # frames to each side that a difference is taken over
_DELTA_SCALE = (1.0, 2.0, 3.0)  # cepstra change by less than they are: this gives all three a like spread
_PRIOR_FRAMES = 2.0  # of the overall mean, in the mean of each state: for tokens that are rare or never seen
_RIDGE = 1e-3
_MAX_STATES = 3
_STATE_FRAMES = 4  # a token gets a state for about so many frames of its length
PASSES = 15
_DELAYS = range(-4, 13, 2)  # frames by which CTC may be late
SILENCE = 0  # row of the silence; token ``i`` has the rows from ``1 + i * states``


def cepstra(features: Tensor) -> Tensor:
    """Return mel cepstra with first and second differences.

    Args:
        features: ``[C, F]`` log-mel.

    Returns:
        ``[F, 39]``.
    """
    channels = features.shape[0]
    grid = (torch.arange(channels, device=features.device) + 0.5) * (math.pi / channels)
    transform = torch.cos(torch.arange(CEPSTRA, device=features.device)[:, None] * grid)  # [13, C] DCT-II
    transform *= math.sqrt(2.0 / channels)
    transform[0] /= math.sqrt(2.0)
    parts = [transform @ features.float()]
    parts += [_slope(parts[0])]
    parts += [_slope(parts[1])]
    return torch.cat([scale * part for scale, part in zip(_DELTA_SCALE, parts, strict=True)]).T


def _slope(values: Tensor) -> Tensor:
    """Return the slope of the line through five frames, as in every MFCC front end."""
    padded = torch.nn.functional.pad(values[None], (_WINDOW, _WINDOW), mode="replicate")[0]
    size = values.shape[1]
    weighted = [step * padded[:, _WINDOW + step :][:, :size] for step in (-2, -1, 1, 2)]
    return sum(weighted, torch.zeros_like(values)) / 10.0


@dataclass(frozen=True)
class Spoken:
    """An utterance to train on.

    Attributes:
        cepstra: ``[F, 39]``.
        words: tokens of each word that has any.
        onsets: frame at which CTC has each token, of all words.
        ends: frame behind the last that CTC has for it.
    """

    cepstra: Tensor
    words: tuple[tuple[int, ...], ...]
    onsets: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """The states of an utterance.

    Attributes:
        rows: ``[U]`` rows of the model.
        words: ``[U]`` index of the word; -1 for silence.
    """

    rows: Tensor
    words: Tensor


class SoundModel:
    """A Gaussian for each state of each token, with one covariance for all (see the head of this module).

    Args:
        means: ``[1 + V * S, 39]``.
        whitening: ``[39, 39]``, which makes the covariance the unit matrix.
        states: ``S``, of each token.
    """

    def __init__(self, means: Tensor, whitening: Tensor, states: int):
        self.means, self.whitening, self.states = means, whitening, states
        self._centers = means @ whitening

    @property
    def log_covariance(self) -> float:
        """Logarithm of the determinant of the states' covariance."""
        return -2.0 * float(self.whitening.diagonal().log().sum())

    def save(self, path: Path) -> None:
        """Write the model as safetensors; whole or not at all."""
        content = {"means": self.means, "whitening": self.whitening, "states": torch.tensor(self.states)}
        with replacing(path) as file:
            file.write(save({name: value.cpu().contiguous() for name, value in content.items()}))

    @classmethod
    def load(cls, path: Path) -> SoundModel:
        """Read a model that :meth:`save` has written."""
        content = load_file(path)
        return cls(content["means"], content["whitening"], int(content["states"]))

    def to(self, device: torch.device) -> SoundModel:
        """Return this model on a device."""
        return SoundModel(self.means.to(device), self.whitening.to(device), self.states)

    def chain(self, words: Sequence[Sequence[int]]) -> Chain:
        """Return the chain of an utterance: silence, the states of a word, silence, and so on."""
        rows, owners = [SILENCE], [-1]
        for index, tokens in enumerate(words):
            if not tokens:
                continue
            for token in tokens:
                rows += range(1 + token * self.states, 1 + (token + 1) * self.states)
            owners += [index] * (len(rows) - len(owners))
            rows.append(SILENCE)
            owners.append(-1)
        return Chain(torch.tensor(rows), torch.tensor(owners))

    def paths(self, cepstra: Sequence[Tensor], chains: Sequence[Chain]) -> list[Tensor]:
        """Return the state of each frame, as positions in its chain; ``IMPOSSIBLE`` if the utterance is too short."""
        device = self._centers.device
        frames = torch.tensor([len(values) for values in cepstra], device=device)
        states = torch.tensor([len(chain.rows) for chain in chains], device=device)
        values = torch.nn.utils.rnn.pad_sequence(list(cepstra), batch_first=True).to(device) @ self.whitening
        rows = torch.nn.utils.rnn.pad_sequence([chain.rows for chain in chains], batch_first=True).to(device)
        centers = self._centers[rows]  # [B, U, 39]
        emissions = -0.5 * torch.cdist(values, centers).square()  # [B, T, U]; what all states share is left out
        may_skip = torch.zeros_like(rows, dtype=torch.bool)
        may_skip[:, 2:] = rows[:, 1:-1] == SILENCE
        paths = best_path(emissions, may_skip, frames, states)
        return [path[:length].cpu() for path, length in zip(paths, frames.tolist(), strict=True)]


def word_frames(path: Tensor, chain: Chain, words: Sequence[Sequence[int]]) -> list[tuple[int, int] | None] | None:
    """Return first and last frame of each word, ``None`` for one without tokens; ``None`` in all without a path."""
    if not len(path) or path[0] == IMPOSSIBLE:
        return None
    owners = chain.words[path]
    edges: list[tuple[int, int] | None] = []
    for index, tokens in enumerate(words):
        frames = torch.nonzero(owners == index).flatten()
        edges.append((int(frames[0]), int(frames[-1])) if len(tokens) else None)
    return edges


# ------------------------------------------------------------------------------------------------------------ training


def train_sounds(
    utterances: Sequence[Spoken],
    vocabulary: int,
    *,
    passes: int = PASSES,
    batch_size: int = 32,
    tolerance: float = 0.005,
    report: Callable[[], None] = lambda: None,
) -> SoundModel:
    """Train a model of the sounds of a corpus from where CTC has its tokens.

    Args:
        utterances: of the corpus; some hundreds are enough.
        vocabulary: number of tokens.
        passes: at most so many over the utterances.
        batch_size: utterances that go through the best path together.
        tolerance: ends early when less than this share of the frames changes its state.
        report: called after each pass.

    Raises:
        ValueError: without utterances.
    """
    if not utterances:
        raise ValueError(
            "no utterance to learn the sounds from: CTC could align none; is it a model of this language?"
        )
    lengths = [
        end - start for u in utterances for start, end in zip(u.onsets, (*u.onsets[1:], u.ends[-1]), strict=True)
    ]
    states = min(max(round(sum(lengths) / len(lengths) / _STATE_FRAMES), 1), _MAX_STATES)
    labels = _first_labels(utterances, vocabulary, states)
    order = sorted(range(len(utterances)), key=lambda index: len(utterances[index].cepstra))
    model = _fit(utterances, labels, vocabulary, states)
    for _ in range(passes):
        changed = total = 0
        for batch in _batches(order, batch_size):
            chains = [model.chain(utterances[index].words) for index in batch]
            paths = model.paths([utterances[index].cepstra for index in batch], chains)
            for index, chain, path in zip(batch, chains, paths, strict=True):
                if path[0] == IMPOSSIBLE:  # too short for three frames in each token: it keeps what CTC said
                    continue
                new = chain.rows[path]
                changed, total = changed + int((new != labels[index]).sum()), total + len(new)
                labels[index] = new
        model = _fit(utterances, labels, vocabulary, states)
        report()
        if changed <= tolerance * total:
            break
    return model


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _first_labels(utterances: Sequence[Spoken], vocabulary: int, states: int) -> list[Tensor]:
    """Return the row of each frame as CTC has it, moved by its delay.

    A CTC model is late or early by about the same time everywhere. Of several delays the one is taken that leaves the
    states with the smallest covariance, where tokens sound most alike from one utterance to the next.
    """
    candidates = []
    for delay in _DELAYS:
        labels = [_labels_of(utterance, states, delay) for utterance in utterances]
        candidates.append((_fit(utterances, labels, vocabulary, states).log_covariance, labels))
    return min(candidates, key=lambda entry: entry[0])[1]


def _labels_of(utterance: Spoken, states: int, delay: int) -> Tensor:
    """Label tokens from onset to onset in equal parts, and silence where CTC has none for long."""
    labels = torch.full((len(utterance.cepstra),), SILENCE)
    tokens = [token for word in utterance.words for token in word]
    following = (*utterance.onsets[1:], len(labels) + delay)
    for token, start, end, own in zip(tokens, utterance.onsets, following, utterance.ends, strict=True):
        start, end = start - delay, min(end, own + (own - start)) - delay
        edges = [max(start + round((end - start) * k / states), 0) for k in range(states + 1)]
        for k in range(states):
            labels[edges[k] : edges[k + 1]] = 1 + token * states + k
    return labels


def _fit(utterances: Sequence[Spoken], labels: Sequence[Tensor], vocabulary: int, states: int) -> SoundModel:
    """Fit the means of the states and their common covariance."""
    size = utterances[0].cepstra.shape[1]
    sums, counts = torch.zeros(1 + vocabulary * states, size), torch.zeros(1 + vocabulary * states)
    for utterance, rows in zip(utterances, labels, strict=True):
        sums.index_add_(0, rows, utterance.cepstra)
        counts += torch.bincount(rows, minlength=len(counts))
    overall = sums.sum(0) / counts.sum()
    means = (sums + _PRIOR_FRAMES * overall) / (counts + _PRIOR_FRAMES)[:, None]
    covariance = torch.zeros(size, size, dtype=torch.float64)
    for utterance, rows in zip(utterances, labels, strict=True):
        rest = (utterance.cepstra - means[rows]).double()
        covariance += rest.T @ rest
    covariance = covariance / counts.sum() + _RIDGE * torch.eye(size, dtype=torch.float64)
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance)).float()
    return SoundModel(means, whitening, states)
