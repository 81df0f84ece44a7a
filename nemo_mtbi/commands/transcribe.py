# SPDX-License-Identifier: Apache-2.0
"""Answers prompts about audio files into a JSONL file: the library of ``mtbi transcribe``."""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from lhotse.cut import Cut
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch import Tensor

from nemo_mtbi.commands.transcribe_questions import (
    Questions,
    TranscribeConfig,
    Utterance,
    output_path,
    parse_transcribe_config,
    read_utterances,
    spare_model,
)
from nemo_mtbi.commands.transcribe_resume import Done, Unfinished
from nemo_mtbi.data.audio import LOADING_ERRORS, BadAudioError, load_samples
from nemo_mtbi.inference.audio import open_audio
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.display import printable
from nemo_mtbi.io.heartbeat import Heartbeat, bar_text
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.io.paths import is_file
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.metrics.corpus import wer
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.agreement import agreed

__all__ = [
    "Questions",
    "TranscribeConfig",
    "Transcription",
    "Utterance",
    "output_path",
    "parse_transcribe_config",
    "read_utterances",
    "spare_model",
    "transcribe",
]

SCORED_PROMPTS = 5  # word error rates are printed for so many


@dataclass
class Transcription:
    """Result of a run.

    Attributes:
        output: the JSONL.
        answers: lines written.
        audios: audios with answers.
        skipped: audios left out, by reason.
        first: the first lines of the output.
        resumed: lines that an interrupted run had written.
        left_out: number of files of a folder that were not used, by kind.
        texts: for each prompt the transcripts of the manifest (``text``) and the answers beside them.
    """

    output: Path
    answers: int = 0
    audios: int = 0
    skipped: Counter = field(default_factory=Counter)
    first: list[dict] = field(default_factory=list)
    resumed: int = 0
    left_out: Counter = field(default_factory=Counter)
    texts: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    def add(self, lines: Iterable[dict], show: int) -> None:
        """Count lines of the output."""
        for line in lines:
            self.answers += 1
            if len(self.first) < show:
                self.first.append(line)
            if isinstance(text := line.get("text"), str) and text.strip():
                references, answers = self.texts.setdefault(line["prompt"], ([], []))
                references.append(text)
                answers.append(line["pred_text"])

    def render(self, console: Console) -> None:
        """Print the first answers, word error rates where the manifest has transcripts, and what was left out."""
        if self.first:
            table = Table("audio", "prompt", "answer")
            for line in self.first:
                table.add_row(*(escape(printable(line[key])) for key in ("audio_filepath", "prompt", "pred_text")))
            console.print(table)
        counts = f"{self.answers} answers about {self.audios} audios"
        counts += f", {self.resumed} of the answers from an interrupted run" if self.resumed else ""
        console.print(counts, highlight=False)
        for prompt, (references, answers) in list(self.texts.items())[:SCORED_PROMPTS]:
            label = f"prompt {printable(prompt)[:60]!r}" if prompt else "the empty prompt"
            rate = f"WER against `text`: {wer(references, answers):.2%} ({len(references)} lines, {label})"
            console.print(rate, highlight=False, markup=False)
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            console.print(f"left out: {self.skipped.total()} audios ({reasons})", highlight=False)
        if self.left_out:
            kinds = ", ".join(f"{count} {printable(kind)}" for kind, count in self.left_out.most_common())
            text = f"not asked about: {self.left_out.total()} other files of the folder ({kinds})"
            console.print(text, highlight=False, markup=False)


