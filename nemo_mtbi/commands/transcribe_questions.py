# SPDX-License-Identifier: Apache-2.0
"""Inputs of a transcription: its configuration, folders of audio, manifests and files of prompts."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from nemo_mtbi.config.checks import Count, RaiseOrSkip, Section
from nemo_mtbi.config.schema import read_section
from nemo_mtbi.io.paths import is_file, refuse_overwriting, user_path
from nemo_mtbi.io.text import is_writable_text, read_json_lines, read_lines

SOURCES = ("audio", "audio_dir", "dataset_manifest")
LONGEST = 1e12  # seconds; no number of a manifest beyond it is a time


@dataclass
class TranscribeConfig(Section):
    """The keys of ``conf/mtbi_transcribe.yaml``; the names are those of NeMo's ``transcribe_speech.py``.

    Attributes:
        model_path: ``.nemo`` of an MTBI model.
        audio: files. One of ``audio``, ``audio_dir`` and ``dataset_manifest`` must be set.
        audio_dir: folder; all its files of ``audio_type``, in sub-folders and linked folders too, are taken.
            Hidden files are left out.
        dataset_manifest: NeMo manifest (``audio_filepath``, and if wished ``offset`` with ``duration`` in seconds, and
            ``prompt``); its other keys are kept.
        audio_type: ending of the files of ``audio_dir``, in lower or upper case.
        prompt: for every audio; the empty prompt is legal.
        prompts_file: several prompts, one a line (blank lines are left out), each for every audio.
        output_filename: JSONL; ``null``: named after the source and the model.
        overwrite_transcripts: ``false``: if the output is there already, nothing is done.
        batch_size: audios that are loaded and encoded at once.
        on_bad_audio: ``raise`` or ``skip`` (skipped audios are counted by reason).
        tensor_model_parallel_size, pipeline_model_parallel_size: processes that share the model.
        cuda: index of the device; ``null``: a GPU if there is one; negative: CPU.
        show: answers that are printed at the end.
    """

    model_path: str = MISSING
    audio: list[str] | None = None
    audio_dir: str | None = None
    dataset_manifest: str | None = None
    audio_type: str = "wav"
    prompt: str | None = None
    prompts_file: str | None = None
    output_filename: str | None = None
    overwrite_transcripts: bool = True
    batch_size: Count = 32
    on_bad_audio: RaiseOrSkip = "raise"
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    cuda: int | None = None
    show: int = 5


def parse_transcribe_config(cfg: Mapping) -> TranscribeConfig:
    """Check the keys of ``conf/mtbi_transcribe.yaml``. A single file in ``audio`` is a list of one.

    Raises:
        ValueError: unknown, missing or contradictory key; names the remedy.
    """
    if isinstance(cfg.get("audio"), str):
        cfg = cast(DictConfig, OmegaConf.merge(cfg, {"audio": [cfg["audio"]]}))  # of two mappings it is one
    config = read_section(TranscribeConfig, cfg)
    given = [name for name in SOURCES if getattr(config, name) is not None]
    if len(given) != 1:
        raise ValueError(f"set exactly one of {', '.join(SOURCES)}; set are: {', '.join(given) or 'none'}")
    if config.prompt is not None and config.prompts_file is not None:
        raise ValueError("prompt and prompts_file are both set: keep one (the file may hold the prompt, too)")
    return config


@dataclass(frozen=True)
class Utterance:
    """One audio with its prompts.

    Attributes:
        name: its path as the source gives it; written to the output.
        path: the file that is read.
        prompts: each gets an answer.
        offset: start in the file, in seconds; ``None``: the whole file, whatever ``duration`` says.
        duration: in seconds; ``None``: to the end.
        extra: the other keys of its manifest line.
        problem: why its line of the manifest can't be used; ``None``: it can.
    """

    name: str
    path: Path
    prompts: tuple[str, ...]
    offset: float | None = None
    duration: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def line(self, prompt: str, answer: str | None = None) -> dict[str, Any]:
        """Return the line of the output for one prompt; without an answer, all of it but the answer."""
        line = {**self.extra, "audio_filepath": self.name, "prompt": prompt}
        line.pop("pred_text", None) if answer is None else line.update(pred_text=answer)
        return line


class Questions(list[Utterance]):
    """Utterances in the order of the output.

    Attributes:
        left_out: number of files of a folder that are not used, by kind.
    """

    def __init__(self, utterances: Iterable[Utterance], left_out: Mapping[str, int] | None = None):
        super().__init__(utterances)
        self.left_out = Counter(left_out or {})


def read_utterances(config: TranscribeConfig) -> Questions:
    """Return the audios of a configuration with their prompts, in the order of the output. No audio is opened.

    Raises:
        ValueError: if there is no audio or no prompt, or a file of prompts or a line of the manifest is not legal.
    """
    prompts = _prompts(config)
    if config.dataset_manifest is not None:
        return Questions(_read_manifest(config.dataset_manifest, config.on_bad_audio, prompts))
    if prompts is None:
        raise ValueError("nothing is asked: set prompt='...' or prompts_file (one prompt a line)")
    if config.audio_dir is not None:
        names, left_out = list_audio(_existing(config.audio_dir, "audio_dir"), config.audio_type)
    elif config.audio:
        names, left_out = config.audio, Counter()
    else:
        raise ValueError("audio is an empty list: name at least one file")
    return Questions((Utterance(name, user_path(name), prompts) for name in names), left_out)


def _existing(name: str, key: str) -> Path:
    path = user_path(name)
    if not os.path.lexists(path):
        raise ValueError(f"{key}={name} does not exist: check the path (the working directory is {Path.cwd()})")
    return path


def _prompts(config: TranscribeConfig) -> tuple[str, ...] | None:
    if config.prompts_file is None:
        if config.prompt is not None and not is_writable_text(config.prompt):
            raise ValueError(f"prompt={config.prompt!r} is not valid Unicode: write it in UTF-8 into a prompts_file")
        return None if config.prompt is None else (config.prompt,)
    lines = read_lines(_existing(config.prompts_file, "prompts_file"), "prompts_file")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts_file={config.prompts_file} holds no prompt: write one a line")
    return prompts


# ------------------------------------------------------------------------------------------------ folders


def list_audio(folder: Path, audio_type: str) -> tuple[list[str], Counter]:
    """Return the sorted audio files in a folder, its sub-folders and linked folders, and what is left out.

    Each folder is visited once, however many links lead to it.

    Args:
        folder: the root.
        audio_type: file name extension, with or without its dot, in any case.

    Returns:
        Paths, and the number of hidden files and files of other types, by kind.

    Raises:
        ValueError: if there is no such audio, or a folder can't be read.
    """
    if not folder.is_dir():
        raise ValueError(f"audio_dir={folder} is a file: name a folder, or the file with audio=[...]")
    ending = audio_type.lower().lstrip(".")
    paths: list[str] = []
    left_out: Counter = Counter()
    for parent, folders, files in _folders(folder):
        named = sum(fnmatch.fnmatchcase(name.lower(), f"*.{ending}") for name in folders)
        left_out += Counter({f"folders named *.{ending}": named})  # their content is used
        for name in files:
            if name.startswith("."):
                left_out["hidden"] += 1
            elif fnmatch.fnmatchcase(name.lower(), f"*.{ending}"):
                paths.append(os.path.join(parent, name))
            else:
                left_out[os.path.splitext(name)[1].lower() or "without an ending"] += 1
    if not paths:
        there = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5)) or "nothing"
        raise ValueError(f"audio_dir={folder} holds no *.{ending} ({there}): set audio_type or another folder")
    return sorted(paths), left_out


def _folders(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder below ``root`` with the names in it, then the targets of links; no folder twice."""
    waiting, seen = [str(root)], set()
    while waiting:
        for parent, folders, files in os.walk(waiting.pop(0), onerror=_unreadable):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield parent, folders, files


