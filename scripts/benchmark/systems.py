# SPDX-License-Identifier: Apache-2.0
"""Training steps and answers of the systems that are compared: this project, NeMo's SALM, and a plain loop.

All train a connector between the same frozen encoder and LLM, in float32, with AdamW and gradients clipped by their
norm. Each has ``step(utterances)``, which prepares a batch and returns the function that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from assets import ENCODER_SIZE, HIDDEN, SAMPLE_RATE, Assets, Utterance
from torch import Tensor, nn

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.inference.generate import generate
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.layouts.layout import collate, make_row, speech
from nemo_mtbi.parallel.gradients import clip_gradients, gradient_norm, sum_gradients
from nemo_mtbi.speech_llm.model import SpeechLLM
from nemo_mtbi.speech_llm.pretrained import load_speech_encoder, load_text_llm

RATE, LIMIT = 1e-4, 1.0  # learning rate, norm of the gradients
MICRO_BATCH_TOKENS = 8192
NO_END = -1  # an id that no model gives: all answers have the longest length


class Project:
    """This project's model, without Lightning around it."""

    def __init__(self, assets: Assets):
        text = load_text_llm(assets.llm, torch.float32)
        encoder = load_speech_encoder(assets.asr, torch.float32)
        torch.manual_seed(0)
        connector = ConnectorConfig(kind="stack", frame_rate=12.5, hidden_size=HIDDEN)
        self.model = SpeechLLM(encoder, connector, text.chunks).train()
        self.chat = text.chat
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)

    def step(self, utterances: Sequence[Utterance]) -> Callable[[], float]:
        """Return a training step on a batch that is made now; it returns the loss."""
        counts = [self.model.frame_counter(len(utterance.samples)) for utterance in utterances]
        rows = [
            make_row([*before, *speech(0, counts[index]), *behind], response, index)
            for index, utterance in enumerate(utterances)
            for before, behind, response in utterance.rows
        ]
        batch = collate([utterance.samples for utterance in utterances], counts, rows, MICRO_BATCH_TOKENS)

        def run() -> float:
            for value in self.trained:
                value.grad = None
            loss = self.model.train_step(batch, batch.num_targets).loss
            sum_gradients(self.trained)
            clip_gradients(self.trained, gradient_norm(self.trained, self.model.device), LIMIT)
            self.optimizer.step()
            return float(loss)

        return run

    def answers(self, utterances: Sequence[Utterance], new_tokens: int) -> Callable[[], list[list[int]]]:
        """Return what answers the first row of each utterance by ``new_tokens`` tokens."""
        config = GenerationConfig(max_new_tokens=new_tokens)
        responder = Responder(self.model, self.chat, config)

        def run() -> list[list[int]]:
            layouts, first = [], 0
            for utterance in utterances:
                before, behind, _ = utterance.rows[0]
                count = self.model.frame_counter(len(utterance.samples))
                layouts.append([*before, *speech(first, count), *behind])
                first += count
            frames = responder.encode([utterance.samples for utterance in utterances])
            return [answer.ids for answer in generate(self.model, layouts, frames, NO_END, config)]

        return run


