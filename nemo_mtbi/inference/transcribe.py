# SPDX-License-Identifier: Apache-2.0
"""Questions about audio files, answered into a JSONL file: the library behind ``examples/mtbi_transcribe.py``."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from lhotse import Recording
from lhotse.cut import Cut
from omegaconf import MISSING
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch import Tensor

from nemo_mtbi.data.dataset import LOADING_ERRORS, BadAudioError, load_samples
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.parallel import groups
from nemo_mtbi.schema import read_section

SOURCES = ("audio", "audio_dir", "dataset_manifest")


@dataclass
class TranscribeConfig:
    """Everything that ``conf/mtbi_transcribe.yaml`` may hold; the names are those of NeMo's ``transcribe_speech.py``.

    Attributes:
        model_path: ``.nemo`` of an MTBI model.
        audio: files. One of ``audio``, ``audio_dir`` and ``dataset_manifest`` must be set.
        audio_dir: folder; all its files of ``audio_type``, in sub-folders too, are asked about.
        dataset_manifest: NeMo manifest (``audio_filepath``, and if wished ``offset`` with ``duration`` in seconds, and
            ``prompt``); its other keys are kept.
        audio_type: ending of the files of ``audio_dir``.
        prompt: what is asked about every audio; the empty prompt is legal.
        prompts_file: several prompts, one a line (blank lines are left out); each is asked about every audio.
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
    batch_size: int = 32
    on_bad_audio: str = "raise"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    cuda: int | None = None
    show: int = 5


def parse_transcribe_config(cfg: Mapping) -> TranscribeConfig:
    """Checks the keys of ``conf/mtbi_transcribe.yaml``.

    Raises:
        ValueError: unknown, missing or contradictory key; names the remedy.
    """
    config = read_section(TranscribeConfig, cfg)
    given = [name for name in SOURCES if getattr(config, name) is not None]
    if len(given) != 1:
        raise ValueError(f"set exactly one of {', '.join(SOURCES)}; set are: {', '.join(given) or 'none'}")
    if config.prompt is not None and config.prompts_file is not None:
        raise ValueError("prompt and prompts_file are both set: keep one (the file may hold the prompt, too)")
    if config.on_bad_audio not in ("raise", "skip"):
        raise ValueError(f"on_bad_audio is {config.on_bad_audio!r}; it must be raise or skip")
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}; it must be at least 1")
    return config


def pick_device(cuda: int | None) -> torch.device:
    """NeMo's key ``cuda``: an index, ``None`` for a GPU if there is one (torchrun's local rank), negative for the CPU.

    Raises:
        ValueError: if there is no such GPU.
    """
    count = torch.cuda.device_count()
    if cuda is None and count:
        cuda = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda is None or cuda < 0:
        return torch.device("cpu")
    if cuda >= count:
        raise ValueError(f"cuda={cuda}, but there are {count} CUDA devices: cuda=-1 runs on the CPU")
    return torch.device("cuda", cuda)


# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Utterance:
    """One audio and what is asked about it.

    Attributes:
        name: its path as the source gives it; stands in the output.
        path: where it is read.
        prompts: questions.
        offset: start in the file, in seconds; ``None``: the whole file, whatever ``duration`` says.
        duration: in seconds; ``None``: to the end.
        extra: the other keys of its manifest line.
    """

    name: str
    path: Path
    prompts: tuple[str, ...]
    offset: float | None = None
    duration: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_utterances(config: TranscribeConfig) -> list[Utterance]:
    """What the configuration asks about which audio, in the order of the output. No audio is opened.

    Raises:
        ValueError: if there is no audio or no prompt, or a line of the manifest is not legal.
    """
    prompts = _prompts(config)
    if config.dataset_manifest is not None:
        return _read_manifest(_existing(config.dataset_manifest, "dataset_manifest"), prompts)
    if prompts is None:
        raise ValueError("nothing is asked: set prompt='...' or prompts_file (one prompt a line)")
    if config.audio_dir is not None:
        folder = _existing(config.audio_dir, "audio_dir")
        names = sorted(str(path) for path in folder.rglob(f"*.{config.audio_type}"))
        if not names:
            raise ValueError(f"audio_dir={folder} holds no *.{config.audio_type}: set audio_type or another folder")
    else:
        names = config.audio
        if not names:
            raise ValueError("audio is an empty list: name at least one file")
    return [Utterance(name, Path(name).expanduser(), prompts) for name in names]


