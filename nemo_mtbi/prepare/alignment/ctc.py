# SPDX-License-Identifier: Apache-2.0
"""Forced alignment by CTC: which of its frames belong to which word, and how sure the model is of each word.

CTC (Graves et al. 2006) says which tokens follow each other, not when they begin: its models put a token on one or two
frames near its sound, many tens of milliseconds off. :mod:`nemo_mtbi.prepare.alignment.sounds` finds the times.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_mtbi.encoders.nemo import front_end_stages, subsampling_stages
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.prepare.alignment.viterbi import IMPOSSIBLE, best_path
from nemo_mtbi.speech_llm.pretrained import load_asr_model

if TYPE_CHECKING:
    from nemo.collections.asr.models import ASRModel


@dataclass(frozen=True)
class CTCOutput:
    """Features and log-probabilities of a batch of utterances.

    Attributes:
        features: ``[B, C, F]`` log-mel features of the model's front end.
        feature_lengths: ``[B]`` valid feature frames.
        log_probs: ``[B, T, V]`` log-probabilities of the tokens and CTC's blank.
        lengths: ``[B]`` valid CTC frames.
    """

    features: Tensor
    feature_lengths: Tensor
    log_probs: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class TokenSpans:
    """A CTC alignment of one utterance.

    Attributes:
        first, last: CTC frames of each token of all words, in order.
        probability: the largest of each token over its frames.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    probability: tuple[float, ...]


class CTCModel:
    """A NeMo ASR model with a CTC head: CTC itself, or a hybrid of transducer and CTC; tokens or characters.

    Args:
        asr: the model; put into ``eval()``.

    Raises:
        ValueError: if it has no CTC head, or its frames can't be counted.
    """

    def __init__(self, asr: ASRModel):
        self.asr = asr.eval().requires_grad_(False)
        self.head = _ctc_head(asr)
        self.pieces = [str(piece) for piece in self.head.vocabulary]
        self.blank = len(self.pieces)
        self.tokenizer = getattr(asr, "tokenizer", None)
        if self.tokenizer is not None and hasattr(self.tokenizer, "tokenizers_dict"):
            raise ValueError(
                f"{type(asr).__name__} has one tokenizer for each language; give a model with a single one"
            )
        front = tuple(front_end_stages(asr.preprocessor))
        rate = int(asr.cfg.sample_rate)
        self.counter = FrameCounter((*front, *subsampling_stages(asr.encoder)), rate)
        self.sample_rate = rate
        self.hop = front[-1].stride  # samples from one feature frame to the next
        self.stride = math.prod(stage.stride for stage in self.counter.stages) // self.hop  # features in a CTC frame
        alphabet = set("".join(self.pieces))
        self._alphabet = alphabet
        self._fold: Callable[[str], str] = str.lower if not any(c.isupper() for c in alphabet) else str.upper
        if any(c.isupper() for c in alphabet) and any(c.islower() for c in alphabet):
            self._fold = str  # cased

    @classmethod
    def load(cls, name: str | Path) -> CTCModel:
        """Load the model of a ``.nemo``, or that of the ``demo``, on the CPU."""
        return cls(load_asr_model(name))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.asr.parameters()).device

    def to(self, device: torch.device) -> CTCModel:
        """Move the model to a device and return it."""
        self.asr.to(device)
        return self

    def tokens(self, word: str) -> list[int] | None:
        """Return the tokens by which the model writes a word, without its punctuation.

        Returns:
            An empty list for what has no sound (a dash); ``None`` if the word has a letter or digit that the model
            does not know (a model of letters and ``20th``): its other tokens would be given the time of all of it.
        """
        sounded = self._write(word)
        if not sounded:
            return sounded if sounded is None else []
        if self.tokenizer is None:
            return [self.pieces.index(c) for c in sounded]
        unknown = self.tokenizer.unk_id if hasattr(self.tokenizer, "unk_id") else None
        return [token for token in self.tokenizer.text_to_ids(sounded) if token != unknown] or None

    def _write(self, word: str) -> str | None:
        """Return the characters of a word that have a sound, in the model's own alphabet; ``None`` if it lacks one."""
        kept = []
        for c in self._fold(unicodedata.normalize("NFKC", word).replace("’", "'")):
            bare = unicodedata.normalize("NFD", c)[0]  # without its accent
            known = c if c in self._alphabet else bare
            if known in self._alphabet and (known.isalnum() or known == "'"):
                kept.append(known)
            elif c.isalnum():
                return None
        return "".join(kept).strip("'")

    @torch.no_grad()
    def encode(self, audio: Sequence[Tensor]) -> CTCOutput:
        """Compute features and CTC's log-probabilities.

        Args:
            audio: ``[n]`` samples of each utterance at ``sample_rate``.
        """
        lengths = torch.tensor([len(samples) for samples in audio], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence(list(audio), batch_first=True).to(self.device)
        features, feature_lengths = self.asr.preprocessor(input_signal=padded, length=lengths)  # [B, C, F]
        encoded, encoded_lengths = self.asr.encoder(audio_signal=features, length=feature_lengths)  # [B, D, T]
        log_probs = self.head(encoder_output=encoded)  # [B, T, V]
        return CTCOutput(features, feature_lengths, log_probs, encoded_lengths)

    def align(self, output: CTCOutput, tokens: Sequence[Sequence[int]]) -> list[TokenSpans | None]:
        """Return the token frames on the most probable CTC path of each utterance.

        Args:
            output: of :meth:`encode`, for ``B`` utterances.
            tokens: of each utterance, at least one.

        Returns:
            ``None`` for an utterance that is too short for its tokens.
        """
        chains = [[self.blank, *(entry for token in row for entry in (token, self.blank))] for row in tokens]
        states = torch.tensor([len(chain) for chain in chains], device=self.device)
        padded = torch.full((len(chains), int(states.max())), self.blank, device=self.device)
        for row, chain in zip(padded, chains, strict=True):
            row[: len(chain)] = torch.tensor(chain, device=self.device)
        may_skip = torch.zeros_like(padded, dtype=torch.bool)
        may_skip[:, 2:] = (padded[:, 2:] != self.blank) & (padded[:, 2:] != padded[:, :-2])
        emissions = output.log_probs.gather(2, padded[:, None].expand(-1, output.log_probs.shape[1], -1))  # [B, T, U]
        paths = best_path(emissions, may_skip, output.lengths, states)
        rows = zip(paths.cpu(), emissions.cpu(), output.lengths.tolist(), tokens, strict=True)
        return [_spans(path[:length], logs, len(row)) for path, logs, length, row in rows]


def _ctc_head(asr: ASRModel) -> Any:
    """Return the CTC decoder of a NeMo model."""
    head = getattr(asr, "ctc_decoder", None) or getattr(asr, "decoder", None)
    if not hasattr(head, "vocabulary") or not hasattr(head, "decoder_layers"):
        raise ValueError(
            f"{type(asr).__name__} has no CTC head, which alignment needs; give a CTC or a hybrid model of NeMo"
        )
    return head


def _spans(path: Tensor, log_probs: Tensor, num_tokens: int) -> TokenSpans | None:
    if not len(path) or path[0] == IMPOSSIBLE:
        return None
    first, last, best = [0] * num_tokens, [0] * num_tokens, [0.0] * num_tokens
    for frame in range(len(path) - 1, -1, -1):
        state = int(path[frame])
        if state % 2:  # the others are blanks
            token = state // 2
            last[token] = max(last[token], frame)
            first[token] = frame
            best[token] = max(best[token], math.exp(float(log_probs[frame, state])))
    return TokenSpans(tuple(first), tuple(last), tuple(best))
