# SPDX-License-Identifier: Apache-2.0
"""The ``.nemo`` of an MTBI model.

Small: configuration, what is trained, tokenizer, and references to the frozen parts with their fingerprints. Full:
encoder and LLM too, so that one file is enough. Both fit every parallel layout and are read in place: nothing is
unpacked.
Format 1 had configuration and connector only, format 2 no digests.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import cast

import torch
import yaml
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from nemo_mtbi.archive.embedded import (
    ENCODER_SETTINGS,
    ENCODER_WEIGHTS,
    LLM_SETTINGS,
    LLM_WEIGHTS,
    TOKENIZERS,
    encoder_settings,
)
from nemo_mtbi.archive.frozen import INSIDE
from nemo_mtbi.archive.restored import OpenArchive, read_checked
from nemo_mtbi.archive.speech_model import SpeechModel
from nemo_mtbi.archive.stored_config import DATA_KEYS, check_stored
from nemo_mtbi.chat.hf_tokenizer import has_vocabulary
from nemo_mtbi.compat.nemo import set_restoring
from nemo_mtbi.config.model import FORMAT_VERSION, LAYOUT_KEYS, RUN_KEYS
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.config.schema import plain
from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.io.nemo_tar import (
    CONFIG,
    DIGESTS,
    WEIGHTS,
    NemoFile,
    NemoWriter,
)
from nemo_mtbi.io.paths import refuse_overwriting
from nemo_mtbi.io.tensor_file import ArchiveError, Spec, StoredTensors, exact_dtypes, ordered, shortest
from nemo_mtbi.llm.architecture import weight_shapes
from nemo_mtbi.llm.decoder import GPTDecoder
from nemo_mtbi.llm.weights import gather_weights, named_weights
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.agreement import led
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.speech_llm.trainable import (
    check_shapes,
    gather_parts,
    part_shapes,
    part_specs,
    stored_parts,
)

_PART_FILES = {"asr": (ENCODER_SETTINGS, ENCODER_WEIGHTS), "llm": (LLM_SETTINGS, LLM_WEIGHTS)}
_KNOWN = {CONFIG, WEIGHTS, *_PART_FILES["asr"], *_PART_FILES["llm"], *TOKENIZERS, DIGESTS}


class MTBIArchive(SaveRestoreConnector):
    """NeMo's connector for MTBI models, at every layout. NeMo's ``model_extracted_dir`` is honored."""

    def save_to(self, model: SpeechModel, save_path: str | Path, full: bool | None = None) -> None:
        """Write a ``.nemo``, whole or not at all. All processes of the run take part, the first one writes.

        Args:
            model: whole, or this process's share of it.
            save_path: of the first process.
            full: whether encoder and LLM are stored too; ``None``: as ``nemo_content`` says, and if they came from a
                ``.nemo`` themselves.

        Raises:
            ValueError: if the path is no path or that of the encoder or the LLM, or a small ``.nemo`` would refer to
                parts that have no path.
            RuntimeError: the same in all processes, if the file can't be written.
        """
        if "://" in str(save_path):
            raise ValueError(f"{save_path} is not a path: save to a local file and upload that")
        full = bool(model.frozen.embedded) or model.config.nemo_content == "full" if full is None else full
        if model.frozen.embedded and not full:
            raise ValueError(
                "encoder and LLM of this model came out of a .nemo and have no path to refer to: save it with "
                "full=True, or restore it with override_config_path={'pretrained_asr': ..., 'pretrained_llm': ...}"
            )
        refuse_overwriting(model.frozen.paths, {"save_path": [save_path]})
        # in a group with a time limit: if a process has not been called, the others learn of it
        path, full = groups.broadcast_object((str(Path(save_path).expanduser().absolute()), full), "world")
        failure: str | None = f"{path} can't be written: the first process has failed, see its message"
        try:
            failure = self._write_together(model, Path(path), full)
        finally:
            failure = groups.broadcast_object(failure, "patient")
        if failure:
            raise RuntimeError(failure)

    def _write_together(self, model: SpeechModel, path: Path, full: bool) -> str | None:
        """Write the file; return what went wrong, on the first process. The first replica's processes give shares."""
        if groups.data_parallel_rank() > 0:
            return None
        chunks = model.speech_llm.chunks
        parts = stored_parts(INSIDE if full else ())
        for part in parts:
            part.check_separate(model.speech_llm, "saving")
        specs = part_specs(parts, model.speech_llm, model.shape)
        weights = gather_parts(parts, model.speech_llm, list(specs))
        llm = llm_specs(chunks) if full else {}
        with led(chain(weights, gather_weights(chunks)) if full else weights) as weights:
            if not groups.is_global_first():
                return None
            try:
                with replacing(path) as file:
                    archive = NemoWriter(file)
                    archive.add(CONFIG, stored_config(model, full))
                    for name, content in model.llm_files.items():
                        archive.add(name, content)
                    archive.add_tensors(WEIGHTS, specs, _whole(islice(weights, len(specs))))
                    if full:
                        write_encoder(archive, model)
                        archive.add_tensors(LLM_WEIGHTS, llm, _whole(weights))
                    archive.end()
            except OSError as error:
                return explain_writing(path, error)
        return None

    def restore_from(
        self,
        calling_cls: type[ModelPT],
        restore_path: str | Path,
        override_config_path: str | Path | Mapping | None = None,
        map_location: str | torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ):
        """Read a ``.nemo`` file or the directory it was unpacked to; see :meth:`MTBIModel.restore_from`."""
        with NemoFile(self.model_extracted_dir or restore_path) as file:
            stored = read_config(file, calling_cls)
            conf = override(stored, override_config_path)
            if return_config:
                return conf
            _start_layout(conf, trainer)
            set_restoring(True)
            # not by NeMo's from_config_dict, which builds a model that fails a second time
            model = calling_cls(cfg=conf, trainer=trainer, archive=OpenArchive(file, stored, strict))
            model = model.to(map_location or ("cuda" if torch.cuda.is_available() else "cpu"))
            load_trained(model, file.tensors(WEIGHTS), strict, file.path)
        set_restoring(False)
        logging.info(f"{calling_cls.__name__} was restored from {file.path}")
        return model