def _existing(name: str, key: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"{key}={name} does not exist: check the path (the working directory is {Path.cwd()})")
    return path


def _prompts(config: TranscribeConfig) -> tuple[str, ...] | None:
    if config.prompts_file is None:
        return None if config.prompt is None else (config.prompt,)
    lines = _existing(config.prompts_file, "prompts_file").read_text(encoding="utf-8").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"prompts_file={config.prompts_file} holds no prompt: write one a line")
    return prompts


def _read_manifest(path: Path, prompts: tuple[str, ...] | None) -> list[Utterance]:
    lines = path.read_text(encoding="utf-8").splitlines()
    utterances = [_parse_line(path, number, line, prompts) for number, line in enumerate(lines, 1) if line.strip()]
    if not utterances:
        raise ValueError(f"dataset_manifest={path} is empty")
    return utterances


def _parse_line(manifest: Path, number: int, line: str, prompts: tuple[str, ...] | None) -> Utterance:
    place = f"line {number} of {manifest}"
    try:
        extra = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON ({error}): a manifest has one JSON object a line") from error
    if not isinstance(extra, dict) or not isinstance(extra.get("audio_filepath"), str):
        raise ValueError(f"{place} has no audio_filepath")
    name = extra["audio_filepath"]
    if "prompt" in extra:
        if not isinstance(extra["prompt"], str):
            raise ValueError(f"{place}: prompt must be a string, not {extra['prompt']!r}")
        prompts = (extra["prompt"],)
    if prompts is None:
        raise ValueError(f"{place} has no prompt, and neither prompt nor prompts_file is set: set one")
    times = {key: extra.get(key) for key in ("offset", "duration")}
    for key, value in times.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise ValueError(f"{place}: {key} must be seconds, not {value!r}")
    beside = manifest.parent / Path(name).expanduser()  # an absolute path stays itself
    return Utterance(name, beside if beside.exists() else Path(name), prompts, **times, extra=extra)


def output_path(config: TranscribeConfig) -> Path:
    """Where the answers go.

    Raises:
        ValueError: if that is the input.
    """
    if config.output_filename is not None:
        path = Path(config.output_filename).expanduser()
    else:
        source = config.audio_dir or config.dataset_manifest or "answers"
        path = Path(source).expanduser().resolve()
        stem = path.stem if config.dataset_manifest else path.name
        path = path.with_name(f"{stem}_{Path(config.model_path).stem}.jsonl")
    inputs = (config.dataset_manifest, config.prompts_file, config.model_path)
    if path.is_dir() or any(name and path.resolve() == Path(name).expanduser().resolve() for name in inputs):
        raise ValueError(f"output_filename={path} is an input or a folder: give another file")
    return path


# ------------------------------------------------------------------------------------------------ the answers


@dataclass
class Transcription:
    """What a run did.

    Attributes:
        output: the JSONL.
        answers: lines written.
        audios: audios that were answered about.
        skipped: audios left out, by reason.
        first: the first lines of the output.
    """

    output: Path
    answers: int = 0
    audios: int = 0
    skipped: Counter = field(default_factory=Counter)
    first: list[dict] = field(default_factory=list)

    def render(self, console: Console) -> None:
        """Prints the first answers, and what was left out."""
        if self.first:
            table = Table("audio", "prompt", "answer")
            for line in self.first:
                table.add_row(*(escape(line[key]) for key in ("audio_filepath", "prompt", "pred_text")))
            console.print(table)
        console.print(f"{self.answers} answers about {self.audios} audios", highlight=False)
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            console.print(f"left out: {self.skipped.total()} audios ({reasons})", highlight=False)


