# SPDX-License-Identifier: Apache-2.0
"""What each process must hold: arithmetic alone, nothing is allocated.

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
from nemo_mtbi.llm.weights import stage_sizes
from nemo_mtbi.speech_llm.losses import COMPARED_AT_ONCE

FLOAT32 = 4  # bytes; of norms, losses, and of whatever trains


# ------------------------------------------------------------------------------------------------------------ weights


def decoder_parameters(config: DecoderConfig, layout: ParallelConfig, stage: int) -> int:
    """Return the LLM's parameters on one process of a stage; the same on all its tensor-parallel processes."""
    return sum(stage_sizes(config, layout, stage, weight_shapes(config)))


def _vocabulary_share(config: DecoderConfig, layout: ParallelConfig) -> int:
    """Rows of the embedding table on one process: the vocabulary is padded until all have the same number."""
    return -(-config.vocab_size // layout.tensor_model_parallel_size)


# ------------------------------------------------------------------------------------------------- bytes of each stage


@dataclass(frozen=True)
class Term:
    """One product of the sum. What is shown is what is computed.

    Attributes:
        name: what the bytes are.
        factors: numbers and what they count; the last counts bytes.
        share: number of processes that share it.
    """

    name: str
    factors: tuple[tuple[int, str], ...]
    share: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(number for number, _ in self.factors) // self.share

    def __str__(self) -> str:
        product = " x ".join(f"{number} {what}" for number, what in self.factors)
        return product if self.share == 1 else f"{product} / {self.share}"


def total(terms: Iterable[Term]) -> int:
    """Bytes of all of them."""
    return sum(term.size for term in terms)


@dataclass(frozen=True)
class Load:
    """What goes through the model.

    Attributes:
        positions: rows x longest row of the largest microbatch.
        microbatches: of a step.
        responses: positions of the largest microbatch that predict a response token.
        cached: rows x positions of a batch of generation.
        longest: positions of the longest row, answer included.
        compared: response tokens of a step whose distributions are compared with the text twin's.
    """

    positions: int
    microbatches: int
    responses: int
    cached: int
    longest: int
    compared: int = 0


@dataclass(frozen=True)
class SpeechParts:
    """What only the first stage holds.

    Attributes:
        encoder_parameters: those that are frozen.
        encoder_bytes: frozen weights and buffers of encoder and front end.
        trained_parameters: of connector and encoder, in float32.
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
    """What adapters in the LLM add. Channels are those of a layer, on average over all layers.

    Attributes:
        parameters: trained, in float32, on one process of each stage.
        whole: input channels of adapted layers that are whole on each tensor-parallel process.
        shared: input channels of those that tensor-parallel processes share.
        attended: how many of these attention gives, which keeps them itself unless it is recomputed.
        gathered, scattered: channels between A and B of the former and the latter.
        normed: channels of norms that train, which keep what they have normed.
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
    """What trains of the LLM itself, with Megatron's distributed optimizer.

    Attributes:
        parameters: on one process of each stage.
        largest: of its weights, in numbers: its gradient comes in the LLM's dtype before it is added in float32.
        replicas: data-parallel processes, which share the optimizer's numbers.
    """

    parameters: tuple[int, ...]
    largest: tuple[int, ...]
    replicas: int = 1

    def terms(self, stage: int, number: int) -> list[Term]:
        """Gradients, and the optimizer's moments, with weights in float32 where the LLM's are not.

        Args:
            stage: of the pipeline.
            number: bytes of a weight.
        """
        factor, kept = (self.parameters[stage], "parameters"), 2 + (number < FLOAT32)
        return [
            Term("gradients of the LLM", (factor, (FLOAT32, "B"))),
            Term("gradient of a weight at work", ((self.largest[stage], "parameters"), (number, "B"))),
            Term("optimizer of the LLM", (factor, (kept, "numbers"), (FLOAT32, "B")), self.replicas),
        ]


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process of a stage, with their arithmetic.

    Attributes:
        stage: of the pipeline.
        frozen, trained: parameters.
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
        """A step and generation take turns, so the larger one counts."""
        busy = max(total(self.activations) + total(self.logits), total(self.generation))
        return total(self.weights) + total(self.training) + busy


def stage_memory(
    config: DecoderConfig,
    layout: ParallelConfig,
    stage: int,
    *,
    load: Load,
    speech: SpeechParts,
    number: int = FLOAT32,
    granularity: str | None = None,
    adapted: Adapted | None = None,
    learning: Learning | None = None,
) -> StageMemory:
    """What one process of a stage holds.

    Args:
        config: architecture of the LLM.
        layout: that can split it.
        stage: of the pipeline.
        load: what goes through it.
        speech: the parts of the first stage.
        number: bytes of a number of the LLM.
        granularity: of recomputation: ``None``, ``selective`` (attention) or ``full`` (layers).
        adapted: what adapters, or layers that train, add; ``None``: there are none.
        learning: what trains of the LLM itself; ``None``: nothing.
    """
    first, last = stage == 0, stage == layout.pipeline_model_parallel_size - 1
    llm = decoder_parameters(config, layout, stage)
    weights = [Term("LLM", ((llm, "parameters"), (number, "B")))]
    activations = activation_terms(config, layout, stage, load, number, granularity, adapted)
    trained = (speech.trained_parameters if first else 0) + (adapted.parameters[stage] if adapted else 0)
    training = [
        Term(
            f"weights, gradients and {speech.optimizer_states} optimizer states",
            ((trained, "parameters"), (2 + speech.optimizer_states, "numbers"), (FLOAT32, "B")),
        )
    ]
    training = training if trained else []
    if learning and learning.parameters[stage]:
        training += learning.terms(stage, number)
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
        logits=tuple(logit_terms(config, layout, load, number)) if last else (),
        generation=tuple(generation_terms(config, layout, load, number)),
    )


