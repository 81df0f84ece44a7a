# SPDX-License-Identifier: Apache-2.0
"""The parts of a speech LLM that train: under which names they are stored, and how processes share them.

Checkpoints, archives, warm start and optimizers loop over :data:`TRAINABLE_PARTS`. A new part, such as soft prompts or
a speech head, is a subclass of :class:`TrainablePart` and an entry of that list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.encoders.base import EncoderShape, trained_shapes
from nemo_mtbi.io.tensor_file import Spec, StoredTensors, mismatches, ordered
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.full_finetune import trained_names, trained_weights
from nemo_mtbi.llm.lora import adapter_shapes, adapters, is_merged
from nemo_mtbi.llm.weights import gather_shares, load_shares
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.connector import build_connector
from nemo_mtbi.speech_llm.model import SpeechLLM

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """Everything that the names and shapes of trained weights follow from; known before a model is built.

    Attributes:
        connector: its section of the configuration.
        encoder: shape of the encoder.
        encoder_weights: names and shapes of the encoder's weights that train.
        llm: architecture of the LLM.
        adapters: adapters in the LLM; ``None``: none.
        llm_training: which weights of the LLM train; ``None``: none.
    """

    connector: ConnectorConfig
    encoder: EncoderShape
    encoder_weights: Mapping[str, Shape]
    llm: DecoderConfig
    adapters: LoraConfig | None = None
    llm_training: LlmConfig | None = None


class TrainablePart(ABC):
    """Weights that train, stored under one prefix. It holds no state: models are arguments.

    Attributes:
        name: for messages.
        prefix: of the names of its weights in checkpoints and in a ``.nemo``.
        key: of the configuration, which its shapes follow from; for messages.
        replaces: the frozen part, ``asr`` or ``llm``, whose own weights these are; ``None``: new weights.
        held_by: the frozen part whose weights hold these too in a full ``.nemo``; ``None``: they are stored apart.
        is_optional: whether a ``.nemo`` may lack it as a whole where a model starts from it.
        has_own_optimizer: whether another optimizer than the connector's trains it.
    """

    name: str
    prefix: str
    key: str
    replaces: str | None = None
    held_by: str | None = None
    is_optional = True
    has_own_optimizer = False

    @abstractmethod
    def shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Return names, without the prefix, and shapes of the whole weights, in every process.

        Raises:
            ValueError: if the configuration asks for what can't be built.
        """

    @abstractmethod
    def tensors(self, model: SpeechLLM) -> dict[str, Tensor]:
        """Return this process's weights, or its shares of them, by name; none where a stage holds none.

        They are the parameters themselves, also while NeMo's ``freeze()`` holds them.
        """

    @abstractmethod
    def gather(self, model: SpeechLLM, names: Sequence[str]) -> Iterator[Tensor | None]:
        """Yield the whole weights one at a time, on the first process of the first replica; elsewhere ``None``.

        Every process of that replica must go through it.

        Args:
            model: this process's share.
            names: of all weights of this part, in ascending order among those of one dtype.
        """

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], source: StoredTensors) -> None:
        """Fill this process's weights, or its shares of them, from whole stored ones; communicates with nobody.

        Args:
            tensors: by name, to be filled.
            source: holds them with the prefix, in the right shapes.

        Raises:
            DamageError: if stored weights are damaged.
        """

    def check_separate(self, model: SpeechLLM, purpose: str) -> None:  # noqa: B027 (most parts always are)
        """Check that the weights are what would be stored, and not merged into others.

        Args:
            model: this process's share.
            purpose: what they are needed for, such as ``saving``.

        Raises:
            ValueError: with the remedy.
        """


class FirstStagePart(TrainablePart):
    """A part that every process of the pipeline's first stage holds whole."""

    def gather(self, model: SpeechLLM, names: Sequence[str]) -> Iterator[Tensor | None]:
        """Yield the weights of this process, which are whole."""
        held = self.tensors(model)
        for name in names:
            yield held[name].detach() if groups.is_global_first() else None

    def read(self, tensors: Mapping[str, Tensor], source: StoredTensors) -> None:
        """Copy whole stored weights."""
        for name, value in tensors.items():
            value.copy_(source.tensor(self.prefix + name))


class SharedPart(TrainablePart):
    """A part of the LLM, spread over pipeline stages and shared by tensor-parallel processes."""

    def gather(self, model: SpeechLLM, names: Sequence[str]) -> Iterator[Tensor | None]:
        """Yield weights put together from the shares of all stages and tensor-parallel processes."""
        for _, value in gather_shares(self.tensors(model), model.decoder.architecture.vocab_size):
            yield value

    def read(self, tensors: Mapping[str, Tensor], source: StoredTensors) -> None:
        """Copy this process's shares out of whole stored weights."""
        load_shares(tensors.items(), source, self.prefix)


class EncoderPart(FirstStagePart):
    """Weights of the speech encoder that train."""

    name, prefix, key, replaces = "encoder", "speech_llm.encoder.", "model.encoder.freeze", "asr"

    def shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Return those of the encoder's weights that train."""
        return dict(shape.encoder_weights)

    def tensors(self, model: SpeechLLM) -> dict[str, Tensor]:
        """Return the encoder's weights that train, on the first stage."""
        if model.encoder is None:
            return {}
        held = model.encoder.state_dict(keep_vars=True)
        return {name: held[name] for name in trained_shapes(model.encoder)}


