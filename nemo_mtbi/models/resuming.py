# SPDX-License-Identifier: Apache-2.0
"""The description of a run in its checkpoints, and how a run that goes on from one differs.

Frozen parts are not in a checkpoint, and what was learned beside one encoder or LLM means nothing beside another: they
must be the same. Other settings may change, but the run says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_mtbi.archive.speech_model import SpeechModel
from nemo_mtbi.config.schema import plain
from nemo_mtbi.io.file_digests import files_digest
from nemo_mtbi.parallel import groups

RUN = "mtbi_run"  # key in the checkpoint
CONTENT = "content of model.train_ds.cuts_path"
_PARTS = {"asr": "encoder", "llm": "LLM"}
_TRAINER_KEYS = ("precision", "gradient_clip_val", "max_epochs", "max_steps", "limit_train_batches")
# Written by us or by NeMo, of the machine, or without influence on what is learned.
_IGNORED = {f"model.{key}" for key in ("target", "nemo_version", "format_version", "nemo_content")}
_IGNORED |= {f"model.pretrained_{part}" for part in _PARTS} | {"data.cache_dir", "model.encoder.beside.path"}
# Follow from data:, in a folder of the machine.
_PREPARED = {"model.train_ds.cuts_path", "model.validation_ds.cuts_path", CONTENT}
_NOT_SET = "not set"


def run_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings of a training that are not those of its model, for :attr:`MTBIModel.run_settings`.

    Args:
        cfg: of the whole run, resolved; the paths of ``data:`` are filled in. All processes call it.
    """
    cuts = cfg.model.train_ds.get("cuts_path") if cfg.model.get("train_ds") else None
    digest = None
    if groups.is_global_first() and cuts and Path(str(cuts)).is_file():
        digest = files_digest([Path(str(cuts))])
    data = plain(cfg.data) if cfg.get("data") else None
    return {
        "seed": cfg.seed,
        "data": data,
        "trainer": {key: cfg.trainer.get(key) for key in _TRAINER_KEYS},
        CONTENT: groups.broadcast_object(digest, "world"),
    }


def describe_run(model: SpeechModel) -> dict[str, Any]:
    """Return what a checkpoint says of its run beside the model's configuration, which Lightning stores."""
    chat = model.chat
    return {
        "chat": {"fingerprint": chat.fingerprint(), "turn": list(chat.turn), "end": chat.end, "more": list(chat.more)},
        "settings": model.run_settings,
    }


def check_resume(model: SpeechModel, checkpoint: Mapping[str, Any]) -> None:
    """Compare the run of a checkpoint with the one that goes on from it; warns of settings that differ, by name.

    Args:
        model: the one that goes on.
        checkpoint: as Lightning loads it. One of before lacks what :func:`describe_run` gives; without the model's
            configuration nothing can be compared, of which is warned.

    Raises:
        ValueError: if encoder, LLM or chat format are other ones; names both and the remedy.
    """
    what = f"the checkpoint {getattr(model.trainer, 'ckpt_path', None) or 'given'}"
    then = (checkpoint.get("hyper_parameters") or {}).get("cfg")
    run = checkpoint.get(RUN) or {}
    if then is None:
        if groups.is_global_first():
            logging.warning(f"{what} does not say which encoder and LLM it belongs to: they can't be compared")
        return
    then = plain(OmegaConf.create(then))
    now = plain(model.cfg)
    _check_parts(then, now, what)
    _check_chat(run.get("chat"), describe_run(model)["chat"], what)
    changes = _changes({"model": then, **(run.get("settings") or {})}, {"model": now, **(model.run_settings or {})})
    if changes and groups.is_global_first():
        logging.warning(f"resuming from {what} with settings that differ from those of its run: {'; '.join(changes)}")


_REMEDY = (
    "or begin a new run, in another folder (exp_manager.name or exp_dir), from init_from_nemo_model if it is to start "
    "from what was learned"
)


def _check_parts(then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    for part, name in _PARTS.items():
        old, new = ((conf.get("fingerprints") or {}).get(part) for conf in (then, now))
        key = f"pretrained_{part}"
        if old != new:
            raise ValueError(
                f"{what} was trained with the {name} {then.get(key)}, whose hash is {old}, but model.{key} is "
                f"{now.get(key)}, whose hash is {new}: give the one that it was trained with, {_REMEDY}"
            )
        files = [(conf.get("file_digests") or {}).get(part) for conf in (then, now)]
        if None not in files and files[0] != files[1]:
            raise ValueError(
                f"{what} was trained with other files of the {name} than lie in model.{key}={now.get(key)}, though "
                f"samples of them are equal: one is damaged, copy it again, {_REMEDY}"
            )


def _check_chat(then: Mapping[str, Any] | None, now: Mapping[str, Any], what: str) -> None:
    if then is None or then["fingerprint"] == now["fingerprint"]:
        return
    differ = [key for key in ("turn", "end", "more") if then.get(key) != now[key]] or ["fingerprint"]
    shown = ", ".join(f"{key} {then.get(key)!r} (now {now[key]!r})" for key in differ)
    raise ValueError(
        f"{what} was trained with another chat format: {shown}. Set model.chat as then, and give the tokenizer that "
        f"the LLM had, {_REMEDY}"
    )


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each setting that differs, with both values, of the sections that are known of both runs."""
    made = [{**(run.get("data") or {}), "cache_dir": None} for run in (then, now)]
    ignored = _IGNORED | (_PREPARED if now.get("data") and made[0] == made[1] else set())
    changes = []
    for section in sorted(then.keys() & now.keys()):
        for key, old, new in _differences(section, then[section], now[section]):
            if key not in ignored and not key.startswith(("model.fingerprints", "model.file_digests")):
                kept = key.startswith("model.optim.") and key != "model.optim.name"
                changes.append(f"{key} {_shown(old)} → {_shown(new)}{_KEPT if kept else ''}")
    return changes


_KEPT = " (the checkpoint's stays in force)"


def _differences(key: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Return whole names of settings that differ, with both values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted(then.keys() | now.keys(), key=str):
            yield from _differences(f"{key}.{name}", then.get(name, _NOT_SET), now.get(name, _NOT_SET))
    elif _plain(then) != _plain(now):
        yield key, then, now


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
