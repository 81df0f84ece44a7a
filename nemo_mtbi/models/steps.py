# SPDX-License-Identifier: Apache-2.0
"""The training steps of a model: forward and backward, the updates, and the steps that are left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from nemo.core.classes import ModelPT
from nemo.utils import logging
from torch import Tensor, nn

from nemo_mtbi.compat.lightning import keep_all_steps, leave_out_steps
from nemo_mtbi.compat.nemo import set_parameter_groups
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.layouts.layout import StepBatch
from nemo_mtbi.models import profiling
from nemo_mtbi.models.nonfinite import REMEDY, nonfinite_message
from nemo_mtbi.models.profiling import ProfilingBatch
from nemo_mtbi.models.skipping import Skips
from nemo_mtbi.parallel import groups, random_states
from nemo_mtbi.parallel.gradients import clip_factor, clip_gradients, gradient_norm, sum_gradients
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer
from nemo_mtbi.speech_llm.model import SpeechLLM
from nemo_mtbi.speech_llm.trainable import TRAINABLE_PARTS


class TrainingSteps(ModelPT):
    """Lightning's hooks of a step.

    A step is left out if none of its cuts is usable, or if its loss or gradient is NaN or Inf and ``on_nonfinite`` is
    ``skip``. It has no effect: weights, moments of the optimizers, learning rate and random states stay as they are,
    and ``trainer.global_step`` (so ``trainer.max_steps``) does not count it. The weights at the end are those of a run
    without the step. What counts batches counts it: the position in the data, ``trainer.limit_train_batches`` and
    ``trainer.val_check_interval``.

    Lightning has no way to leave out a step of several processes, but it can accumulate gradients over steps without
    an update, and that is what it takes such a step for. It decides so before it calls ``training_step``; therefore
    forward and backward run in ``on_train_batch_start``.
    """

    speech_llm: SpeechLLM
    config: ModelConfig
    llm_optimizer: LlmOptimizer | None
    _skips: Skips
    _loss: Tensor | None = None  # of the step in hand; ``None``: it is left out, or there is no step
    _figures: dict[str, Tensor | float]  # what is logged of it
    _gradient_norm: Tensor
    _left_out = False  # the step in hand

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that this process trains beside weights of the LLM itself: none, if it holds a later stage."""
        others = [part.tensors(self.speech_llm) for part in TRAINABLE_PARTS if part.has_own_optimizer]
        excluded = {id(value) for tensors in others for value in tensors.values()}
        return [value for value in self.parameters() if value.requires_grad and id(value) not in excluded]

    def setup_optimizer_param_groups(self) -> None:
        """Hand only what is trained to the optimizer; an empty group is fine."""
        set_parameter_groups(self, [{"params": self.trained}])

    # ----- a step

    def on_train_start(self) -> None:
        """Let Lightning treat steps that are left out as gradients that are still being accumulated."""
        super().on_train_start()
        self._left_out = False
        self._skips.begin(self.train_dataloader())
        # accumulating gradients is refused in on_fit_start(), so this method has no other use
        leave_out_steps(self.trainer, lambda: self._left_out)

    def on_train_end(self) -> None:
        """Restore Lightning's loop.

        Raises:
            RuntimeError: if every step of the run was left out.
        """
        super().on_train_end()
        keep_all_steps(self.trainer)
        if not self.trainer.should_stop:
            self._skips.check_end(self.trainer.global_step)

    def on_train_batch_start(self, batch: StepBatch, batch_idx: int, unused: int = 0) -> int | None:
        """Run forward and backward of the step, through Megatron's schedule.

        Raises:
            RuntimeError: for a NaN or Inf under ``on_nonfinite: raise``; names the cuts. If steps are left out without
                end.
        """
        answer = super().on_train_batch_start(batch, batch_idx, unused)
        if isinstance(batch, StepBatch):
            self._loss = self._learn(batch)
            self._left_out = self._loss is None
            self._skips.end_step(self._left_out)
        return answer

    def training_step(self, batch: StepBatch | ProfilingBatch, batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Return the loss of the step that :meth:`on_train_batch_start` has run; zero for one that is left out."""
        if isinstance(batch, ProfilingBatch):
            return {"loss": profiling.profile_step(self, batch)}
        if self._loss is None:
            return torch.zeros((), device=self.device)
        for name, value in self._figures.items():
            self.log(name, value, prog_bar=name == "train_loss")
        return self._loss

    def _learn(self, batch: StepBatch) -> Tensor | None:
        """Run forward and backward; return the loss, or ``None`` on all processes if the step is left out."""
        self.train_dataloader().mark_trained()  # no checkpoint is written before this step has ended
        trained = self.trained
        for value in trained:
            value.grad = None
        if self.llm_optimizer is not None:
            self.llm_optimizer.zero_grad()
        self._skips.count(batch.skipped)
        count = groups.data_parallel_sum(torch.tensor(float(batch.num_targets), device=self.device))
        if not count:
            return None
        before = random_states.capture() if self.config.on_nonfinite == "skip" else None
        loss, parts = self.speech_llm.train_step(batch, int(count))
        own = loss.detach().clone()
        loss = groups.data_parallel_sum(loss.detach())
        sum_gradients(trained)
        norm = gradient_norm(trained, self.device)
        if self.llm_optimizer is not None:
            self.llm_optimizer.reduce()
            norm = (norm.square() + self.llm_optimizer.norm().square()).sqrt()
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._on_nonfinite(batch, own)
            if before is not None:
                random_states.restore(before)
            return None
        self._gradient_norm = norm
        self._figures = self._figures_of(loss, parts, norm, count)
        return loss

    def _figures_of(
        self, loss: Tensor, parts: Mapping[str, Tensor], norm: Tensor, count: Tensor
    ) -> dict[str, Tensor | float]:
        """Return the logged figures of a step."""
        optimizer = self.trainer.optimizers[0]
        figures: dict[str, Tensor | float] = {"train_loss": loss}
        figures |= {f"train_{name}": groups.data_parallel_sum(value) for name, value in parts.items()}
        figures |= {"gradient_norm": norm.float(), "learning_rate": optimizer.param_groups[0]["lr"]}
        if self.llm_optimizer is not None:
            figures["llm_learning_rate"] = self.llm_optimizer.base_lr * _decay(optimizer)
        return {**figures, "response_tokens": count}

    def _on_nonfinite(self, batch: StepBatch, loss: Tensor) -> None:
        """Stop or leave the step out after a NaN or Inf in loss or gradient, which all processes see at once.

        Raises:
            RuntimeError: names the cuts whose loss it was, or those of the step if only the gradient was.
        """
        for value in self.trained:
            value.grad = None
        parts = groups.gather_objects((bool(torch.isfinite(loss)), batch.cut_ids), "data")
        message = nonfinite_message(parts, self.trainer.global_step)
        if self.config.on_nonfinite == "raise":
            raise RuntimeError(f"{message}. {REMEDY}")
        self._skips.nonfinite(message)

    # ----- its update

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip by the norm over all processes; Lightning would see this process' share only."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError("trainer.gradient_clip_algorithm must be norm: it is the norm over all processes")
        if gradient_clip_val:
            clip_gradients(self.trained, self._gradient_norm, gradient_clip_val)
            if self.llm_optimizer is not None:
                self.llm_optimizer.scale(clip_factor(self._gradient_norm, gradient_clip_val))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        """Run the closure and update the connector, as Lightning does; then the LLM, if it trains."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.llm_optimizer is not None:
            self.llm_optimizer.step(_decay(optimizer))

    def backward(self, loss: Tensor, *args, **kwargs) -> None:
        """Nothing is left to do: the schedule has run backward."""

    def optimizer_zero_grad(self, *args, **kwargs) -> None:
        """Do nothing: Lightning calls it after the schedule, where it would erase the gradients."""

    def on_train_epoch_end(self) -> None:
        """Report what was left out.

        Raises:
            RuntimeError: if a whole pass has taught nothing.
        """
        report = self._skips.end_pass(self.trainer.should_stop)
        if report:
            logging.warning(f"left out in epoch {self.current_epoch}: {report}")


def _decay(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of now as a share of the highest one of its schedule."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("initial_lr", optimizer.defaults["lr"])