def transcribe(
    responder: Responder,
    utterances: Sequence[Utterance],
    output: Path,
    *,
    batch_size: int = 32,
    on_bad_audio: str = "raise",
    show: int = 5,
    progress: bool = True,
    model: str = "",
) -> Transcription:
    """Answer every prompt about its audio and write a line ``{audio_filepath, prompt, pred_text, …}`` for each.

    The file appears under its name when it is complete. The run resumes from the files that an interrupted one has
    left beside it: see :mod:`nemo_mtbi.commands.transcribe_resume`. Under tensor or pipeline parallelism all processes
    of the replica call it alike, and the first one writes.

    Args:
        responder: the model.
        utterances: inputs, see :func:`read_utterances`.
        output: JSONL.
        batch_size: audios that are loaded and encoded at once.
        on_bad_audio: ``raise`` or ``skip``.
        show: lines that are kept in ``Transcription.first``.
        progress: show a bar, or a line every 30 seconds where the console is not a terminal.
        model: identifies the frozen parts. An interrupted run is resumed if these and the connector are the same.

    Raises:
        BadAudioError: a ``ValueError`` that names the file, if audio is unreadable, empty, not finite, silent, too
            short or longer than the LLM takes, under ``on_bad_audio: raise``.
        ValueError: if a prompt leaves no room for speech, the interrupted run had another model or other prompts, or
            several replicas of the model have started.
        RuntimeError: if another run writes the same output.
    """
    if groups.data_parallel_size() > 1:
        raise ValueError(
            f"{groups.data_parallel_size()} replicas of the model would write {output}: start as many processes as "
            "tensor_model_parallel_size x pipeline_model_parallel_size"
        )
    room = _Room(responder, utterances)
    result = Transcription(Path(output), left_out=Counter(getattr(utterances, "left_out", None) or {}))
    writes = groups.is_global_first()
    work = Unfinished(result.output, _identity(responder, model), utterances, writes)
    with ExitStack() as held:
        done = agreed(lambda: _start(work, held) if writes else None)
        done = groups.broadcast_object(done)
        held.enter_context(_explained(work, result))
        _count_done(done, result, on_bad_audio, show)
        columns, console = (*Progress.get_default_columns(), MofNCompleteColumn()), Console()
        shown = progress and writes
        bar = held.enter_context(Progress(*columns, console=console, disable=not shown))
        held.enter_context(Heartbeat(lambda: bar_text(bar), console, shown))
        total = sum(len(utterance.prompts) for utterance in utterances)
        task = bar.add_task("answers", total=total, completed=result.resumed)
        for batch in _batches(utterances[done.utterances :], batch_size):
            loaded = list(_load(batch, room, on_bad_audio, result.skipped, work))
            missing = sum(len(utterance.prompts) for utterance in batch)
            bar.advance(task, missing - sum(len(utterance.prompts) for utterance, _ in loaded))
            _answer(responder, loaded, work, result, show, lambda n: bar.advance(task, n))
        work.finish()
    return result


def _start(work: Unfinished, held: ExitStack) -> Done:
    """Lock the output for this run, and return the finished part of a former one."""
    held.enter_context(exclusive(work.output, "output_filename"))
    done = work.read()
    work.begin(done)
    held.enter_context(work)
    return done


def _count_done(done: Done, result: Transcription, on_bad_audio: str, show: int) -> None:
    """Count the answers and the skipped audios of a former run."""
    for utterance, reason in done.skipped:
        if on_bad_audio == "raise":
            raise BadAudioError(
                reason,
                f"{utterance.path}: the interrupted run has left it out ({reason}); on_bad_audio=skip "
                "leaves it out again",
            )
        result.skipped[reason] += 1
    result.add(done.lines, show)
    result.resumed = len(done.lines)
    result.audios += done.utterances - len(done.skipped)


@contextmanager
def _explained(work: Unfinished, result: Transcription) -> Iterator[None]:
    """Print where the answers are kept if the run ends before the last of them, also by a signal."""
    # a process that waits for another one could not act on the signal, and must end by it
    alone = threading.current_thread() is threading.main_thread() and groups.layout().model_parallel_size == 1
    before = signal.signal(signal.SIGTERM, _end) if alone else None
    try:
        yield
    except BaseException:
        if work.writes and result.answers:
            place = printable(str(work.partial))
            text = f"{result.answers} answers are kept in {place}: start the same command again to go on behind them"
            print(text, file=sys.stderr, flush=True)
        raise
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _identity(responder: Responder, model: str) -> str:
    """Return a hash of the model and its settings: connector, chat format and limits of generation."""
    digest = hashlib.sha256()
    connector = getattr(responder.model, "connector", None)  # on the first stage, whose process writes
    for name, value in sorted(connector.state_dict().items()) if connector is not None else ():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    settings = {key: value for key, value in asdict(responder.config).items() if key != "batch_tokens"}
    return digest_of([model, digest.hexdigest(), responder.chat.fingerprint(), settings, responder.adapted])


