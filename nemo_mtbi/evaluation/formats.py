# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks in their published layouts: LLaSO-Eval, Speech-IFEval, VoiceBench. Rule-scored parts only.

What only an outside judge could score is left out and counted by reason. Nothing is drawn at random: an answer that
names no choice, or two, is wrong.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from nemo_mtbi.evaluation.items import Clip, EvalSet, Item
from nemo_mtbi.io.text import read_text
from nemo_mtbi.metrics.instructions import from_ifeval

_FOLLOW = ("follow_strict", "follow_loose")
_FOLLOW_PROMPT = ("follow_prompt_strict", "follow_prompt_loose")
_CHOICE = ("choice_accuracy", "one_choice_rate")
_LETTERS = ("A", "B", "C", "D")
_JUDGED = "that need an outside judge"
_VOICEBENCH_JUDGED = ("alpacaeval_full", "alpacaeval", "commoneval", "wildvoice", "mtbench", "sd-qa")
_VOICEBENCH = ("ifeval", "openbookqa", "mmsu", "bbh", "advbench", *_VOICEBENCH_JUDGED)
# LLaSO-Eval: one file for each task, which its name says.
_LLASO_CHOICE = re.compile(r"classification|intent_prediction|speechcommand", re.IGNORECASE)
_LLASO_WORDS = re.compile(r"(?<![a-z])asr(?![a-z])|librispeech|gigaspeech|transcription", re.IGNORECASE)
_LLASO_UNSCORED = re.compile(r"pitch|phoneme|pronunciation|entity_extraction", re.IGNORECASE)


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file, or of a JSON file with one list, each with its place for messages.

    Raises:
        ValueError: the file is missing, is not JSON or holds something else; the message names the line.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the JSON or JSONL file of the benchmark")
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            records = [(f"item {number} of {path}", record) for number, record in enumerate(json.loads(text))]
        else:
            lines = enumerate(text.split("\n"), 1)
            records = [(f"line {number} of {path}", json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error}): one object a line, or one list of objects") from error
    for place, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{place} is not an object but {type(record).__name__}")
        yield place, record


def _field(record: Mapping[str, Any], key: str, kind: type | tuple[type, ...], place: str, layout: str) -> Any:
    value = record.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{place}: {key!r} is {value!r}; the layout of {layout} has another value there")
    return value


class _Clips:
    """A collection of utterances; several questions about one file share it."""

    def __init__(self, path: Path, audio_dir: str | None):
        self._root = Path(audio_dir).expanduser() if audio_dir else path.parent
        self.clips: list[Clip] = []
        self._index: dict[tuple[str, str | None], int] = {}

    def add(self, name: str, transcript: str | None) -> int:
        """Return the index of an utterance, which is added if it is new."""
        # some files were written on Windows
        path = Path(PureWindowsPath(name).as_posix()) if "\\" in name else Path(name)
        key = (path.as_posix(), transcript)
        if key not in self._index:
            self._index[key] = len(self.clips)
            same = sum(clip.audio == self._root / path for clip in self.clips)
            self.clips.append(Clip(path.as_posix() + f" ({same + 1})" * bool(same), self._root / path, transcript))
        return self._index[key]


def speech_ifeval(
    name: str, path: str | Path, audio_dir: str | None = None, part: str | None = None, metric: str | None = None
) -> EvalSet:
    """Read Speech-IFEval: instructions about audio whose form a rule checks.

    Fields: ``audio_filepath``, ``instruction``, ``instruction_id_list``, ``kwargs``, ``metric`` ("open" for creative
    writing) and ``seed_transcript``, the description of the audio that the text LLM reads.
    """
    path, layout = Path(path).expanduser(), "Speech-IFEval"
    clips, items, left_out = _Clips(path, audio_dir), list[Item](), Counter[str]()
    for place, record in read_records(path):
        ids, given = record.get("instruction_id_list"), record.get("kwargs")
        if not ids:
            left_out[_JUDGED] += 1
            continue
        if not isinstance(ids, list) or not isinstance(given, list) or len(ids) != len(given):
            raise ValueError(f"{place}: instruction_id_list and kwargs must be lists of one length ({layout})")
        try:
            rules = from_ifeval(ids, given)
        except ValueError as error:
            left_out[f"whose rule is not checked here: {error}"] += 1
            continue
        audio = _field(record, "audio_filepath", str, place, layout)
        clip = clips.add(audio, record.get("seed_transcript") or None)
        group = "creative" if record.get("metric") == "open" else "closed"
        prompt = _field(record, "instruction", str, place, layout)
        items.append(Item(clip, ids[0].rpartition(":")[2], group, prompt, _FOLLOW, rules))
    notes = (
        "only whether the form is obeyed: task accuracy and chain of thought need a judge, so this is not IFrate",
    )
    return EvalSet(name, clips.clips, items, left_out, notes)


