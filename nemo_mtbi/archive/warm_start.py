# SPDX-License-Identifier: Apache-2.0
"""Starts what is trained from another ``.nemo``: NeMo's key ``init_from_nemo_model``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo.utils import logging

from nemo_mtbi.archive.frozen import INSIDE
from nemo_mtbi.archive.restored import restore_error
from nemo_mtbi.archive.save_restore import load_trained, read_config
from nemo_mtbi.archive.speech_model import SpeechModel
from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.io.nemo_tar import WEIGHTS, NemoFile
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.trainable import TRAINABLE_PARTS


def warm_start(model: SpeechModel, cfg: Mapping[str, Any]) -> None:
    """Take the weights that are trained from other ``.nemo`` files, and nothing else of them.

    Where a file has no adapters, or nothing of the encoder or the LLM, since they did not train there, those of the
    model stay.

    Args:
        model: changed in place.
        cfg: may hold NeMo's ``init_from_nemo_model`` (a path, or ``name: {path, include, exclude}``) and
            ``init_strict``.

    Raises:
        ValueError: if a file is no MTBI ``.nemo``, its weights are of another shape, or what is trained of its encoder
            or LLM belongs to another one than that of the model.
    """
    for key in ("init_from_pretrained_model", "init_from_ptl_ckpt"):
        if cfg.get(key):
            raise ValueError(f"{key} is not supported: give the path of a .nemo in init_from_nemo_model")
    given = cfg.get("init_from_nemo_model")
    if not given:
        return
    sources = given.values() if isinstance(given, Mapping) else [{"path": given}]
    for source in sources:
        known = isinstance(source, Mapping) and set(source) <= {"path", "include", "exclude"}
        if not known or not isinstance(source.get("path"), (str, Path)) or _is_text(source):
            raise ValueError(
                "init_from_nemo_model must be a path, or name: {path, include, exclude} with lists of parts of names; "
                f"it has {source}"
            )
        _init_from(model, Path(source["path"]).expanduser(), source, bool(cfg.get("init_strict", True)))


def _is_text(source: Mapping[str, Any]) -> bool:
    """Whether a text stands where a list of texts must; its letters would be taken for parts of names."""
    return any(isinstance(source.get(key), str) for key in ("include", "exclude"))


def _init_from(model: SpeechModel, path: Path, source: Mapping[str, Any], strict: bool) -> None:
    include, exclude = source.get("include", [""]), source.get("exclude", [])
    try:
        with NemoFile(path) as file:
            stored, tensors = read_config(file, type(model)), file.tensors(WEIGHTS)
            names = set(tensors.names()) | set(model.state_dict())
            _check_whole(stored, path)
            for part in TRAINABLE_PARTS:
                absent = not any(name.startswith(part.prefix) for name in tensors.names())
                if part.is_optional and absent:  # it was frozen there
                    names = {name for name in names if not name.startswith(part.prefix)}
            only = {n for n in names if any(part in n for part in include) and not any(p in n for p in exclude)}
            other = [part for part in INSIDE if stored.fingerprints[part] != model.frozen.fingerprints[part]]
            for part in TRAINABLE_PARTS:
                if part.replaces in other and any(name.startswith(part.prefix) for name in only):
                    raise ValueError(
                        f"init_from_nemo_model: {path} has trained weights of another {part.name} than "
                        f"model.pretrained_{part.replaces}: give that one, or exclude: [{part.prefix}]"
                    )
            load_trained(model, tensors, strict, path, groups.broadcast_object(only))
    except (ArchiveError, DamageError) as error:
        raise ValueError(f"init_from_nemo_model: {restore_error(path, error)}") from error
    if groups.is_global_first():
        logging.info(f"the connector starts from {path}")
        for frozen in other:
            logging.warning(f"the connector in {path} was trained with another {frozen} than this model has")


def _check_whole(stored: Mapping[str, Any], path: Path) -> None:
    """Refuse a file that holds a trained LLM as a whole: the change can't be separated from the original."""
    if stored.get("llm_was_trained"):
        raise ValueError(
            f"init_from_nemo_model: {path} is a full .nemo whose LLM has been trained: restore it, or unpack it (tar) "
            "and give its folder llm as model.pretrained_llm"
        )
