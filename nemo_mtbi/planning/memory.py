# SPDX-License-Identifier: Apache-2.0
"""Memory of each process: arithmetic alone, nothing is allocated.

Activations are counted as in Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198): what autograd keeps of each layer, for each microbatch that is in flight. Three things differ from
their 34 x hidden bytes for each position: frozen linear layers keep no input, since their weights get no gradient;
there is no dropout and so no mask; and attention is fused, so that no matrix of scores is kept. The number of
microbatches in flight is that of Megatron's schedules (Narayanan et al. 2021, arXiv 2104.04473).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.architecture import DecoderConfig, weight_shapes
from nemo_mtbi.llm.decoder import padded_vocabulary
from nemo_mtbi.llm.weights import stage_sizes
from nemo_mtbi.speech_llm.losses import COMPARED_AT_ONCE

FLOAT32 = 4  # bytes of a number in norms and losses, and of trained parameters


# ------------------------------------------------------------------------------------------------------------ weights


def decoder_parameters(config: DecoderConfig, layout: ParallelConfig, stage: int) -> int:
    """Return the LLM's parameters on one process of a stage; the same on all its tensor-parallel processes."""
    return sum(stage_sizes(config, layout, stage, weight_shapes(config)))


# ------------------------------------------------------------------------------------------------- bytes of each stage


@dataclass(frozen=True)
class Term:
    """One product in a sum of bytes; the text that is shown is the product that is computed.

    Attributes:
        name: of the quantity.
        factors: numbers, each with its unit; the last unit is bytes.
        share: number of processes that share it.
    """

    name: str
    factors: tuple[tuple[int, str], ...]
    share: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(count for count, _ in self.factors) // self.share

    def __str__(self) -> str:
        product = " x ".join(f"{count} {unit}" for count, unit in self.factors)
        return product if self.share == 1 else f"{product} / {self.share}"


def total(terms: Iterable[Term]) -> int:
    """Return the bytes of all terms."""
    return sum(term.size for term in terms)


@dataclass(frozen=True)
class Load:
    """Sizes of what goes through the model.

    Attributes:
        positions: rows x longest row of the largest microbatch.
        microbatches: number in a step.
        responses: positions of the largest microbatch that predict a response token.
        cached: rows x positions of a batch of generation.
        longest: positions of the longest row, answer included.
        compared: number of response tokens of a step whose distributions are compared with the text twin's.
    """

    positions: int
    microbatches: int
    responses: int
    cached: int
    longest: int
    compared: int = 0


@dataclass(frozen=True)
class SpeechParts:
    """Encoder and connector, which only the first stage holds.

    Attributes:
        encoder_parameters: number of frozen parameters of the encoder.
        encoder_bytes: bytes of frozen weights and buffers of encoder and front end.
        trained_parameters: number of trained parameters of connector and encoder, in float32.
        optimizer_states: float32 numbers that the optimizer keeps for each of them.
        work: memory of a step: what autograd keeps of the connector, frames and their gradient, the encoder at work.
    """

    encoder_parameters: int
    encoder_bytes: int
    trained_parameters: int
    optimizer_states: int
    work: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Adapted:
    """Memory that adapters, or weights of the LLM that train, add. Channels are averages over all layers.

    Attributes:
        parameters: number of adapter parameters, in float32, on one process of each stage.
        whole: input channels of adapted layers that are whole on each tensor-parallel process.
        shared: input channels of adapted layers that tensor-parallel processes share.
        attended: part of ``shared`` that attention outputs, and keeps itself unless it is recomputed.
        gathered: channels between A and B of adapters on ``whole`` inputs.
        scattered: channels between A and B of adapters on ``shared`` inputs.
        normed: channels of norms that train, which keep their output before it is scaled.
        heads_normed: the same of the norms of queries and keys.
        final_normed: the same of the final norm.
    """

    parameters: tuple[int, ...]
    whole: int = 0
    shared: int = 0
    attended: int = 0
    gathered: int = 0
    scattered: int = 0
    normed: int = 0
    heads_normed: int = 0
    final_normed: int = 0


