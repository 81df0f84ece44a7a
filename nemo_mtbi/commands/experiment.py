# SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: locked by one run at a time, cleaned after a kill, and resumed from."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from nemo.constants import NEMO_ENV_VARNAME_VERSION
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.config.schema import explain_config_error
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.agreement import together
from nemo_mtbi.parallel.checkpoint import files
from nemo_mtbi.parallel.checkpoint.plugin import choose_resume

LOCK = Path(".lock", "run")  # in the folder; at each start NeMo moves the files beside it, but no folders
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")  # unfinished files of nemo_mtbi.io.atomic.replacing


@dataclass(frozen=True)
class Experiment:
    """The folder of a run, and how to resume it.

    Attributes:
        folder: of its logs and of the ``.nemo``.
        resumed: the checkpoint that the run resumes, if there is one.
        go_on: the remedy that says how to resume the run after its end.
    """

    folder: Path
    resumed: Path | None
    go_on: str


@contextmanager
def experiment(trainer: Trainer, manager: DictConfig) -> Iterator[Experiment]:
    """Lock the folder of a run, with NeMo's loggers and checkpoints set up; all processes call it.

    Args:
        trainer: gets loggers, callbacks and the checkpoint to resume.
        manager: the section ``exp_manager``; gets the version that is chosen.

    Raises:
        ValueError: for a key of the section that is not legal, or if no checkpoint of the folder is whole.
        RuntimeError: in all processes, if another run is in the folder, or it can't be written.
    """
    given = set(manager)
    version = manager.get("version") or os.environ.get(NEMO_ENV_VARNAME_VERSION)
    if not manager.get("resume_if_exists") and not manager.get("explicit_log_dir"):
        # Named here: NeMo would store the name in the environment, for the next run of this process too.
        version = version or groups.broadcast_object(_new_version(manager), "world")
        with open_dict(manager):
            manager.version = version
    folder = Path(manager.get("explicit_log_dir") or _parent(manager) / (version or ""))
    checkpoints = Path((manager.get("checkpoint_callback_params") or {}).get("dirpath") or folder / "checkpoints")
    with ExitStack() as held:
        what = "a run needs folders of its own (exp_manager.exp_dir, name and version)"
        first = groups.is_global_first()
        together(what, lambda: _hold(held, folder, checkpoints) if first else None, files.explain_system_error)
        chosen = choose_resume(checkpoints) if manager.get("resume_if_exists") else None
        try:
            folder = Path(exp_manager(trainer, manager))
        except OmegaConfBaseException as error:
            raise ValueError(explain_config_error(error, "exp_manager")) from error
        if chosen is not None:
            trainer.ckpt_path = str(chosen)
        yield Experiment(folder, chosen, f"start the same command again with {_keys(manager, version, given)}")


def _hold(held: ExitStack, folder: Path, checkpoints: Path) -> None:
    """Lock the folders of a run, and remove the unfinished files of a killed one."""
    for path in {folder.absolute(): None, checkpoints.absolute(): None}:
        if path == folder.absolute() or folder.absolute() not in path.parents:
            held.enter_context(exclusive(path, lock=path / LOCK))
    for place in (folder, checkpoints):
        for path in place.iterdir() if place.is_dir() else ():
            if path.is_file() and _PARTIAL.fullmatch(path.name):
                path.unlink()
    for mark in checkpoints.glob("*-unfinished"):  # NeMo's mark of a checkpoint that was being saved or removed
        if mark.is_file() and not Path(str(mark).removesuffix("-unfinished")).exists():
            mark.unlink()


def _parent(manager: DictConfig) -> Path:
    """Return the folder of an experiment, below which NeMo makes a folder for each run."""
    return Path(manager.get("exp_dir") or "nemo_experiments") / (manager.get("name") or "default")


def _new_version(manager: DictConfig) -> str:
    """Return the name of a new run's folder, as NeMo would choose it: it may differ between processes."""
    if manager.get("use_datetime_version") is False:
        parent = _parent(manager)
        return f"version_{TensorBoardLogger(save_dir=parent.parent, name=parent.name).version}"
    return time.strftime("%Y-%m-%d_%H-%M-%S")


def _keys(manager: Mapping, version: str | None, given: set[str]) -> str:
    """Return the overrides that a command line needs to resume the run of a folder."""
    if manager.get("explicit_log_dir"):
        values = {"explicit_log_dir": os.path.abspath(manager["explicit_log_dir"])}
    else:
        values = {"exp_dir": os.path.abspath(manager.get("exp_dir") or "nemo_experiments")}
        values["name"] = manager.get("name") or "default"
        values |= {"version": version} if version else {}
    values["resume_if_exists"] = True
    if not manager.get("resume_ignore_no_checkpoint"):
        values["resume_ignore_no_checkpoint"] = True  # there may be none yet
    return " ".join(override_run(f"exp_manager.{key}", value, key in given) for key, value in values.items())


def override_run(key: str, value: str | bool, is_given: bool = True) -> str:
    """Return ``key=value`` for a shell, as Hydra reads it.

    Args:
        key: of the configuration.
        value: of the key; text is never read as a number or as ``null``.
        is_given: whether the configuration has the key already.
    """
    name = key if is_given else f"++{key}"
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    plain = re.fullmatch(r"[A-Za-z_./][\w./-]*|\d{4}-[\w-]*", value, re.ASCII)
    if plain and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return f"{name}={value}"
    quoted = re.sub(r'(\\*)"', r'\1\1\\"', value)  # backslashes before a quote are doubled
    quoted = re.sub(r"(\\+)$", r"\1\1", quoted).replace("${", r"\${")
    return shlex.quote(f'{name}="{quoted}"')
