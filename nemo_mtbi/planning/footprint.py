# SPDX-License-Identifier: Apache-2.0
"""Memory of the speech side of a model, counted without its weights.

Modules are built from their configuration with tensors that have shapes but hold nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from nemo_mtbi.compat.torch import fake_tensors, storage_id
from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderConfig, SecondEncoder
from nemo_mtbi.encoders.base import EncoderShape, SpeechEncoder, unfrozen
from nemo_mtbi.encoders.paired import paired_shape
from nemo_mtbi.encoders.windows import AT_ONCE
from nemo_mtbi.planning.memory import FLOAT32, SpeechParts, Term, total
from nemo_mtbi.speech_llm.connector import build_connector
from nemo_mtbi.speech_llm.pretrained import open_encoder

UTTERANCE = 15.0  # assumed seconds of the utterances of a step


@dataclass(frozen=True)
class EncoderFacts:
    """A speech encoder without its weights.

    Attributes:
        shape: as the model's.
        parameters: number of parameters of encoder and front end.
        numbers: number of elements of the encoder's parameters and buffers that take the model's dtype.
        fixed_bytes: bytes of parameters and buffers that keep their dtype.
        convolution: numbers that the first convolution gives for each pair of feature frames.
        windowed: whether audio is cut into windows, of which only some are encoded at once.
        padded: whether each window is filled up to 30 s.
        trained: number of the encoder's parameters that train.
        beside: a second encoder; ``shape`` is then that of both.
    """

    shape: EncoderShape
    parameters: int
    numbers: int
    fixed_bytes: int
    convolution: int
    windowed: bool = False
    padded: bool = False
    trained: int = 0
    beside: EncoderFacts | None = None

    @property
    def parts(self) -> list[EncoderFacts]:
        """Facts of each encoder alone."""
        return [self] if self.beside is None else [self, self.beside]

    def frozen_bytes(self, bytes_per_param: int) -> int:
        """Return the bytes of frozen weights; an encoder that trains in part is float32 as a whole."""
        stored = max(bytes_per_param, FLOAT32) if self.trained else bytes_per_param
        return (self.numbers - self.trained) * stored + self.fixed_bytes

    def at_once(self, features: int) -> int:
        """Return how many of a step's feature frames are encoded together."""
        most = AT_ONCE * self.shape.sample_rate // self.shape.stages[0].stride
        if self.padded:
            return most
        return min(features, most) if self.windowed else features


def read_encoder_settings(name: str | Path, config: EncoderConfig | None = None) -> EncoderFacts:
    """Return facts about an encoder, or two of them, which are built with tensors that hold nothing.

    Args:
        name: path that a kind of encoder recognizes, or ``demo``.
        config: how it is used.

    Raises:
        ValueError: if it can't be read, its frames can't be counted, or ``config`` does not fit it.
    """
    first = _facts_of(open_encoder(name, config, weights=False), config)
    second: SecondEncoder | None = getattr(config, "beside", None)
    if second is None:
        return first
    beside = _facts_of(open_encoder(second.path, second, weights=False), second)
    return replace(first, shape=paired_shape(first.shape, beside.shape)[0], beside=beside)


def _facts_of(module: SpeechEncoder, config: EncoderConfig | None) -> EncoderFacts:
    """Return the facts of one encoder; floating-point numbers of ``module.encoder`` alone take the model's dtype."""
    weights = dict(module.encoder.named_parameters())
    cast = [value for value in (*weights.values(), *module.encoder.buffers()) if value.is_floating_point()]
    held = [*module.parameters(), *module.buffers()]
    return EncoderFacts(
        shape=module.shape,
        parameters=sum(value.numel() for value in module.parameters()),
        numbers=sum(value.numel() for value in cast),
        fixed_bytes=sum(_bytes(value) for value in held) - sum(_bytes(value) for value in cast),
        convolution=module.first_convolution(),
        windowed=module.windows is not None,
        padded=module.padded,
        trained=sum(weights[name].numel() for name in unfrozen(list(weights), config)),
    )


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def kept_bytes(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Return the bytes that autograd keeps of a forward, without the module's own parameters."""
    seen = {storage_id(value): 0 for value in module.parameters()}
    kept: list[torch.Tensor] = []  # alive until all are counted, so that no two have one id

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        seen.setdefault(storage_id(value), value.untyped_storage().nbytes())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(*inputs)
    return sum(seen.values())


def speech_parts(
    encoder: EncoderFacts,
    config: ConnectorConfig,
    hidden: int,
    *,
    frames: int,
    bytes_per_param: int,
    share: int,
    states: int,
) -> SpeechParts:
    """Count encoder and connector, which the first stage holds.

    Args:
        encoder: facts; of weights in it that train, what backward keeps of their layers is not counted.
        config: the section ``model.connector``.
        hidden: width of an LLM embedding.
        frames: connector frames of a step.
        bytes_per_param: bytes of a frozen parameter of the encoder.
        share: number of tensor-parallel processes that share the encoder's work.
        states: numbers that the optimizer keeps for each parameter.
    """
    shape = encoder.shape
    with fake_tensors():
        connector = build_connector(config, shape.size, hidden, shape.frame_rate)
        # as utterances of some length: attention and pooling keep more of one long one
        longest = min(frames, max(round(UTTERANCE * shape.frame_rate / connector.reduction), 1))
        steps, utterances = longest * connector.reduction, -(-frames // longest)
        # the lengths decide about values only; a real tensor, since its values are read
        kept = kept_bytes(connector, torch.zeros(utterances, steps, shape.size), torch.tensor([steps] * utterances))
        parameters = sum(value.numel() for value in connector.parameters())
    parts, samples = encoder.parts, frames * connector.reduction * math.prod(stage.stride for stage in shape.stages)
    # the encoders run one after the other
    at_work = [convolution_term(part, samples, bytes_per_param, share) for part in parts]
    work = (
        Term("kept of the connector", ((kept, "B"),)),
        Term("frames and gradient", ((2, "tensors"), (frames, "frames"), (hidden, "channels"), (FLOAT32, "B"))),
        max(at_work, key=lambda term: total([term])),
    )
    trained = sum(part.trained for part in parts)
    frozen = sum(part.parameters for part in parts) - trained
    held = sum(part.frozen_bytes(bytes_per_param) for part in parts)
    return SpeechParts(frozen, held, parameters + trained, states, work)


def convolution_term(part: EncoderFacts, samples: int, bytes_per_param: int, share: int) -> Term:
    """Return the activation bytes of an encoder's first convolution.

    Args:
        part: facts of one encoder.
        samples: of a step.
        bytes_per_param: bytes of a number in the encoder's dtype.
        share: number of tensor-parallel processes that share the work.
    """
    steps = part.at_once(samples // part.shape.stages[0].stride) // 2
    factors = ((2, "tensors"), (steps, "steps"), (part.convolution, "numbers"), (bytes_per_param, "B"))
    return Term("encoder's first convolution", factors, share)
