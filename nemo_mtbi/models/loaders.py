# SPDX-License-Identifier: Apache-2.0
"""The data of a model: what its loaders must know of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_mtbi.archive.speech_model import SpeechModel
from nemo_mtbi.config.schema import plain
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.replica import ReplicaLoader
from nemo_mtbi.targets.store import check_published


def build_loader(model: SpeechModel, section: DictConfig, train: bool) -> ReplicaLoader:
    """Return the loader of a section of NeMo's data keys: one process of each replica reads, the others receive.

    Rows that are longer than the LLM's positions are counted and left out: it has not seen such positions, and
    generation would refuse them.

    Args:
        model: whose frames, chat format and limits count.
        section: ``train_ds`` or ``validation_ds``.
        train: whether rows are interleaved and the run may be stopped.
    """
    config = model.config
    dataset = MTBIDataset(
        model.chat,
        model.speech_llm.frame_counter,
        config.micro_batch_tokens,
        interleave=config.interleave if train else None,
        on_bad_audio=config.on_bad_audio,
        with_rows=not train,
        with_twins=config.loss.uses_teacher,
    )
    longest = model.speech_llm.decoder.max_sequence_length - (0 if train else config.generation.max_new_tokens)
    given = plain(section)
    make = partial(
        _build_checked,
        {"max_tokens": longest, **given},
        dataset,
        rank=groups.data_parallel_rank(),
        world_size=groups.data_parallel_size(),
        train=train,
        expected=model.expected_targets,
        allow_foreign=config.targets.allow_foreign,
    )
    return ReplicaLoader.build(make, stop=(lambda: model.wants_to_stop()) if train else None)


def _build_checked(given: Mapping[str, Any], dataset: MTBIDataset, **options: Any) -> Any:
    """Build the loader of cuts checked to be as they were written, where that is known; on a reader."""
    for key in ("cuts_path", "input_cfg"):
        paths = given.get(key)
        for path in paths if isinstance(paths, (list, tuple)) else [paths]:
            if isinstance(path, (str, Path)):
                check_published(path)
    return build_dataloader(given, dataset, **options)