def _batches(items: Iterable[Utterance], size: int) -> Iterator[list[Utterance]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def _answer(
    responder: Responder,
    loaded: Sequence[tuple[Utterance, Tensor]],
    work: Unfinished,
    result: Transcription,
    show: int,
    progress: Callable[[int], None],
) -> None:
    """Answer the prompts of one batch and store the lines."""
    requests = [(prompt, index) for index, (utterance, _) in enumerate(loaded) for prompt in utterance.prompts]
    if not requests:
        return
    answers = responder.speech([samples for _, samples in loaded], requests, progress)
    pairs = zip(requests, answers, strict=True)
    lines = [loaded[index][0].line(prompt, answer) for (prompt, index), answer in pairs]
    work.add(lines)
    result.add(lines, show)
    result.audios += len(loaded)


def _load(
    batch: Sequence[Utterance], room: _Room, on_bad_audio: str, skipped: Counter, work: Unfinished
) -> Iterator[tuple[Utterance, Tensor]]:
    """Yield the utterances of a batch with their samples; bad audio raises, or is counted and recorded."""
    for utterance in batch:
        try:
            cut = _open(utterance)
            room.check(utterance, cut.duration)  # by the header, before hours of audio are read
            yield utterance, load_samples(cut, room.frames)
        except BadAudioError as error:
            if on_bad_audio == "raise":
                raise BadAudioError(
                    error.reason, f"{utterance.path}: {error}; on_bad_audio=skip leaves it out"
                ) from error
            skipped[error.reason] += 1
            work.skip(utterance, error.reason)


def _open(utterance: Utterance) -> Cut:
    """Return the cut of an utterance; only the header is read."""
    if utterance.problem is not None:
        raise BadAudioError("bad_line", utterance.problem)
    if not is_file(utterance.path):
        raise BadAudioError("unreadable", "there is no such file")
    try:
        cut = open_audio(utterance.path)
        if utterance.offset is not None:
            cut = cut.truncate(offset=utterance.offset, duration=utterance.duration)
    except LOADING_ERRORS as error:
        why = " ".join(str(error).splitlines()[:2])  # then Lhotse lists every library that it tried
        raise BadAudioError("unreadable", f"it can't be read as audio: {why}") from error
    return cut


class _Room:
    """The number of speech frames that the LLM's context has left beside each prompt."""

    def __init__(self, responder: Responder, utterances: Iterable[Utterance]):
        # nn.Module hides the types of its attributes
        self.frames = cast(FrameCounter, responder.model.frame_counter)
        limit = responder.model.decoder.max_sequence_length - responder.config.max_new_tokens
        prompts = {prompt for utterance in utterances for prompt in utterance.prompts}
        self._room = {prompt: limit + 1 - len(responder.chat.prompt(prompt, [-1])) for prompt in prompts}
        for prompt, room in self._room.items():
            if room < 1:
                raise ValueError(f"the prompt {prompt[:60]!r} is {1 - room} tokens too long for the LLM: shorten it")

    def check(self, utterance: Utterance, seconds: float) -> None:
        """Raise :class:`BadAudioError` if audio of so many seconds does not fit beside the utterance's prompts."""
        room = min(self._room[prompt] for prompt in utterance.prompts)
        if self.frames(round(seconds * self.frames.sample_rate)) > room:
            raise BadAudioError(
                "too_long",
                f"it has {seconds:.0f} s, but with its prompt the LLM takes {room * self.frames.frame_seconds:.0f} s: "
                "cut it into pieces",
            )
