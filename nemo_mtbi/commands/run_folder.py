# SPDX-License-Identifier: Apache-2.0
"""Checks that a training run does not overwrite its inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo.constants import NEMO_ENV_VARNAME_VERSION

from nemo_mtbi.data.loader_config import LOCATION_KEYS, PATH_KEYS
from nemo_mtbi.io.paths import named_files, refuse_overwriting

RESULTS = "results.json"
_DATA = ("train_ds", "validation_ds", "test_ds")


def spare_inputs(cfg: Mapping[str, Any]) -> None:
    """Refuse a folder where the ``.nemo``, the results or files that NeMo moves would replace an input of the run.

    Args:
        cfg: the whole configuration, with its interpolations resolved.

    Raises:
        ValueError: if an input would be replaced (with file and key), or if the folder holds results of another
            command.
    """
    manager = cfg["exp_manager"]
    folder = _folder(manager)
    if folder is None:
        return
    checkpoints = manager.get("checkpoint_callback_params") or {}
    stem = checkpoints.get("prefix") or manager.get("name") or "default"
    kept = Path(checkpoints.get("dirpath") or folder / "checkpoints") / f"{stem}.nemo"
    written = [folder / f"{cfg['name']}.nemo", folder / RESULTS, kept]
    if manager.get("resume_if_exists") and folder.is_dir():  # NeMo moves all files into a folder run_0
        written += [path for path in folder.iterdir() if path.is_file()]
    refuse_overwriting(_inputs(cfg), {"exp_manager (the folder of the run)": written})
    if (folder / RESULTS).exists() and not manager.get("resume_if_exists") and not _is_of_training(folder / RESULTS):
        raise ValueError(
            f"{folder / RESULTS} is there and is not of a training: give the run another exp_manager.exp_dir"
        )


def _folder(manager: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run, as NeMo names it; ``None`` if it is a new one with the time in its name."""
    version = manager.get("version") or os.environ.get(NEMO_ENV_VARNAME_VERSION)
    if manager.get("explicit_log_dir"):
        return Path(manager["explicit_log_dir"])
    if not version and not manager.get("resume_if_exists"):
        return None
    return Path(manager.get("exp_dir") or "nemo_experiments", manager.get("name") or "default", version or "")


def _inputs(cfg: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the inputs of a run, by key."""
    model = cfg["model"]
    beside = ((model.get("encoder") or {}).get("beside") or {}).get("path")
    parts = {key: model.get(key) for key in ("pretrained_asr", "pretrained_llm")} | {"encoder.beside.path": beside}
    inputs = {f"model.{key}": [name] for key, name in parts.items() if name and name != "demo"}
    for section in _DATA:
        data = model.get(section) or {}
        for key in dict.fromkeys((*LOCATION_KEYS, *PATH_KEYS)):
            inputs[f"model.{section}.{key}"] = list(named_files(data.get(key)))
    start = cfg.get("init_from_nemo_model")
    inputs["init_from_nemo_model"] = list(named_files(start if isinstance(start, str) else _paths(start)))
    for section, keys in (("benchmark", ("cuts", "tasks")), ("data", ("tasks",))):
        for key in keys:
            name = (cfg.get(section) or {}).get(key)
            inputs[f"{section}.{key}"] = [name] if name and name != "demo" else []
    return inputs


def _paths(sources: Any) -> list[Any]:
    """Return the paths of a mapping of sources, as ``init_from_nemo_model`` may hold it."""
    values = sources.values() if isinstance(sources, Mapping) else ()
    return [source.get("path") for source in values if isinstance(source, Mapping)]


def _is_of_training(path: Path) -> bool:
    """Return whether a ``results.json`` was written by a training run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"seed", "train", "behavior"} <= set(content)
