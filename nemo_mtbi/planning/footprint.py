# SPDX-License-Identifier: Apache-2.0
"""What the speech side of a model takes up, found out without its weights.

Modules are built from their configuration with tensors that have shapes but hold nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderConfig
from nemo_mtbi.encoders.base import unfrozen
from nemo_mtbi.encoders.hf import empty_hf_encoder, is_hf_encoder
from nemo_mtbi.encoders.nemo import EncoderShape, front_end_stages, subsampling_stages, windows_of
from nemo_mtbi.encoders.paired import paired_shape
from nemo_mtbi.encoders.windows import AT_ONCE
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.planning.memory import FLOAT32, SpeechParts, Term, total
from nemo_mtbi.speech_llm.connector import build_connector
from nemo_mtbi.speech_llm.pretrained import key_of_encoder, refusing_asr, resolve

UTTERANCE = 15.0  # seconds, of those that a step is thought to hold


@dataclass(frozen=True)
class EncoderFacts:
    """A speech encoder without its weights.

    Attributes:
        shape: as the model's.
        parameters: of encoder and front end.
        numbers: parameters and buffers of the encoder that take its dtype.
        fixed_bytes: of what keeps its dtype.
        convolution: numbers that the first convolution gives for each pair of feature frames.
        windowed: whether it hears windows, of which only some are encoded at once.
        padded: whether each window is filled up to 30 s.
        trained: parameters of the encoder that train.
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
        """Each encoder."""
        return [self] if self.beside is None else [self, self.beside]

    def frozen_bytes(self, number: int) -> int:
        """Of what does not train; an encoder that trains in part is kept in float32 as a whole."""
        return (self.numbers - self.trained) * (max(number, FLOAT32) if self.trained else number) + self.fixed_bytes

    def at_once(self, features: int) -> int:
        """Feature frames that are encoded together, of those of a step."""
        most = AT_ONCE * self.shape.sample_rate // self.shape.stages[0].stride
        if self.padded:
            return most
        return min(features, most) if self.windowed else features


def read_encoder(name: str, config: EncoderConfig | None = None) -> EncoderFacts:
    """Builds front end and encoder from their configuration, or two of them, with tensors that hold nothing.

    Args:
        name: NeMo ASR ``.nemo``, Hugging Face directory, or ``demo``.
        config: how it is used.

    Raises:
        ValueError: if it is neither, an encoder whose frames can't be counted, or used as it can't be.
    """
    second = getattr(config, "beside", None)
    first = _read_one(name, config)
    if second is None:
        return first
    facts = _read_one(second.path, second)
    return replace(first, shape=paired_shape(first.shape, facts.shape)[0], beside=facts)


def _read_one(name: str, config: EncoderConfig | None) -> EncoderFacts:
    path = resolve(name, key_of_encoder(config), "encoder.nemo")
    if is_hf_encoder(path):
        with FakeTensorMode():
            encoder = empty_hf_encoder(path, config)
        values = [*encoder.parameters(), *encoder.buffers()]
        numbers = sum(value.numel() for value in values)
        padded = encoder.heard(1) > 1
        facts = EncoderFacts(encoder.shape, numbers, numbers, 0, 2 * encoder.first_channels, True, padded)
        return replace(facts, trained=_trained(encoder.encoder, config))
    facts, encoder = _read_nemo(name, path)
    windowed = windows_of(facts.shape, config) is not None
    return replace(facts, windowed=windowed, trained=_trained(encoder, config))


def _trained(encoder: nn.Module, config: EncoderConfig | None) -> int:
    values = dict(encoder.named_parameters())
    return sum(values[name].numel() for name in unfrozen(list(values), config))


def _read_nemo(name: str, path: Path) -> tuple[EncoderFacts, nn.Module]:
    from nemo_mtbi.encoders.asr_archive import AsrFile

    with refusing_asr(name, path):
        try:
            probe = AsrFile(path).probe(weights=False)
            front, encoder = probe.preprocessor, probe.encoder
            stages = (*front_end_stages(front), *subsampling_stages(encoder))
            shape = EncoderShape(int(encoder.d_model), int(probe.cfg.sample_rate), stages)
        except AttributeError as error:
            raise ArchiveError(str(error)) from error
    values = [*encoder.parameters(), *encoder.buffers()]
    kept = [*front.parameters(), *front.buffers(), *(value for value in values if not value.is_floating_point())]
    facts = EncoderFacts(
        shape,
        sum(value.numel() for part in (front, encoder) for value in part.parameters()),
        sum(value.numel() for value in values if value.is_floating_point()),
        sum(value.numel() * value.element_size() for value in kept),
        encoder.pre_encode._conv_channels * (encoder.pre_encode._feat_in // 2),
    )
    return facts, encoder


def kept_bytes(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward, without the module's own parameters."""
    seen = {value.untyped_storage()._cdata: 0 for value in module.parameters()}
    kept: list[torch.Tensor] = []  # alive until all are counted, so that no two have one id

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        seen.setdefault(value.untyped_storage()._cdata, value.untyped_storage().nbytes())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(*inputs)
    return sum(seen.values())


def speech_parts(
    encoder: EncoderFacts, config: ConnectorConfig, hidden: int, *, frames: int, number: int, share: int, states: int
) -> SpeechParts:
    """What the first stage holds for the LLM.

    Args:
        encoder: of what trains in it only weights, gradients and optimizer states are counted.
        config: of the connector.
        hidden: size of an LLM embedding.
        frames: of the connector, in a step.
        number: bytes of a number of the encoder.
        share: tensor-parallel processes that share the encoder's work.
        states: numbers that the optimizer keeps for each parameter.
    """
    shape = encoder.shape
    with FakeTensorMode():
        connector = build_connector(config, shape.size, hidden, shape.frame_rate)
        # as utterances of some length: attention and pooling keep more of one long one
        longest = min(frames, max(round(UTTERANCE * shape.frame_rate / connector.reduction), 1))
        steps, utterances = longest * connector.reduction, -(-frames // longest)
        # the lengths decide about values only; a real tensor, since its values are read
        kept = kept_bytes(connector, torch.zeros(utterances, steps, shape.size), torch.tensor([steps] * utterances))
        parameters = sum(value.numel() for value in connector.parameters())
    parts, samples = encoder.parts, frames * connector.reduction * math.prod(stage.stride for stage in shape.stages)
    at_work = [_work(part, samples, number, share) for part in parts]  # one after the other
    work = (
        Term("kept of the connector", ((kept, "B"),)),
        Term("frames and gradient", ((2, "tensors"), (frames, "frames"), (hidden, "channels"), (FLOAT32, "B"))),
        max(at_work, key=lambda term: total([term])),
    )
    trained = sum(part.trained for part in parts)
    frozen = sum(part.parameters for part in parts) - trained
    held = sum(part.frozen_bytes(number) for part in parts)
    return SpeechParts(frozen, held, parameters + trained, states, work)


def _work(part: EncoderFacts, samples: int, number: int, share: int) -> Term:
    """Of an encoder that hears so many samples."""
    steps = part.at_once(samples // part.shape.stages[0].stride) // 2
    factors = ((2, "tensors"), (steps, "steps"), (part.convolution, "numbers"), (number, "B"))
    return Term("encoder's first convolution", factors, share)