def connector_of(given: SaveRestoreConnector | None) -> MTBIArchive:
    """Return the connector to restore with; callers who name a directory in NeMo's own get one of ours with it.

    Raises:
        ValueError: if a connector of another kind is given.
    """
    if isinstance(given, MTBIArchive):
        return given
    if given is not None and type(given) is not SaveRestoreConnector:
        raise ValueError(f"save_restore_connector is a {type(given).__name__}: leave it out, or give an MTBIArchive")
    connector = MTBIArchive()
    connector.model_extracted_dir = getattr(given, "model_extracted_dir", None)
    return connector


# ------------------------------------------------------------------------------------------------------------ writing


def _whole(weights: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    """Yield gathered weights, which are there on the first process."""
    for name, value in weights:
        if value is None:
            raise RuntimeError(f"{name} was gathered on another process than the first one")
        yield name, value


def write_encoder(archive: NemoWriter, model: SpeechModel) -> None:
    """Write the encoder, in fewer bits where that loses nothing; on the first process.

    Raises:
        ValueError: if a full ``.nemo`` can't hold it.
    """
    encoder = model.speech_llm.encoder
    if encoder is None:
        raise ValueError("this process holds no encoder: the first process of the first stage writes the file")
    archive.add(ENCODER_SETTINGS, encoder_settings(encoder))
    state = encoder.state_dict()
    specs = {k: Spec(shortest(x.dtype, exact_dtypes([x])), tuple(x.shape)) for k, x in state.items()}
    specs = ordered(specs)
    archive.add_tensors(ENCODER_WEIGHTS, specs, ((name, state[name]) for name in specs))


def stored_config(model: SpeechModel, full: bool) -> bytes:
    """Return the configuration as it is stored: nothing of the run or the machine, but the references."""
    conf = plain(model.cfg)
    for key in (*DATA_KEYS, *RUN_KEYS):
        conf.pop(key, None)
    conf.update(format_version=FORMAT_VERSION, fingerprints=dict(model.frozen.fingerprints))
    if full:
        conf.update({f"pretrained_{part}": inside for part, inside in INSIDE.items()})
        conf.pop("file_digests", None)
    if full and not model.speech_llm.llm_state.has_original_weights:
        conf["llm_was_trained"] = True
    return yaml.safe_dump(conf, sort_keys=False, allow_unicode=True).encode()


def llm_specs(chunks: Sequence[GPTDecoder]) -> dict[str, Spec]:
    """Return names, shapes and dtype of the LLM's weights as they are stored; in all processes of a replica.

    An LLM that was stored in 16 bits and computes in 32 is stored in 16 bits again.
    """
    own = [value.detach() for chunk in chunks for _, value in named_weights(chunk)]
    everyone = groups.gather_objects(exact_dtypes(own), "replica")
    dtype = shortest(own[0].dtype, set.intersection(*everyone))
    return {name: Spec(dtype, shape) for name, shape in sorted(weight_shapes(chunks[0].architecture).items())}


def explain_writing(path: Path, error: OSError) -> str:
    """Return why a file can't be written, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room, or save to another folder"
    else:
        remedy = "save to a folder where files may be made"
    return f"{path} can't be written: {error.strerror or error}; {remedy}. What was there before is untouched"


# ------------------------------------------------------------------------------------------------------------ reading


def read_config(file: NemoFile, cls: type) -> DictConfig:
    """Return the configuration of an archive, in today's form.

    Raises:
        ArchiveError: if the archive lacks something, or holds what no MTBI model has.
        ValueError: if it holds another model, or one of a newer version of this package.
    """
    conf = file.settings(CONFIG)
    # NeMo would build whatever class the archive names
    if str(conf.get("target")) not in {f"{known.__module__}.{known.__qualname__}" for known in cls.__mro__}:
        raise ValueError(f"{file.path} can't be restored: it holds a {conf.get('target')}, no MTBI model")
    version = conf.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{file.path} has format_version {version}, but this nemo_mtbi reads up to {FORMAT_VERSION}: install a "
            "newer nemo_mtbi"
        )
    if type(version) is not int or version < 1:
        raise ArchiveError(f"its format_version is {version!r}")
    needed = {CONFIG, WEIGHTS} | ({LLM_SETTINGS} if version > 1 else set()) | ({DIGESTS} if version > 2 else set())
    for part, inside in INSIDE.items():
        if str(conf.get(f"pretrained_{part}")) == inside:
            needed |= set(_PART_FILES[part])
    missing = sorted(name for name in needed if name not in file)
    if LLM_SETTINGS in needed and not has_vocabulary([Path(name).name for name in TOKENIZERS if name in file]):
        missing.append("llm/tokenizer.model or llm/tokenizer.json")
    if missing or file.unknown(_KNOWN):
        raise ArchiveError(
            f"it lacks {', '.join(missing)}" if missing else f"it holds {', '.join(file.unknown(_KNOWN)[:3])}"
        )
    prints = conf.get("fingerprints")
    if not isinstance(prints, dict) or {*INSIDE} != {*prints} or not all(type(v) is str for v in prints.values()):
        raise ArchiveError("it has no fingerprints of encoder and LLM")
    conf["format_version"] = FORMAT_VERSION
    return OmegaConf.create(check_stored(conf))


def override(stored: DictConfig, given: str | Path | Mapping | None) -> DictConfig:
    """Return the configuration to restore with: ``given`` keys take the place of the stored ones.

    Args:
        stored: of the archive.
        given: path of a YAML, ``DictConfig`` or mapping; all keys of a model, or only those that change. NeMo's whole
            configuration with a section ``model:`` will do.

    Raises:
        ValueError: if it can't be read, or has other fingerprints.
    """
    if given is None:
        return stored
    try:
        loaded = OmegaConf.load(given) if isinstance(given, (str, Path)) else given
        conf = OmegaConf.create(dict(loaded)) if isinstance(loaded, Mapping) else loaded
        if not isinstance(conf, DictConfig):
            raise ValueError(f"override_config_path={given} holds no keys and values")
        conf = OmegaConf.create(plain(conf.model if "model" in conf else conf))
        merged = cast(DictConfig, OmegaConf.merge(stored, conf))  # of two of them
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override_config_path={given} can't be read: {error}") from error
    for key in ("fingerprints", "file_digests", "target", "format_version", "nemo_version", "llm_was_trained"):
        if key == "fingerprints" and conf.get(key) not in (None, {}, stored[key]):
            raise ValueError(
                f"override_config_path has the fingerprints {dict(conf[key])}, but this model was trained with "
                f"{dict(stored[key])}: leave them out"
            )
        merged.pop(key, None)
        if key in stored:
            merged[key] = stored[key]
    return merged


def _start_layout(conf: DictConfig, trainer: Trainer | None) -> None:
    """Start the processes in the trainer's layout, or in the one of the configuration; none is stored."""
    if trainer is not None and isinstance(trainer.strategy, MTBIStrategy):
        trainer.strategy.start(trainer)
    run = {key: conf.pop(key) for key in RUN_KEYS if key in conf}
    layout = {key: value for key, value in run.items() if key in LAYOUT_KEYS}
    groups.initialize(ParallelConfig(**layout) if layout else None, run.get("dist_timeout"))


def load_trained(
    model: SpeechModel, tensors: StoredTensors, strict: bool, path: Path, only: Collection[str] | None = None
) -> None:
    """Read connector, adapters and what trains of encoder and LLM into a model.

    Args:
        model: whole, or this process's share of it.
        tensors: stored weights.
        strict: whether all names must be the same.
        path: of the archive, for messages.
        only: names that are wanted; ``None``: all.

    Raises:
        ValueError: the same in all processes of a replica, if they do not fit or are damaged.
    """
    source = f"what is trained in {path}"
    parts = stored_parts(model.frozen.embedded)
    own, stored = (
        {name: shape for name, shape in shapes.items() if only is None or name in only}
        for shapes in (part_shapes(parts, model.shape), tensors.shapes)
    )
    check_shapes(own, stored, strict, source)
    used = own.keys() & stored.keys()
    state: dict[str, Tensor] = {}

    def read() -> None:
        for part in parts:
            held = part.tensors(model.speech_llm).items()
            read = {n: torch.empty_like(value, device="cpu") for n, value in held if part.prefix + n in used}
            part.read(read, tensors)
            state.update({part.prefix + n: value for n, value in read.items()})

    read_checked(read, path)
    model.load_state_dict(state, strict=False)
    left = sorted((own.keys() | stored.keys()) - used)
    if left and groups.is_global_first():
        logging.warning(f"{source}: these were missing or not used: {', '.join(left)}")