class ConnectorPart(FirstStagePart):
    """The connector, with its buffers."""

    name, prefix, key = "connector", "speech_llm.connector.", "model.connector"
    is_optional = False

    def shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Return those of a connector built without memory."""
        width, rate = shape.encoder.size, shape.encoder.frame_rate
        try:
            with torch.random.fork_rng(), torch.device("meta"):  # what is built next draws as if this had not been
                connector = build_connector(shape.connector, width, shape.llm.hidden_size, rate)
        except (RuntimeError, TypeError, ZeroDivisionError, OverflowError) as error:  # too many numbers to be counted
            raise ValueError(f"model.connector can't be built: {error}") from error
        return {name: tuple(value.shape) for name, value in connector.state_dict().items()}

    def tensors(self, model: SpeechLLM) -> dict[str, Tensor]:
        """Return weights and buffers, on the first stage."""
        return {} if model.connector is None else model.connector.state_dict(keep_vars=True)


class AdaptersPart(SharedPart):
    """Adapters (LoRA) in the LLM."""

    name, prefix, key = "adapters", "speech_llm.adapters.", "model.lora"

    def shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Return those of all adapters of the whole LLM."""
        return {} if shape.adapters is None else dict(adapter_shapes(shape.llm, shape.adapters))

    def tensors(self, model: SpeechLLM) -> dict[str, Tensor]:
        """Return this process's shares of the adapters."""
        return dict(adapters(model.chunks))

    def check_separate(self, model: SpeechLLM, purpose: str) -> None:
        """Check that the adapters are not merged into the LLM's weights."""
        if is_merged(model.chunks):
            raise ValueError(f"the adapters are merged into the LLM's weights: call unmerge_lora() before {purpose}")


class LlmPart(SharedPart):
    """Weights of the LLM itself that train."""

    name, prefix, key = "LLM", "speech_llm.llm.", "model.llm.freeze"
    replaces = held_by = "llm"
    has_own_optimizer = True  # Megatron's, see nemo_mtbi.parallel.llm_optimizer

    def shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Return those of the LLM's weights that train, by canonical names."""
        whole = weight_shapes(shape.llm)
        return {name: whole[name] for name in sorted(trained_names(shape.llm, shape.llm_training))}

    def tensors(self, model: SpeechLLM) -> dict[str, Tensor]:
        """Return this process's shares of the LLM's weights that train, by canonical names."""
        return dict(trained_weights(model.chunks))


CONNECTOR, ENCODER, ADAPTERS, LLM = ConnectorPart(), EncoderPart(), AdaptersPart(), LlmPart()
TRAINABLE_PARTS: list[TrainablePart] = [ENCODER, CONNECTOR, ADAPTERS, LLM]


def stored_parts(embedded: Collection[str]) -> list[TrainablePart]:
    """Return the parts that a ``.nemo`` stores apart from frozen parts inside it.

    Args:
        embedded: frozen parts inside the file, ``asr`` and ``llm``.
    """
    return [part for part in TRAINABLE_PARTS if part.held_by not in embedded]


def part_shapes(parts: Collection[TrainablePart], shape: ModelShape) -> dict[str, Shape]:
    """Return names as they are stored and whole shapes of the weights of some parts.

    Raises:
        ValueError: as :meth:`TrainablePart.shapes`.
    """
    return {part.prefix + name: size for part in parts for name, size in part.shapes(shape).items()}


def part_tensors(parts: Collection[TrainablePart], model: SpeechLLM) -> dict[str, Tensor]:
    """Return this process's weights of some parts by their stored names; see :meth:`TrainablePart.tensors`."""
    return {part.prefix + name: value for part in parts for name, value in part.tensors(model).items()}


def part_specs(parts: Collection[TrainablePart], model: SpeechLLM, shape: ModelShape) -> dict[str, Spec]:
    """Return dtype and whole shape of the weights of some parts, in the order of a file; all of a replica call it."""
    own = {name: value.dtype for name, value in part_tensors(parts, model).items()}
    dtypes: dict[str, torch.dtype] = {}
    for held in groups.gather_objects(own, "replica"):
        dtypes |= held
    return ordered({name: Spec(dtypes[name], size) for name, size in part_shapes(parts, shape).items()})


def gather_parts(
    parts: Collection[TrainablePart], model: SpeechLLM, names: Sequence[str]
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the whole weights of some parts, one at a time; see :meth:`TrainablePart.gather`.

    Args:
        parts: whose weights they are.
        model: this process's share.
        names: of all of them as they are stored, in the order of :func:`part_specs`.
    """
    owners = {name: part for part in parts for name in names if name.startswith(part.prefix)}
    streams = {
        part: part.gather(model, [name.removeprefix(part.prefix) for name in names if owners[name] is part])
        for part in parts
    }
    for name in names:
        yield name, next(streams[owners[name]])


def check_shapes(expected: Mapping[str, Shape], given: Mapping[str, Shape], strict: bool, source: str) -> None:
    """Compare the shapes of stored weights with those of the model.

    Args:
        expected: of the model's weights, by their stored names.
        given: of the stored weights.
        strict: whether names must be the same too.
        source: what holds them, for the message.

    Raises:
        ValueError: names what differs, and the key of the configuration that it follows from.
    """
    if not strict:
        common = expected.keys() & given.keys()
        expected, given = ({name: shapes[name] for name in common} for shapes in (expected, given))
    wrong = mismatches(expected, given)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        keys = {next((part.key for part in TRAINABLE_PARTS if part.prefix in text), CONNECTOR.key) for text in wrong}
        key = keys.pop() if len(keys) == 1 else CONNECTOR.key
        raise ValueError(
            f"{source} does not fit {key}; missing or unknown: {'; '.join(wrong[:5])}{more}. Give the {key} that it "
            "was trained with"
        )