def layer_terms(
    config: DecoderConfig,
    layout: ParallelConfig,
    number: int,
    granularity: str | None,
    adapted: Adapted | None = None,
) -> list[Term]:
    """Bytes that autograd keeps of one frozen layer for each position."""
    tensor, hidden, wide = layout.tensor_model_parallel_size, config.hidden_size, max(number, FLOAT32)
    split = tensor if layout.sequence_parallel else 1  # norms and residuals
    if granularity == "full":
        return [Term("layer inputs", ((hidden, "channels"), (number, "B")), split)]
    channels, heads, groups = config.head_channels, config.num_attention_heads, config.num_query_groups
    # what the projection gave (the values are part of it), rotated queries and keys, and the output, which
    # recomputation does not keep
    kept = 2 * heads + 3 * groups if granularity == "selective" else 3 * heads + 3 * groups
    terms = [
        Term("norms", ((2, "norms"), (hidden + 1, "channels"), (wide, "B")), split),
        Term("attention", ((kept, "heads"), (channels, "channels"), (number, "B")), tensor),
        Term("rotary tables", ((4, "tables"), (channels, "channels"), (number, "B"))),
        # with experts about as much for each of those that a position goes through
        Term(
            "feed-forward",
            ((4 * config.experts_per_token, "copies"), (config.ffn_hidden_size, "channels"), (number, "B")),
            tensor,
        ),
    ]
    if granularity is None:
        terms.append(Term("sums of attention", ((heads, "heads"), (wide, "B")), tensor))
    if config.qk_layernorm:
        # both are cast before their norm; where nothing is cast, queries of several groups are still copied
        cast = number < wide
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
                terms.append(Term(name, ((channels, "channels"), (number, "B")), share))
        for channels, share in ((adapted.normed, split), (adapted.heads_normed, tensor)):
            if channels:
                terms.append(Term("norms that train", ((channels, "channels"), (wide, "B")), share))
    return terms


def in_flight(layout: ParallelConfig, stage: int, microbatches: int) -> int:
    """Passes through a run of layers that a stage has begun and not undone, at most: one for each microbatch and run.

    One forward, one backward (1F1B): as many as there are stages from this one on. Interleaved: Megatron's warm-up.
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
    number: int,
    granularity: str | None,
    adapted: Adapted | None = None,
) -> list[Term]:
    """What a stage's layers keep of all microbatches in flight, and one layer at work."""
    stages, passes = layout.pipeline_model_parallel_size, in_flight(layout, stage, load.microbatches)
    layers, hidden = config.num_layers // (stages * layout.chunks), config.hidden_size
    kept = total(layer_terms(config, layout, number, granularity, adapted))
    at_work = total(layer_terms(config, layout, number, None, adapted))
    flying = (passes, "in flight")
    terms = [
        Term("kept", (flying, (layers, "layers"), (load.positions, "positions"), (kept, "B"))),
        Term("a layer at work", ((load.positions, "positions"), (at_work, "B"))),
    ]
    split = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    if stages > 1:
        factors = ((2, "tensors"), flying, (load.positions, "positions"), (hidden, "channels"), (number, "B"))
        terms.append(Term("received and sent", factors, split))
    if stage == stages - 1:
        width = hidden + 1 + (adapted.final_normed if adapted else 0)
        factors = ((load.positions, "positions"), (width, "channels"), (max(number, FLOAT32), "B"))
        terms.append(Term("final norm", factors, split))
    return terms


def logit_terms(config: DecoderConfig, layout: ParallelConfig, load: Load, number: int) -> list[Term]:
    """The loss works on copies in float32: probabilities and gradient, and two more if the vocabulary is split."""
    tensor, wide = layout.tensor_model_parallel_size, max(number, FLOAT32)
    rows, columns = (load.responses, "responses"), (_vocabulary_share(config, layout), "tokens")
    terms = [Term("loss", ((2 if tensor == 1 else 4, "copies"), rows, columns, (wide, "B")))]
    if number < wide:
        terms.append(Term("logits before they are cast", (rows, columns, (number, "B"))))
    if load.compared:
        share = _vocabulary_share(config, layout)
        piece = min(load.responses * share, COMPARED_AT_ONCE)
        terms += [
            Term("text twins", ((load.compared, "responses"), (config.hidden_size, "channels"), (number, "B"))),
            Term("gradient of the divergence", (rows, columns, (wide, "B"))),
            Term("both distributions at work", ((8, "copies"), (piece, "logits"), (wide, "B"))),
        ]
    return terms


def generation_terms(config: DecoderConfig, layout: ParallelConfig, load: Load, number: int) -> list[Term]:
    """Keys and values of all layers of a stage, and the mask of the prompts."""
    layers = config.num_layers // layout.pipeline_model_parallel_size
    width = config.num_query_groups * config.head_channels
    pair = ((2, "of keys and values"), (layers, "layers"), (load.cached, "positions"), (width, "channels"))
    return [
        Term("cache", (*pair, (number, "B")), layout.tensor_model_parallel_size),
        Term("masks", ((load.cached, "positions"), (load.longest, "keys"), (2 + number, "B"))),
    ]
