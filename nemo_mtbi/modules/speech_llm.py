# SPDX-License-Identifier: Apache-2.0
"""Speech encoder, connector and decoder joined: encode once per step, embed layouts, decode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_mtbi.data.frames import FrameCounter
from nemo_mtbi.data.layout import MicroBatch, StepBatch
from nemo_mtbi.losses import response_cross_entropy
from nemo_mtbi.modules.connector import Connector, ConnectorConfig
from nemo_mtbi.modules.decoder import GPTDecoder
from nemo_mtbi.modules.speech_encoder import SpeechEncoder
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.cpu import megatron_device


class LayoutDecoder(nn.Module):
    """The frozen decoder behind layouts. Alone it is the text LLM: its layouts hold token ids only."""

    def __init__(self, decoder: GPTDecoder):
        super().__init__()
        self.decoder = decoder.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def embed(self, layout: Tensor, frames: Tensor) -> Tensor:
        """Token ids take the LLM's embedding row, negative values take speech frames: one gather each.

        Args:
            layout: ``[R, T]``.
            frames: ``[F, H]``.

        Returns:
            ``[T, R, H]`` in the decoder's dtype.
        """
        tokens = self.decoder.embed_tokens(layout.clamp(min=0))  # [R, T, H]
        if len(frames):
            speech = F.embedding((-layout - 1).clamp(min=0), frames.to(tokens.dtype))  # [R, T, H]
            tokens = torch.where((layout < 0).unsqueeze(-1), speech, tokens)
        return tokens.transpose(0, 1).contiguous()


class SpeechLLM(LayoutDecoder):
    """The model of one rank. Encoder and decoder are frozen, the connector trains.

    The decoder stays in ``train()`` with zero dropout (Megatron skips activation recomputation in ``eval()``) except
    inside ``generate``, where its cache needs ``eval()``.
    """

    def __init__(self, encoder: SpeechEncoder, connector: ConnectorConfig, decoder: GPTDecoder):
        super().__init__(decoder)
        self.encoder = encoder
        self.connector = Connector(connector, encoder.size, decoder.config.hidden_size, encoder.frame_rate)

    @property
    def frame_counter(self) -> FrameCounter:
        """Counts connector frames from samples, for the data side."""
        return FrameCounter(self.encoder.stages + self.connector.stages, self.encoder.sample_rate)

    def encode(self, batch: StepBatch) -> Tensor:
        """All connector frames of a step, ``[F, H]``, in the order of its utterances, with a graph to the connector.

        Raises:
            RuntimeError: if an utterance yields another number of frames than the data side counted.
        """
        return self.encode_audio(batch.audio, batch.audio_lengths, batch.frame_lengths, batch.cut_ids)

    def encode_audio(self, audio: Tensor, lengths: Tensor, expected: Tensor, names: list[str] | None = None) -> Tensor:
        """``audio [U, N]`` with ``lengths [U]`` samples to ``[F, H]``; ``expected [U]`` frames on the CPU."""
        if not len(audio):
            return torch.zeros(0, self.decoder.config.hidden_size, device=self.device)
        encoded, encoded_lengths = self.encoder(audio, lengths)  # [U, E, D]
        frames, frame_lengths = self.connector(encoded.to(self.connector.mlp[0].weight.dtype), encoded_lengths)
        found = frame_lengths.tolist()
        for index, (have, want) in enumerate(zip(found, expected.tolist(), strict=True)):
            if have != want:
                raise RuntimeError(
                    f"{names[index] if names else f'utterance {index}'} has {have} speech frames, but its layout was "
                    f"built for {want}: data and model disagree on the encoder; build the dataset from this model"
                )
        return torch.cat([frames[u, :n] for u, n in enumerate(found)])  # [F, H]

    def loss_sum(self, microbatch: MicroBatch, frames: Tensor) -> Tensor:
        """Summed cross entropy of the response tokens of one microbatch."""
        hidden = self.decoder.hidden(self.embed(microbatch.layout, frames))  # [T, R, H]
        logits = self.decoder.logits(hidden, microbatch.response_index)  # [n, V / tp]
        return response_cross_entropy(logits, microbatch.targets, groups.tensor_parallel_group())

    def train_step(self, batch: StepBatch, num_targets: int) -> Tensor:
        """Forward and backward of one optimizer step through Megatron's schedule.

        The connector runs once for all rows: ``frames`` enters the schedule as a detached leaf, every microbatch
        gathers from it, and one backward runs through the connector at the end.

        Args:
            batch: this rank's step.
            num_targets: response tokens of the step over all data-parallel ranks.

        Returns:
            This rank's share of the mean loss per response token (sum over ranks gives the mean).
        """
        frames = self.encode(batch)
        leaf = frames.detach().requires_grad_(True)
        # without a single frame nothing here trains, and autograd refuses to run backward
        losses = self._run_schedule(batch.microbatches, leaf, 1.0 / max(num_targets, 1), forward_only=not len(leaf))
        if leaf.grad is not None and frames.requires_grad:
            frames.backward(leaf.grad)
        return losses

    @torch.no_grad()
    def evaluate_step(self, batch: StepBatch) -> Tensor:
        """Summed loss over this batch's response tokens, without gradients."""
        return self._run_schedule(batch.microbatches, self.encode(batch), 1.0, forward_only=True)

    def _run_schedule(
        self, microbatches: list[MicroBatch], frames: Tensor, scale: float, forward_only: bool
    ) -> Tensor:
        """Sends the microbatches through Megatron's schedule; each loss is its sum times ``scale``."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if not microbatches:  # a step whose cuts were all left out; the schedule would still ask for one microbatch
            return torch.zeros((), device=self.device)

        def forward_step(iterator, decoder):
            microbatch = next(iterator)
            loss = self.loss_sum(microbatch, frames) * scale
            tokens = torch.tensor(len(microbatch.response_index), dtype=torch.int, device=loss.device)
            return loss, lambda output: (output, tokens, {"loss": output.detach()})

        with megatron_device(self.device):
            stored = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=self.decoder,
                num_microbatches=len(microbatches),
                seq_length=1,  # not read: lengths vary
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return torch.stack([entry["loss"] for entry in stored]).sum()