@dataclass(frozen=True)
class Learning:
    """Weights of the LLM that train, with Megatron's distributed optimizer.

    Attributes:
        parameters: number of them on one process of each stage.
        largest: number of elements of the largest weight there, whose gradient comes in the LLM's dtype before it is
            added in float32.
        replicas: number of data-parallel processes, which share the optimizer's numbers.
    """

    parameters: tuple[int, ...]
    largest: tuple[int, ...]
    replicas: int = 1

    def terms(self, stage: int, bytes_per_param: int) -> list[Term]:
        """Return gradients and optimizer states, with weights in float32 where the LLM's are not.

        Args:
            stage: of the pipeline.
            bytes_per_param: bytes of a parameter of the LLM.
        """
        count, kept = (self.parameters[stage], "parameters"), 2 + (bytes_per_param < FLOAT32)
        return [
            Term("gradients of the LLM", (count, (FLOAT32, "B"))),
            Term("gradient of a weight at work", ((self.largest[stage], "parameters"), (bytes_per_param, "B"))),
            Term("optimizer of the LLM", (count, (kept, "numbers"), (FLOAT32, "B")), self.replicas),
        ]


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process of a stage, with their arithmetic.

    Attributes:
        stage: of the pipeline.
        frozen: number of frozen parameters.
        trained: number of trained parameters.
        weights: frozen weights.
        training: trained weights, gradients and optimizer states.
        activations: at the fullest moment of a step.
        logits: the head and the loss over the response positions of one microbatch.
        generation: the key-value cache and masks.
    """

    stage: int
    frozen: int
    trained: int
    weights: tuple[Term, ...]
    training: tuple[Term, ...]
    activations: tuple[Term, ...]
    logits: tuple[Term, ...]
    generation: tuple[Term, ...]

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment: a step and generation take turns, so the larger one counts."""
        busy = max(total(self.activations) + total(self.logits), total(self.generation))
        return total(self.weights) + total(self.training) + busy


def stage_memory(
    config: DecoderConfig,
    layout: ParallelConfig,
    stage: int,
    *,
    load: Load,
    speech: SpeechParts,
    bytes_per_param: int = FLOAT32,
    granularity: str | None = None,
    adapted: Adapted | None = None,
    learning: Learning | None = None,
) -> StageMemory:
    """Return the memory of one process of a stage.

    Args:
        config: architecture of the LLM.
        layout: that can split it.
        stage: of the pipeline.
        load: sizes of what goes through it.
        speech: encoder and connector.
        bytes_per_param: bytes of a parameter of the LLM, and of its activations.
        granularity: of recomputation: ``None``, ``selective`` (attention) or ``full`` (layers).
        adapted: memory of adapters, or of layers that train; ``None``: there are none.
        learning: weights of the LLM that train; ``None``: none.
    """
    first, last = stage == 0, stage == layout.pipeline_model_parallel_size - 1
    llm = decoder_parameters(config, layout, stage)
    weights = [Term("LLM", ((llm, "parameters"), (bytes_per_param, "B")))]
    activations = activation_terms(config, layout, stage, load, bytes_per_param, granularity, adapted)
    trained = (speech.trained_parameters if first else 0) + (adapted.parameters[stage] if adapted else 0)
    training = [
        Term(
            f"weights, gradients and {speech.optimizer_states} optimizer states",
            ((trained, "parameters"), (2 + speech.optimizer_states, "numbers"), (FLOAT32, "B")),
        )
    ]
    training = training if trained else []
    if learning and learning.parameters[stage]:
        training += learning.terms(stage, bytes_per_param)
        trained += learning.parameters[stage]
        llm -= learning.parameters[stage]
    if first:
        weights.append(Term("encoder", ((speech.encoder_bytes, "B"),)))
        activations += speech.work
    return StageMemory(
        stage=stage,
        frozen=llm + (speech.encoder_parameters if first else 0),
        trained=trained,
        weights=tuple(weights),
        training=tuple(training),
        activations=tuple(activations),
        logits=tuple(logit_terms(config, layout, load, bytes_per_param)) if last else (),
        generation=tuple(generation_terms(config, layout, load, bytes_per_param)),
    )


def layer_terms(
    config: DecoderConfig,
    layout: ParallelConfig,
    bytes_per_param: int,
    granularity: str | None,
    adapted: Adapted | None = None,
) -> list[Term]:
    """Return the bytes that autograd keeps of one layer for each position."""
    tensor, hidden, wide = layout.tensor_model_parallel_size, config.hidden_size, max(bytes_per_param, FLOAT32)
    split = tensor if layout.sequence_parallel else 1  # norms and residuals
    if granularity == "full":
        return [Term("layer inputs", ((hidden, "channels"), (bytes_per_param, "B")), split)]
    channels, heads, groups = config.head_channels, config.num_attention_heads, config.num_query_groups
    # the projection's output (values are part of it), rotated queries and keys, and attention's output, which
    # recomputation does not keep
    kept = 2 * heads + 3 * groups if granularity == "selective" else 3 * heads + 3 * groups
    terms = [
        Term("norms", ((2, "norms"), (hidden + 1, "channels"), (wide, "B")), split),
        Term("attention", ((kept, "heads"), (channels, "channels"), (bytes_per_param, "B")), tensor),
        Term("rotary tables", ((4, "tables"), (channels, "channels"), (bytes_per_param, "B"))),
        # with experts about as much for each of those that a position goes through
        Term(
            "feed-forward",
            ((4 * config.experts_per_token, "copies"), (config.ffn_hidden_size, "channels"), (bytes_per_param, "B")),
            tensor,
        ),
    ]
    if granularity is None:
        terms.append(Term("sums of attention", ((heads, "heads"), (wide, "B")), tensor))
    if config.qk_layernorm:
        # both are cast before their norm; where nothing is cast, queries of several groups are still copied
        cast = bytes_per_param < wide
        kept = heads * (1 + channels * (cast or groups > tensor)) + groups * (1 + channels * cast)
        terms.append(Term("norms of heads", ((kept, "numbers"), (wide, "B")), tensor))
    if adapted:  # a frozen layer does not need its input
        shared = adapted.shared - (adapted.attended if granularity is None else 0)
        for name, channels, share in (
            ("inputs of layers that learn", adapted.whole, split),
            ("shared inputs of layers that learn", shared, tensor),
            ("between A and B", adapted.gathered, 1),
            ("between A and B, of shared inputs", adapted.scattered, split),
        ):
            if channels:
                terms.append(Term(name, ((channels, "channels"), (bytes_per_param, "B")), share))
        for channels, share in ((adapted.normed, split), (adapted.heads_normed, tensor)):
            if channels:
                terms.append(Term("norms that train", ((channels, "channels"), (wide, "B")), share))
    return terms