def transcribe(
    responder: Responder,
    utterances: Sequence[Utterance],
    output: Path,
    *,
    batch_size: int = 32,
    on_bad_audio: str = "raise",
    show: int = 5,
    progress: bool = True,
) -> Transcription:
    """Asks every prompt about its audio and writes a line ``{audio_filepath, prompt, pred_text, …}`` for each.

    The file appears under its name when it is complete. Under tensor or pipeline parallelism all processes of the
    replica call it alike, and the first one writes.

    Args:
        responder: the model.
        utterances: what is asked, see :func:`read_utterances`.
        output: JSONL.
        batch_size: audios that are loaded and encoded at once.
        on_bad_audio: ``raise`` or ``skip``.
        show: lines that are kept in ``Transcription.first``.
        progress: show a bar.

    Raises:
        BadAudioError: a ``ValueError`` that names the file, if audio is unreadable, empty, not finite, silent, too
            short or longer than the LLM takes, under ``on_bad_audio: raise``.
        ValueError: if a prompt leaves no room for speech.
    """
    room = _Room(responder, utterances)
    result = Transcription(Path(output))
    result.output.parent.mkdir(parents=True, exist_ok=True)
    writes = groups.is_global_first()
    scratch = result.output.with_name(result.output.name + ".partial") if writes else Path(os.devnull)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with open(scratch, "w", encoding="utf-8") as file, Progress(*columns, disable=not (progress and writes)) as bar:
        task = bar.add_task("answers", total=sum(len(utterance.prompts) for utterance in utterances))
        for batch in _batches(utterances, batch_size):
            loaded = list(_load(batch, room, on_bad_audio, result.skipped))
            done = sum(len(utterance.prompts) for utterance, _ in loaded)
            bar.advance(task, sum(len(utterance.prompts) for utterance in batch) - done)
            _answer(responder, loaded, file, result, show, lambda n: bar.advance(task, n))
    if writes:
        os.replace(scratch, result.output)
    return result


def _batches(items: Iterable[Utterance], size: int) -> Iterator[list[Utterance]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def _answer(
    responder: Responder,
    loaded: Sequence[tuple[Utterance, Tensor]],
    file: TextIO,
    result: Transcription,
    show: int,
    progress: Callable[[int], None],
) -> None:
    """Asks about one batch and writes its lines."""
    requests = [(prompt, index) for index, (utterance, _) in enumerate(loaded) for prompt in utterance.prompts]
    if not requests:
        return
    answers = responder.speech([samples for _, samples in loaded], requests, progress)
    for (prompt, index), answer in zip(requests, answers, strict=True):
        utterance = loaded[index][0]
        line = {**utterance.extra, "audio_filepath": utterance.name, "prompt": prompt, "pred_text": answer}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if len(result.first) < show:
            result.first.append(line)
    file.flush()
    result.answers += len(requests)
    result.audios += len(loaded)


def _load(
    batch: Sequence[Utterance], room: _Room, on_bad_audio: str, skipped: Counter
) -> Iterator[tuple[Utterance, Tensor]]:
    for utterance in batch:
        try:
            cut = _open(utterance)
            room.check(utterance, cut.duration)  # by the header: hours of audio are not read to be refused
            yield utterance, load_samples(cut, room.frames)
        except BadAudioError as error:
            if on_bad_audio == "raise":
                raise BadAudioError(
                    error.reason, f"{utterance.path}: {error}; on_bad_audio=skip leaves it out"
                ) from error
            skipped[error.reason] += 1


def _open(utterance: Utterance) -> Cut:
    """The cut of an utterance; only the header is read."""
    if not utterance.path.is_file():
        raise BadAudioError("unreadable", "there is no such file")
    try:
        cut = Recording.from_file(utterance.path).to_cut()
        if utterance.offset is not None:
            cut = cut.truncate(offset=utterance.offset, duration=utterance.duration)
    except LOADING_ERRORS as error:
        why = " ".join(str(error).splitlines()[:2])  # Lhotse goes on with every library it tried
        raise BadAudioError("unreadable", f"it can't be read as audio: {why}") from error
    return cut


class _Room:
    """How much speech the LLM takes beside each prompt."""

    def __init__(self, responder: Responder, utterances: Iterable[Utterance]):
        self.frames = responder.model.frame_counter
        limit = responder.model.decoder.max_sequence_length - responder.config.max_new_tokens
        prompts = {prompt for utterance in utterances for prompt in utterance.prompts}
        self._room = {prompt: limit + 1 - len(responder.chat.prompt(prompt, [-1])) for prompt in prompts}
        for prompt, room in self._room.items():
            if room < 1:
                raise ValueError(f"the prompt {prompt[:60]!r} is {1 - room} tokens too long for the LLM: shorten it")

    def check(self, utterance: Utterance, seconds: float) -> None:
        room = min(self._room[prompt] for prompt in utterance.prompts)
        if self.frames(round(seconds * self.frames.sample_rate)) > room:
            raise BadAudioError(
                "too_long",
                f"it has {seconds:.0f} s, but with its prompt the LLM takes {room * self.frames.frame_seconds:.0f} s: "
                "cut it into pieces",
            )
