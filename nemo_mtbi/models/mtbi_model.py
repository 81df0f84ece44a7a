# SPDX-License-Identifier: Apache-2.0
"""``MTBIModel``: the ModelPT that NeMo trains, saves and restores. It only assembles the parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core.classes.common import PretrainedModelInfo
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from nemo_mtbi.archive.frozen import FrozenParts
from nemo_mtbi.archive.loading import load_model
from nemo_mtbi.archive.restored import OpenArchive, restore_error
from nemo_mtbi.archive.save_restore import MTBIArchive, connector_of
from nemo_mtbi.archive.warm_start import warm_start
from nemo_mtbi.compat import nemo
from nemo_mtbi.compat.lightning import resume_pass, store_running_pass
from nemo_mtbi.config.model import RUN_KEYS, parse_model_config
from nemo_mtbi.config.schema import plain
from nemo_mtbi.data.behaviors import CHAT_FORMAT
from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.layouts.layout import StepBatch
from nemo_mtbi.llm.decoder import check_training
from nemo_mtbi.llm.full_finetune import build_llm_optimizer
from nemo_mtbi.llm.lora import set_merged
from nemo_mtbi.models import profiling
from nemo_mtbi.models.generation import GenerationMixin
from nemo_mtbi.models.loaders import build_loader
from nemo_mtbi.models.optimizers import OPTIMIZERS, check_optimizers, names
from nemo_mtbi.models.resuming import RUN, check_resume, describe_run
from nemo_mtbi.models.skipping import Skips
from nemo_mtbi.models.steps import TrainingSteps
from nemo_mtbi.models.validation import SHOWN, validation_figures
from nemo_mtbi.parallel import groups, random_states
from nemo_mtbi.parallel.checkpoint.content import LLM_OPTIMIZER, RANDOM_STATES
from nemo_mtbi.parallel.gradients import share_parameters
from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer
from nemo_mtbi.parallel.strategy import MTBIStrategy, seed_processes
from nemo_mtbi.register import register
from nemo_mtbi.speech_llm.trainable import TRAINABLE_PARTS, check_shapes, part_tensors


class MTBIModel(GenerationMixin, TrainingSteps):
    """A speech LLM trained by multi-task behavior imitation (arXiv 2505.18644).

    Args:
        cfg: the ``model:`` section (:class:`nemo_mtbi.config.model.ModelConfig`).
        trainer: Lightning trainer; not needed for inference.
        archive: the open ``.nemo`` that :meth:`restore_from` restores the model from; ``None``: the model is new.

    Raises:
        ValueError: for an unknown, missing or contradictory key, or a frozen part that is not the one trained with.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None, archive: OpenArchive | None = None):
        register()
        # read now: restoring the encoder's own archive ends NeMo's state
        restoring = archive is not None or nemo.is_restoring()
        config = parse_model_config(cfg)
        if trainer is not None and isinstance(strategy := getattr(trainer, "strategy", None), MTBIStrategy):
            strategy.start(trainer)
        # when restoring, keep the layout in force
        groups.initialize(None if restoring else config.layout, config.dist_timeout)
        frozen = FrozenParts(config, archive)
        cfg = OmegaConf.create(plain(cfg))
        with open_dict(cfg):
            # set up below: the loaders need the frame counter of the modules
            data = {name: cfg.pop(name, None) for name in ("train_ds", "validation_ds", "test_ds")}
            for key in RUN_KEYS:
                cfg.pop(key, None)
            if "sched" in (cfg.get("optim") or {}) and cfg.optim.sched is None:
                del cfg.optim.sched  # a constant learning rate; NeMo takes the key alone for a schedule
            cfg.fingerprints, cfg.format_version = frozen.fingerprints, config.format_version
            cfg.pop("file_digests", None)
            if frozen.file_digests:
                cfg.file_digests = frozen.file_digests
        super().__init__(cfg, trainer)
        nemo.set_connector(self, MTBIArchive())
        self.config, self.frozen = config, frozen
        loaded = load_model(config, frozen, archive)
        self.speech_llm, self.shape, self.llm_files = loaded.speech_llm, loaded.shape, loaded.llm_files
        llm = loaded.text_llm
        self.chat = llm.chat
        chat = {"chat": llm.chat.fingerprint(), CHAT_FORMAT: llm.chat.description()}
        self.expected_targets = {"llm": llm.fingerprint, **chat}
        self._skips = Skips()
        self._validation: list[dict] = []
        self._random_states: dict | None = None  # of the checkpoint that this run goes on from
        self._llm_moments: dict | None = None  # the same
        self.llm_optimizer: LlmOptimizer | None = None  # within a fit, if the LLM trains
        self.run_settings: dict | None = None  # of the training that are not the model's, for its checkpoints
        self.wants_to_stop: Callable[[], bool] = lambda: False  # called before each step, on every process
        if not restoring:  # the data may be elsewhere
            if data["train_ds"] is not None:
                self.setup_training_data(data["train_ds"])
            if data["validation_ds"] is not None:
                self.setup_validation_data(data["validation_ds"])

    # ----- data

    def setup_training_data(self, train_data_config: DictConfig) -> None:
        """Build the training loader from NeMo's data keys."""
        nemo.record_data_config(self, "train", train_data_config)
        nemo.set_training_loader(self, build_loader(self, train_data_config, train=True))

    def setup_validation_data(self, val_data_config: DictConfig) -> None:
        """Build the validation loader: every behavior of its cuts, or ``rows_per_cut`` of them."""
        nemo.record_data_config(self, "validation", val_data_config)
        nemo.set_validation_loader(self, build_loader(self, val_data_config, train=False))

    # ----- training

    def on_fit_start(self) -> None:
        """Check what a training needs, give all processes the same first weights, and start the LLM's optimizer.

        Raises:
            ValueError: for settings that can't be trained with; names the remedy.
        """
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1: a step is already split into microbatches; raise "
                "model.train_ds.batch_tokens for a larger step"
            )
        check_training(self.speech_llm.decoder.architecture, groups.layout())
        for part in TRAINABLE_PARTS:
            part.check_separate(self.speech_llm, "training")
        share_parameters(self.trained)
        seed_processes()
        self.close_llm_optimizer()  # of a fit that has failed
        self._random_states = self._llm_moments = None  # of a checkpoint that was only validated; now comes another
        if self.speech_llm.llm_state.weights_train:
            (optimizer,) = self.trainer.optimizers
            self.llm_optimizer = build_llm_optimizer(self.speech_llm.chunks, self.config.llm, optimizer.defaults)

    def on_fit_end(self) -> None:
        """Free the memory of the LLM's optimizer."""
        self.close_llm_optimizer()

    def close_llm_optimizer(self) -> None:
        """Free the memory of the LLM's gradients and moments."""
        if self.llm_optimizer is not None:
            self.llm_optimizer.close()
            self.llm_optimizer = None

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the run and its optimizers, and store a pass that was broken off as one that goes on.

        Lightning counts such a pass as one that has ended.
        """
        checkpoint[RUN] = describe_run(self)
        if self.trainer is None:
            return
        checkpoint[OPTIMIZERS] = names(self.trainer.optimizers)
        loader = self.train_dataloader()
        if loader is not None:
            store_running_pass(checkpoint, self.trainer, lambda: loader.state_dict()["epoch"])

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Compare the run of a checkpoint with this one, and keep its states until training starts.

        Args:
            checkpoint: as Lightning loads it.

        Raises:
            ValueError: if encoder, LLM, chat format or optimizer are other ones.
        """
        check_resume(self, checkpoint)
        if self.trainer is not None:
            check_optimizers(checkpoint, self.trainer.optimizers)
        self._random_states = checkpoint.get(RANDOM_STATES)
        self._llm_moments = checkpoint.get(LLM_OPTIMIZER)

    def on_train_start(self) -> None:
        """Restore optimizer, random states and counters of the checkpoint that the run resumes from."""
        super().on_train_start()
        if self.llm_optimizer is not None:
            self.llm_optimizer.restore(self._llm_moments)
            self._llm_moments = None
        if self._random_states is not None:  # a run that goes on: right before its first step
            random_states.restore(self._random_states)
            self._random_states = None
            resume_pass(self.trainer, self.train_dataloader().state_dict()["epoch"])

    @property
    def agreed_to_stop(self) -> bool:
        """Whether some process had a request to stop when the step in hand was read; the same on all of them."""
        return self.train_dataloader().stop_requested

    @property
    def oomptimizer_schema(self) -> dict:
        """For NeMo's ``oomptimizer.py``: see :func:`nemo_mtbi.models.profiling.oomptimizer_schema`."""
        return profiling.oomptimizer_schema(self)

    # ----- validation

    def validation_step(self, batch: StepBatch, batch_idx: int, dataloader_idx: int = 0) -> dict:
        """Return the loss on the targets, and free-running answers to compare with the LLM's answers to the text."""
        loss, parts = self.speech_llm.evaluate_step(batch)
        result: dict[str, Any] = {"loss": loss.item(), "tokens": batch.num_targets}
        result["parts"] = {name: value.item() for name, value in parts.items()}
        result["rows"] = batch.rows
        with torch.no_grad():
            frames = self.speech_llm.encode(batch)
        offsets = batch.frame_lengths.cumsum(0) - batch.frame_lengths
        layouts = [
            [value - int(offsets[row.utterance]) if value < 0 else value for value in row.prompt] for row in batch.rows
        ]
        answers = self.responder().layouts(layouts, frames) if layouts else []
        result["answers"] = [self.chat.decode(answer.ids) for answer in answers]
        self._validation.append(result)
        self._skips.count(batch.skipped)
        return result

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation over all processes."""
        own, self._validation = self._validation, []
        results = [result for part in groups.gather_objects(own, "data") for result in part]
        for name, value in validation_figures(results, self.config).items():
            self.log(name, value, prog_bar=name in SHOWN)

    # ----- checkpoints: the frozen parts are referred to by path and hash, unless a .nemo is to be full

    def state_dict(
        self, *, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """Return this process's share of the weights that train, by names that no layout changes.

        Args:
            destination: as in torch: gets them and is returned; ``None``: a new one.
            prefix: as in torch: of all names.
            keep_vars: whether they are the parameters themselves.
        """
        state = {} if destination is None else destination
        for name, value in part_tensors(TRAINABLE_PARTS, self.speech_llm).items():
            state[prefix + name] = value if keep_vars else value.detach()
        return state

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, **kwargs):
        """Copy weights that train into this process's share of the model; see :meth:`state_dict`.

        Raises:
            ValueError: if shapes differ, or names with ``strict``.
        """
        for part in TRAINABLE_PARTS:
            part.check_separate(self.speech_llm, "loading")
        own = self.state_dict(keep_vars=True)
        if own:  # nothing is trained on a later stage of a frozen LLM
            expected, given = ({name: tuple(x.shape) for name, x in state.items()} for state in (own, state_dict))
            check_shapes(expected, given, strict, "the checkpoint")
        with torch.no_grad():
            for name in own.keys() & state_dict.keys():
                own[name].copy_(state_dict[name])
        return super().load_state_dict({}, strict=False, **kwargs)

    def merge_lora(self) -> None:
        """Add the adapters to the LLM's weights: answers as fast as without them, but no training and no saving."""
        set_merged(self.speech_llm.chunks, True)

    def unmerge_lora(self) -> None:
        """Take the adapters out of the LLM's weights again."""
        set_merged(self.speech_llm.chunks, False)

    def save_to(self, save_path: str | Path, full: bool | None = None) -> None:
        """Write a ``.nemo`` that fits every layout. All processes of the run call this together.

        Args:
            save_path: of the file; what is there is replaced when the new one is whole.
            full: whether encoder and LLM are stored too, so that the file needs no other; ``None``: only if this
                model came out of such a file.

        Raises:
            ValueError: if a small file would refer to parts that have no path of their own.
            RuntimeError: the same in all processes, if the file can't be written.
        """
        nemo.connector_of(self).save_to(self, save_path, full)

    @classmethod
    def restore_from(
        cls, restore_path: str | Path, override_config_path=None, *args, save_restore_connector=None, **kwargs
    ):
        """Restore a ``.nemo`` in the layout in force, in that of ``trainer`` or in that of the configuration given.

        Args:
            restore_path: the file, or the directory it was unpacked to.
            override_config_path: YAML or mapping with keys that differ from the stored ones.
            *args: as in NeMo's ``ModelPT.restore_from``: ``map_location``, ``strict``, ``return_config``.
            save_restore_connector: needed by callers of NeMo who name a directory in it.
            **kwargs: the same by name, and ``trainer``.

        Raises:
            ValueError: if the file is no MTBI ``.nemo``, or its frozen parts are not the ones trained with.
        """
        register()
        connector = connector_of(save_restore_connector)
        path = Path(connector.model_extracted_dir or restore_path).expanduser()
        try:
            if not path.exists():
                raise ArchiveError("it does not exist")
            return super().restore_from(
                str(path), override_config_path, *args, save_restore_connector=connector, **kwargs
            )
        except (ArchiveError, DamageError) as error:
            raise ValueError(restore_error(path, error)) from error
        finally:  # NeMo leaves this on after an error, and the next model would be built without its data
            nemo.set_restoring(False)

    def maybe_init_from_pretrained_checkpoint(self, cfg: DictConfig, map_location: str = "cpu") -> None:
        """Start the connector from that of another ``.nemo``: NeMo's key ``init_from_nemo_model`` in ``cfg``.

        Args:
            cfg: ``init_from_nemo_model: path``, or ``name: {path, include, exclude}``; ``init_strict``.
            map_location: not needed.

        Raises:
            ValueError: if a file is no MTBI ``.nemo``, or its connector has another shape.
        """
        warm_start(self, cfg)

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """Return an empty list: no pretrained models are published."""
        return []
