# SPDX-License-Identifier: Apache-2.0
"""Speech encoder, connector and decoder joined: encode once per step, embed layouts, decode.

Every process holds the part that its stage of the pipeline needs: encoder, connector and embedding on the first one,
the head and the loss on the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.llm import LlmConfig, LoraConfig
from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.encoders.base import EncoderShape
from nemo_mtbi.encoders.cache import EncoderCache
from nemo_mtbi.encoders.paired import AnyEncoder
from nemo_mtbi.layouts.layout import MicroBatch, StepBatch
from nemo_mtbi.llm.decoder import GPTDecoder
from nemo_mtbi.llm.lora import without_lora
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.encoding import encode_shared
from nemo_mtbi.speech_llm.connector import Connector, build_connector, frame_counter
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder, states_at
from nemo_mtbi.speech_llm.losses import COMPARED_AT_ONCE, hidden_distance, response_cross_entropy, response_divergence


class StepLoss(NamedTuple):
    """Loss of a step, equal on every stage.

    Attributes:
        loss: what is minimized.
        parts: by the names of :attr:`LossConfig.parts <nemo_mtbi.config.loss.LossConfig.parts>`: not weighted, but
            divided like the loss, and like it of this replica alone.
    """

    loss: Tensor
    parts: dict[str, Tensor]


class SpeechLLM(LayoutDecoder):
    """The model of one process. The connector trains; weights of the encoder and adapters or weights of the LLM may.

    The decoder stays in ``train()`` with zero dropout (Megatron skips activation recomputation in ``eval()``) except
    inside ``generate``, where its cache needs ``eval()``.

    Args:
        encoder: on the first stage; ``None`` on the others.
        connector: its configuration.
        decoder: the LLM, or this process's runs of its layers.
        shape: of the encoder, where there is none.
        lora: adapters in the LLM, which are trained too; ``None``: none.
        llm: what trains of the LLM itself; ``None``: nothing.
        llm_was_trained: whether an earlier run has trained the LLM's weights.
        loss: what is minimized.
        encoder_cache: keeps the encoder's frames; ``None``: nothing is kept.
    """

    def __init__(
        self,
        encoder: AnyEncoder | None,
        connector: ConnectorConfig,
        decoder: GPTDecoder | Sequence[GPTDecoder],
        shape: EncoderShape | None = None,
        lora: LoraConfig | None = None,
        llm: LlmConfig | None = None,
        llm_was_trained: bool = False,
        loss: LossConfig | None = None,
        encoder_cache: EncoderCache | None = None,
    ):
        super().__init__(decoder, lora, llm, llm_was_trained)
        shape = encoder.shape if encoder is not None else shape
        if shape is None:
            raise ValueError("a speech LLM without an encoder needs the encoder's shape, to count frames: give shape")
        self.frame_counter = frame_counter(shape, connector)
        self.encoder_cache = encoder_cache
        self.loss = loss or LossConfig()
        self.encoder = encoder
        self.connector: Connector | None = None
        if encoder is not None:
            with torch.random.fork_rng():
                # The first weights depend on the seed alone, and not on how much of the LLM this process has drawn.
                torch.manual_seed(torch.initial_seed())
                self.connector = build_connector(
                    connector, shape.size, self.decoder.config.hidden_size, shape.frame_rate
                )

    def encode(self, batch: StepBatch) -> Tensor:
        """Return all connector frames ``[F, H]`` of a step in the order of utterances, with a graph to what trains.

        Off the first stage there are none: ``[0, H]``.

        Raises:
            RuntimeError: if an utterance yields another number of frames than the data side counted.
        """
        if self.encoder is None:
            return self.no_frames()
        return self.encode_audio(batch.audio, batch.audio_lengths, batch.frame_lengths, batch.cut_ids)

    def encode_audio(self, audio: Tensor, lengths: Tensor, expected: Tensor, names: list[str] | None = None) -> Tensor:
        """Return the connector frames of utterances, ``[F, H]``; none off the first stage.

        Args:
            audio: ``[U, N]`` samples.
            lengths: ``[U]`` valid samples.
            expected: ``[U]`` frames that each must give, on the CPU.
            names: of the utterances, for messages.

        Raises:
            RuntimeError: if an utterance gives another number of frames.
        """
        if not len(audio) or self.encoder is None or self.connector is None:
            return self.no_frames()
        # the encoder's work is shared by the tensor-parallel processes; each then has all of it
        encode = self.encoder if self.encoder_cache is None else partial(self.encoder_cache.encode, self.encoder)
        encoded, encoded_lengths = encode_shared(encode, audio, lengths)  # [U, E, D]
        frames, frame_lengths = self.connector(encoded.to(self.connector.dtype), encoded_lengths)
        actual = frame_lengths.tolist()
        for index, (have, want) in enumerate(zip(actual, expected.tolist(), strict=True)):
            if have != want:
                raise RuntimeError(
                    f"{names[index] if names else f'utterance {index}'} has {have} speech frames, but its layout was "
                    f"built for {want}: data and model disagree on the encoder; build the dataset from this model"
                )
        return torch.cat([frames[u, :n] for u, n in enumerate(actual)])  # [F, H]

    def teach(self, batch: StepBatch) -> Tensor:
        """Return hidden states of the LLM without adapters for the text twins of a step.

        Returns:
            On the last stage ``[M, H]``, after the final norm, at the positions that ``MicroBatch.twin_index`` counts;
            elsewhere, and if no row has speech, ``[0, H]``.

        Raises:
            RuntimeError: if the rows came without twins.
        """
        if batch.twins is None:
            raise RuntimeError(
                "model.loss compares with text twins, but the rows of this step have none: build the dataset with "
                "with_twins=True"
            )
        with without_lora(self.chunks):
            kept = self.response_states(batch.twins, self.no_frames())
        return torch.cat(kept) if kept else self.no_frames().to(self.decoder.config.params_dtype)

    def loss_sums(
        self, decoder: GPTDecoder, microbatch: MicroBatch, hidden: Tensor, teacher: Tensor | None
    ) -> dict[str, Tensor]:
        """Return sums over the response tokens of one microbatch, on the last stage.

        Args:
            decoder: the last run of layers, with the head.
            microbatch: the rows.
            hidden: ``[T, R, H]``.
            teacher: ``[M, H]`` as :meth:`teach` gives them; ``None`` without a teacher.

        Returns:
            ``loss``, which is minimized, and the parts of it that ``self.loss`` measures.

        Raises:
            ValueError: if the loss compares with a teacher, and none is given.
        """
        config, group = self.loss, groups.tensor_parallel_group()
        logits = decoder.logits(hidden, microbatch.response_index)  # [n, V / tp]
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.ce_weight > 0):
            sums = {"ce": response_cross_entropy(logits, microbatch.targets, group)}
        if config.uses_teacher and teacher is None:
            raise ValueError("model.loss compares with the text twins: give the hidden states of teach()")
        if config.kl_weight and teacher is not None:
            sums["kl"] = self._divergence(decoder, microbatch, logits, teacher)
        if config.hidden_weight and teacher is not None:
            own = states_at(hidden, microbatch.response_index[microbatch.paired])
            sums["hidden"] = hidden_distance(own, teacher[microbatch.twin_index])
        weights = {"ce": config.ce_weight, "kl": config.kl_weight, "hidden": config.hidden_weight}
        weighted = [weights[name] * value for name, value in sums.items() if weights[name]]
        loss = sum(weighted[1:], weighted[0])
        return {"loss": loss, **{name: sums[name].detach() for name in config.parts}}

    def _divergence(self, decoder: GPTDecoder, microbatch: MicroBatch, logits: Tensor, teacher: Tensor) -> Tensor:
        """Return the summed divergence from the teacher, piece by piece: it works on several copies of the logits."""
        config, group = self.loss, groups.tensor_parallel_group()
        if len(microbatch.paired) < len(logits):
            logits = logits[microbatch.paired]
        size = max(COMPARED_AT_ONCE // logits.shape[-1], 1)
        total = logits.new_zeros(())
        for own, index in zip(logits.split(size), microbatch.twin_index.split(size), strict=True):
            with torch.no_grad():
                wanted = decoder.logits(teacher, index)
            total = total + response_divergence(
                own, wanted, config.divergence, config.temperature, config.scale_by_temperature, group
            )
        return total

    def train_step(self, batch: StepBatch, num_targets: int) -> StepLoss:
        """Run forward and backward of one optimizer step through Megatron's schedule.

        The connector runs once for all rows: ``frames`` enters the schedule as a detached leaf, every microbatch
        gathers from it, and one backward runs through the connector at the end.

        Args:
            batch: this replica's step.
            num_targets: response tokens of the step over all data-parallel ranks.

        Returns:
            This replica's share of the mean loss per response token: the sum over replicas is the mean.
        """
        teacher = self.teach(batch) if self.loss.uses_teacher else None
        frames = self.encode(batch)
        leaf = frames.detach().requires_grad_(True)
        # without a single frame nothing trains beside a frozen LLM, and autograd refuses to run backward for nothing
        forward_only = not batch.num_frames and not self.llm_state.needs_gradients
        result = self._run_loss(batch.microbatches, leaf, teacher, 1.0 / max(num_targets, 1), forward_only)
        if leaf.grad is not None and frames.requires_grad:
            frames.backward(leaf.grad)
        return result

    @torch.no_grad()
    def evaluate_step(self, batch: StepBatch) -> StepLoss:
        """Return the summed loss over this batch's response tokens, without gradients."""
        teacher = self.teach(batch) if self.loss.uses_teacher else None
        return self._run_loss(batch.microbatches, self.encode(batch), teacher, 1.0, forward_only=True)

    def _run_loss(
        self,
        microbatches: list[MicroBatch],
        frames: Tensor,
        teacher: Tensor | None,
        scale: float,
        forward_only: bool,
    ) -> StepLoss:
        """Return the loss of all microbatches times ``scale``; backward too, unless ``forward_only``."""

        def finish(decoder: GPTDecoder, microbatch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
            sums = self.loss_sums(decoder, microbatch, hidden, teacher)
            loss = sums.pop("loss") * scale
            return loss, torch.stack([loss.detach(), *(value * scale for value in sums.values())])

        total, *parts = self._on_every_stage(self.run_schedule(microbatches, frames, finish, forward_only))
        return StepLoss(total, dict(zip(self.loss.parts, parts, strict=True)))

    def _on_every_stage(self, kept: list[Tensor]) -> Tensor:
        """Return ``[1 + parts]``: loss and parts, summed over the microbatches that the last stage has kept."""
        loss = torch.zeros(1 + len(self.loss.parts), device=self.device, dtype=self._loss_dtype)
        if kept:
            loss = torch.stack(kept).sum(0)
        return groups.pipeline_sum(loss)

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.decoder.config.params_dtype, torch.float32)