def in_flight(layout: ParallelConfig, stage: int, microbatches: int) -> int:
    """Return how many passes through a run of layers a stage has begun and not undone, at most.

    There is one for each microbatch and run of layers. One forward, one backward (1F1B): as many as there are stages
    from this one on. Interleaved: Megatron's warm-up.
    """
    stages, chunks = layout.pipeline_model_parallel_size, layout.chunks
    if chunks == 1:
        return max(min(stages - stage, microbatches), 1)
    # the schedule takes groups of as many microbatches as there are stages
    microbatches = -(-microbatches // stages) * stages
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, microbatches * chunks)


def activation_terms(
    config: DecoderConfig,
    layout: ParallelConfig,
    stage: int,
    load: Load,
    bytes_per_param: int,
    granularity: str | None,
    adapted: Adapted | None = None,
) -> list[Term]:
    """Return what a stage's layers keep of all microbatches in flight, and one layer at work."""
    stages, passes = layout.pipeline_model_parallel_size, in_flight(layout, stage, load.microbatches)
    layers, hidden = config.num_layers // (stages * layout.chunks), config.hidden_size
    kept = total(layer_terms(config, layout, bytes_per_param, granularity, adapted))
    at_work = total(layer_terms(config, layout, bytes_per_param, None, adapted))
    flying = (passes, "in flight")
    terms = [
        Term("kept", (flying, (layers, "layers"), (load.positions, "positions"), (kept, "B"))),
        Term("a layer at work", ((load.positions, "positions"), (at_work, "B"))),
    ]
    split = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    if stages > 1:
        sent = ((2, "tensors"), flying, (load.positions, "positions"), (hidden, "channels"), (bytes_per_param, "B"))
        terms.append(Term("received and sent", sent, split))
    if stage == stages - 1:
        width = hidden + 1 + (adapted.final_normed if adapted else 0)
        normed = ((load.positions, "positions"), (width, "channels"), (max(bytes_per_param, FLOAT32), "B"))
        terms.append(Term("final norm", normed, split))
    return terms


def logit_terms(config: DecoderConfig, layout: ParallelConfig, load: Load, bytes_per_param: int) -> list[Term]:
    """Return the memory of the loss of one microbatch.

    It works on copies in float32: probabilities and gradient, and two more if the vocabulary is split.
    """
    tensor, wide = layout.tensor_model_parallel_size, max(bytes_per_param, FLOAT32)
    share = padded_vocabulary(config.vocab_size, tensor) // tensor
    rows, columns = (load.responses, "responses"), (share, "tokens")
    terms = [Term("loss", ((2 if tensor == 1 else 4, "copies"), rows, columns, (wide, "B")))]
    if bytes_per_param < wide:
        terms.append(Term("logits before they are cast", (rows, columns, (bytes_per_param, "B"))))
    if load.compared:
        piece = min(load.responses * share, COMPARED_AT_ONCE)
        terms += [
            Term(
                "text twins", ((load.compared, "responses"), (config.hidden_size, "channels"), (bytes_per_param, "B"))
            ),
            Term("gradient of the divergence", (rows, columns, (wide, "B"))),
            Term("both distributions at work", ((8, "copies"), (piece, "logits"), (wide, "B"))),
        ]
    return terms


def generation_terms(config: DecoderConfig, layout: ParallelConfig, load: Load, bytes_per_param: int) -> list[Term]:
    """Return keys and values of all layers of a stage, and the mask of the prompts."""
    layers = config.num_layers // layout.pipeline_model_parallel_size
    width = config.num_query_groups * config.head_channels
    pair = ((2, "of keys and values"), (layers, "layers"), (load.cached, "positions"), (width, "channels"))
    return [
        Term("cache", (*pair, (bytes_per_param, "B")), layout.tensor_model_parallel_size),
        Term("masks", ((load.cached, "positions"), (load.longest, "keys"), (2 + bytes_per_param, "B"))),
    ]