class Salm:
    """NeMo's SALM with a linear layer as its connector; its encoder encodes each row, as SALM has it."""

    def __init__(self, assets: Assets):
        from nemo.collections.speechlm2.models import SALM

        torch.manual_seed(0)
        self.model: Any = SALM(
            {
                "pretrained_llm": str(assets.llm),
                "pretrained_asr": str(assets.asr),
                "pretrained_weights": True,
                "audio_locator_tag": "<|audio|>",
                "prompt_format": "llama2",
                "freeze_params": [
                    r"^llm\..+$",
                    r"^embed_tokens\..+$",
                    r"^perception\.preprocessor\..+$",
                    r"^perception\.encoder\..+$",
                ],
                "prevent_freeze_params": [],
                "perception": {
                    "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
                    "modality_adapter": {
                        "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
                        "d_model": ENCODER_SIZE,
                    },
                    "output_dim": HIDDEN,
                },
                "optimizer": {"_target_": "torch.optim.AdamW", "lr": RATE},
            }
        )
        self.model.train()
        self.model.log = self.model.log_dict = lambda *unused, **options: None  # there is no trainer
        self.optimizer = self.model.configure_optimizers()["optimizer"]
        self.trained = [value for group in self.optimizer.param_groups for value in group["params"]]

    def step(self, utterances: Sequence[Utterance]) -> Callable[[], float]:
        """Return a training step on a batch that is made now; it returns the loss."""
        from nemo.collections.speechlm2.data.salm_dataset import left_collate_vectors

        audio, ids, masks = [], [], []
        for utterance in utterances:
            for before, behind, response in utterance.rows:
                audio.append(utterance.samples)
                prompt = [*before, self.model.audio_locator_tag_id, *behind]
                ids.append(torch.tensor([*prompt, *response]))
                masks.append(torch.tensor([0] * len(prompt) + [1] * len(response)))
        batch = {
            "audios": nn.utils.rnn.pad_sequence(audio, batch_first=True),
            "audio_lens": torch.tensor([len(samples) for samples in audio]),
            "input_ids": left_collate_vectors(ids, padding_value=self.model.text_pad_id),
            "loss_mask": left_collate_vectors(masks, padding_value=0).bool(),
        }

        def run() -> float:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model.training_step(batch, 0)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, LIMIT)
            self.optimizer.step()
            return float(loss)

        return run

    def answers(self, utterances: Sequence[Utterance], new_tokens: int) -> Callable[[], list[list[int]]]:
        """Return what answers the first row of each utterance by ``new_tokens`` tokens."""
        from nemo.collections.speechlm2.data.salm_dataset import left_collate_vectors
        from transformers import GenerationConfig as HFGenerationConfig

        prompts = [
            torch.tensor([*before, self.model.audio_locator_tag_id, *behind])
            for utterance in utterances
            for before, behind, _ in utterance.rows[:1]
        ]
        config = HFGenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=self.model.text_pad_id, max_new_tokens=new_tokens
        )

        def run() -> list[list[int]]:
            samples = [utterance.samples for utterance in utterances]
            return self.model.generate(
                prompts=left_collate_vectors(prompts, padding_value=self.model.text_pad_id),
                audios=nn.utils.rnn.pad_sequence(samples, batch_first=True),
                audio_lens=torch.tensor([len(x) for x in samples]),
                generation_config=config,
            ).tolist()

        return run


class Plain:
    """A loop written by hand: encode each utterance once, one padded batch, head on response positions."""

    def __init__(self, assets: Assets):
        from transformers import LlamaForCausalLM

        self.llm: Any = LlamaForCausalLM.from_pretrained(assets.llm, dtype=torch.float32).requires_grad_(False).eval()
        self.encoder = load_speech_encoder(assets.asr, torch.float32)
        self.counter = FrameCounter(self.encoder.shape.stages, SAMPLE_RATE)
        torch.manual_seed(0)
        self.connector = nn.Sequential(
            nn.LayerNorm(ENCODER_SIZE), nn.Linear(ENCODER_SIZE, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)
        )
        self.optimizer = torch.optim.AdamW(self.connector.parameters(), lr=RATE)

    def step(self, utterances: Sequence[Utterance]) -> Callable[[], float]:
        """Return a training step on a batch that is made now; it returns the loss."""
        audio = nn.utils.rnn.pad_sequence([utterance.samples for utterance in utterances], batch_first=True)
        lengths = torch.tensor([len(utterance.samples) for utterance in utterances])
        counts = [self.counter(int(length)) for length in lengths]
        layout, index, targets = self._rows(utterances, counts)

        def run() -> float:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                encoded, _ = self.encoder(audio, lengths)
            frames = self.connector(torch.cat([encoded[u, :count] for u, count in enumerate(counts)]))
            embeddings = self.llm.model.embed_tokens(layout.clamp(min=0))
            spoken = F.embedding((-layout - 1).clamp(min=0), frames)
            embeddings = torch.where((layout < 0)[..., None], spoken, embeddings)
            hidden = self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            logits = self.llm.lm_head(hidden.reshape(-1, HIDDEN)[index])
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.connector.parameters(), LIMIT)
            self.optimizer.step()
            return float(loss)

        return run

    @staticmethod
    def _rows(utterances: Sequence[Utterance], counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the padded rows ``[R, T]``, flat positions that predict response tokens, and those tokens."""
        rows, starts, targets, first = [], [], [], 0
        for utterance, count in zip(utterances, counts, strict=True):
            for before, behind, response in utterance.rows:
                spoken = range(-1 - first, -1 - first - count, -1)
                rows.append(torch.tensor([*before, *spoken, *behind, *response[:-1]]))
                starts.append((len(before) + count + len(behind) - 1, len(response)))
                targets += response
            first += count
        layout = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        index = [row * layout.shape[1] + at + i for row, (at, length) in enumerate(starts) for i in range(length)]
        return layout, torch.tensor(index), torch.tensor(targets)