def voicebench(
    name: str, path: str | Path, audio_dir: str | None = None, part: str | None = None, metric: str | None = None
) -> EvalSet:
    """Read VoiceBench: the instruction is spoken, and the text prompt is empty.

    Fields: ``prompt`` (what is said), ``audio`` (a path, or an object with ``path``), and by subset ``reference``, or
    ``instruction_id_list`` with ``kwargs``. ``part`` names the subset; else the name of the file does.
    """
    path, layout = Path(path).expanduser(), "VoiceBench"
    subset = part or next((s for s in _VOICEBENCH if s in path.stem), None)
    if subset not in _VOICEBENCH:
        raise ValueError(f"sets.{name}: {path.name} names no subset of {layout}: set part to {', '.join(_VOICEBENCH)}")
    clips, items, left_out = _Clips(path, audio_dir), list[Item](), Counter[str]()
    for place, record in read_records(path):
        if subset in _VOICEBENCH_JUDGED:
            left_out[_JUDGED] += 1
            continue
        audio = record.get("audio")
        audio = audio.get("path") if isinstance(audio, Mapping) else audio
        if not isinstance(audio, str):
            raise ValueError(f"{place}: 'audio' is {audio!r}; save the audio to files and give their paths")
        try:
            metrics, reference = _voicebench_reference(subset, record, place)
        except LookupError as error:
            left_out[f"whose rule is not checked here: {error.args[0]}"] += 1
            continue
        clip = clips.add(audio, _field(record, "prompt", str, place, layout))
        items.append(Item(clip, subset, "spoken", "", metrics, reference))
    notes = ["the spoken instruction is all that is asked; an answer that names no choice is wrong, not drawn"]
    if subset == "advbench":
        notes = ["share of answers that refuse; an empty answer is not a refusal. Refusals also count as abstentions"]
    return EvalSet(name, clips.clips, items, left_out, notes)


def _voicebench_reference(subset: str, record: Mapping[str, Any], place: str) -> tuple[tuple[str, ...], Any]:
    if subset == "advbench":
        return ("refusal",), "refuse"
    if subset == "ifeval":
        ids = _field(record, "instruction_id_list", list, place, "VoiceBench ifeval")
        given = _field(record, "kwargs", list, place, "VoiceBench ifeval")
        # zero stands for "not given" in these files
        try:
            return _FOLLOW + _FOLLOW_PROMPT, from_ifeval(
                ids, [{k: v for k, v in (g or {}).items() if v} for g in given]
            )
        except ValueError as error:
            raise LookupError(str(error)) from error
    label = _field(record, "reference", str, place, f"VoiceBench {subset}").strip()
    if subset == "bbh" and label.lower() in ("yes", "no"):
        return _CHOICE, {"label": label.lower(), "choices": ["yes", "no"]}
    choices = list(_LETTERS[:2] if subset == "bbh" else _LETTERS)
    label = label.strip("()").upper()
    if label not in choices:
        raise ValueError(f"{place}: reference {record['reference']!r} is none of {', '.join(choices)}")
    return _CHOICE, {"label": label, "choices": choices}


def llaso_eval(
    name: str, path: str | Path, audio_dir: str | None = None, part: str | None = None, metric: str | None = None
) -> EvalSet:
    """Read LLaSO-Eval: one file for each task.

    Fields: ``voice`` (a path or a list of paths), ``conversations`` (``{from: human, value: "...<audio>"}``, then
    ``{from: gpt, value: the right answer}``) and ``metadata``. The labels of a classification are all right answers
    of its file. What a file is scored by follows from its name, or from ``metric``: choice, wer, or another of
    ``metrics.corpus`` that compares two texts.
    """
    path, left_out = Path(path).expanduser(), Counter[str]()
    clips, rows = _Clips(path, audio_dir), []
    kind = metric or _llaso_metric(path.stem)
    for place, record in read_records(path):
        turns = _field(record, "conversations", list, place, "LLaSO-Eval")
        if len(turns) < 2 or [t.get("from") if isinstance(t, Mapping) else None for t in turns[:2]] != [
            "human",
            "gpt",
        ]:
            raise ValueError(f"{place}: conversations must begin with turns from human and gpt (LLaSO-Eval)")
        asked, right = (_field(turn, "value", str, place, "LLaSO-Eval") for turn in turns[:2])
        voices = record.get("voice")
        voices = [voices] if isinstance(voices, str) else _field(record, "voice", list, place, "LLaSO-Eval")
        if kind is None or len(voices) != 1:
            left_out[_JUDGED + ", or a metric that we lack" if kind is None else "with several audios"] += 1
            continue
        spoken = (record.get("metadata") or {}).get("sentence")
        clip = clips.add(voices[0], spoken if isinstance(spoken, str) and spoken else None)
        rows.append((clip, " ".join(asked.replace("<audio>", " ").split()), right.strip()))
    task = part or path.stem
    if kind is None:
        return EvalSet(name, clips.clips, [], left_out)
    if kind != "choice":
        items = [Item(clip, task, "llaso", prompt, (kind,), right) for clip, prompt, right in rows]
        return EvalSet(name, clips.clips, items, left_out)
    labels = {right.rstrip(". ").casefold(): right.rstrip(". ") for _, _, right in sorted(rows, key=lambda r: r[2])}
    if rows and len(labels) < 2:
        raise ValueError(f"{path}: all right answers are {next(iter(labels.values()))!r}: a choice needs two labels")
    choices = [labels[key] for key in sorted(labels)]
    items = [
        Item(
            clip, task, "llaso", prompt, _CHOICE, {"label": labels[right.rstrip(". ").casefold()], "choices": choices}
        )
        for clip, prompt, right in rows
    ]
    return EvalSet(name, clips.clips, items, left_out, (f"{len(choices)} labels: the right answers of the file",))


def _llaso_metric(stem: str) -> str | None:
    if _LLASO_UNSCORED.search(stem):
        return None
    return "choice" if _LLASO_CHOICE.search(stem) else "wer" if _LLASO_WORDS.search(stem) else None


FORMATS = {"llaso_eval": llaso_eval, "speech_ifeval": speech_ifeval, "voicebench": voicebench}