def _unreadable(error: OSError) -> None:
    raise ValueError(f"audio_dir: {error.filename} can't be read: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------ manifests


def _read_manifest(manifest: str, on_bad_audio: str, prompts: tuple[str, ...] | None) -> list[Utterance]:
    """Return the utterances of a manifest; those without a prompt of their own get ``prompts``."""
    path = _existing(manifest, "dataset_manifest")
    utterances = []
    for number, line in read_json_lines(path, "dataset_manifest"):
        place = f"line {number} of {path}"
        utterance = _parse_line(path, place, line, prompts)
        if utterance.problem and on_bad_audio == "raise":
            raise ValueError(utterance.problem)
        utterances.append(utterance)
    if not utterances:
        raise ValueError(f"dataset_manifest={path} is empty")
    return utterances


def _parse_line(manifest: Path, place: str, line: dict[str, Any], prompts: tuple[str, ...] | None) -> Utterance:
    name = line.get("audio_filepath")
    if not isinstance(name, str):
        raise ValueError(f"{place} has no audio_filepath")
    if "prompt" in line:
        if not isinstance(line["prompt"], str) or not is_writable_text(line["prompt"]):
            raise ValueError(f"{place}: prompt must be a string of valid Unicode, not {line['prompt']!r}")
        prompts = (line["prompt"],)
    if prompts is None:
        raise ValueError(f"{place} has no prompt, and neither prompt nor prompts_file is set: set one")
    beside = manifest.parent / user_path(name)  # an absolute path stays itself
    utterance = Utterance(name, beside if is_file(beside) else user_path(name), prompts, extra=line)
    for key in ("offset", "duration"):
        if line.get(key) is not None and not _is_seconds(line[key]):
            return replace(utterance, problem=f"{place}: {key} must be seconds, not {line[key]!r}")
    return replace(utterance, offset=line.get("offset"), duration=line.get("duration"))


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LONGEST


# ------------------------------------------------------------------------------------------------ the output


def output_path(config: TranscribeConfig, utterances: Sequence[Utterance] = ()) -> Path:
    """Return the path of the output.

    Args:
        config: of the run.
        utterances: inputs.

    Raises:
        ValueError: if that is a folder, or an input: the model, the manifest, the prompts or an audio.
    """
    if config.output_filename is not None:
        path = user_path(config.output_filename)
    else:
        source = config.audio_dir or config.dataset_manifest or "answers"
        path = user_path(source).resolve()
        stem = path.stem if config.dataset_manifest else path.name
        path = path.with_name(f"{stem}_{Path(config.model_path).stem}.jsonl")
    if path.is_dir():
        raise ValueError(f"output_filename={path} is a folder: give a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"output_filename={path} is not a file, and can't be replaced by one: give a file")
    inputs = {
        key: [name] for key in ("dataset_manifest", "prompts_file", "model_path") if (name := getattr(config, key))
    }
    source = next(key for key in SOURCES if getattr(config, key) is not None)
    audio = {f"audio of {source}" if source != "audio" else source: [utterance.path for utterance in utterances]}
    refuse_overwriting({**inputs, **audio}, {"output_filename": [path, *working_files(path)]})
    return path


def spare_model(output: Path, model_path: str, stored: Mapping[str, Any]) -> None:
    """Refuse an output that would replace the encoder or the LLM to which a ``.nemo`` refers.

    Args:
        output: of the answers.
        model_path: the ``.nemo``.
        stored: its configuration. A part may also lie beside the ``.nemo``.

    Raises:
        ValueError: if that is one of them, or in the folder of one.
    """
    beside = ((stored.get("encoder") or {}).get("beside") or {}).get("path")
    names = {key: stored.get(key) for key in ("pretrained_asr", "pretrained_llm")} | {"encoder.beside.path": beside}
    inputs = {
        f"{key} of {model_path}": [name, user_path(model_path).parent / name]
        for key, name in names.items()
        if name and name != "demo"
    }
    refuse_overwriting(inputs, {"output_filename": [output, *working_files(output)]})


def working_files(output: Path) -> tuple[Path, Path]:
    """Return the files beside an output that hold the answers of an unfinished run, and its description."""
    partial = output.with_name(f"{output.name}.partial")
    return partial, partial.with_name(f"{partial.name}.json")
