# SPDX-License-Identifier: Apache-2.0
"""Answers of an unfinished transcription: the next run resumes behind the last whole line.

``OUT.partial`` holds the first lines of the output, byte for byte. ``OUT.partial.json`` names the model that made them
(its first line) and the audios that were left out (a line for each).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_mtbi.commands.transcribe_questions import Utterance, working_files

FORMAT = 1


@dataclass
class Done:
    """The finished part of a former run.

    Attributes:
        utterances: number of finished utterances, from the first on.
        lines: their answers.
        skipped: utterances that were left out, with the reason.
        size: bytes of the lines.
    """

    utterances: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[Utterance, str]] = field(default_factory=list)
    size: int = 0


class Unfinished(AbstractContextManager):
    """The files of a run in progress. Other processes than the one that writes have no files and store nothing.

    Args:
        output: file of the answers.
        model: hash of the model and its settings of generation.
        utterances: the audios with their prompts.
        writes: whether this is the process that writes.
    """

    def __init__(self, output: Path, model: str, utterances: Sequence[Utterance], writes: bool = True):
        self.output, self.utterances, self.writes = output, utterances, writes
        self.partial, self._notes = working_files(output)
        self._header = {"format": FORMAT, "model": model}
        self._files: list[Any] = []

    def read(self) -> Done:
        """Return the finished part of a former run.

        Raises:
            ValueError: if its answers are those of another model or to other questions; names the remedy.
        """
        content = self.partial.read_bytes() if self.writes and self.partial.exists() else b""
        lines = content.split(b"\n")[:-1]  # what follows the last line feed was not finished
        if not lines:
            return Done()
        header, skipped = self._read_notes()
        if header is None:
            self._refuse(f"is there without {self._notes.name}, which says what it is")
        if header != self._header:
            self._refuse("was left by a run with another model or other settings of generation")
        return self._match(lines, skipped)

    def _match(self, lines: Sequence[bytes], skipped: dict[str, str]) -> Done:
        """Match lines with questions up to the first utterance without all of its answers."""
        done, position = Done(), 0
        for index, utterance in enumerate(self.utterances):
            if _key(utterance) in skipped:
                done.skipped.append((utterance, skipped[_key(utterance)]))
            else:
                answers = [_parse(line) for line in lines[position : position + len(utterance.prompts)]]
                pairs = zip(answers, utterance.prompts, strict=False)  # the last utterance may have fewer answers
                if any(_question(line) != _question(utterance.line(prompt)) for line, prompt in pairs):
                    self._refuse(f"holds an answer to another question in line {position + 1}")
                if len(answers) < len(utterance.prompts):
                    break
                done.size += sum(len(line) + 1 for line in lines[position : position + len(answers)])
                done.lines += answers
                position += len(answers)
            done.utterances = index + 1
        else:
            if position < len(lines):
                self._refuse(f"holds more answers than there are questions, from line {position + 1} on")
        return done

    def _read_notes(self) -> tuple[Any, dict[str, str]]:
        """Return the header, and by audio the reason why it was left out; ``None`` if the file can't be read."""
        try:
            notes = [json.loads(line) for line in self._notes.read_bytes().split(b"\n")[:-1]]
            return notes[0], {note["audio"]: note["reason"] for note in notes[1:]}
        except (OSError, ValueError, LookupError, TypeError):
            return None, {}

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"{self.partial}, from which this run would go on, {why}: give another output_filename, repeat the "
            "command that it was made with, or remove that file to begin anew"
        )

    def begin(self, done: Done) -> None:
        """Open the files behind what was done."""
        if not self.writes:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        notes = [self._header, *(_note(*entry) for entry in done.skipped)]
        self._notes.write_bytes(b"".join(map(encode, notes)))
        self._files = [open(path, "ab") for path in (self.partial, self._notes)]  # noqa: SIM115
        os.truncate(self.partial, done.size)

    def skip(self, utterance: Utterance, reason: str) -> None:
        """Record that an audio was left out."""
        if self.writes:
            self._append(1, [_note(utterance, reason)])

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Store answers."""
        if self.writes:
            self._append(0, lines)

    def _append(self, which: int, lines: Iterable[dict[str, Any]]) -> None:
        self._files[which].write(b"".join(encode(line) for line in lines))
        self._files[which].flush()

    def finish(self) -> None:
        """Give the output its name."""
        if self.writes:
            self.close()
            os.replace(self.partial, self.output)
            self._notes.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._files = []

    def __exit__(self, *error: object) -> None:
        self.close()
        if self.writes and self.partial.exists() and not self.partial.stat().st_size:
            for path in (self.partial, self._notes):  # nothing to go on from
                path.unlink(missing_ok=True)


def encode(line: dict[str, Any]) -> bytes:
    """Return a line of JSON in UTF-8; text that UTF-8 can't hold (a name that is not Unicode) in escapes."""
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(line) + "\n").encode()


def _parse(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) and isinstance(answer.get("pred_text"), str) else {}


def _question(line: dict[str, Any]) -> str:
    """Return a line without its answer; as text, since NaN does not equal itself."""
    return json.dumps({key: value for key, value in line.items() if key != "pred_text"})


def _key(utterance: Utterance) -> str:
    return json.dumps([utterance.name, utterance.offset, utterance.duration, utterance.problem])


def _note(utterance: Utterance, reason: str) -> dict[str, Any]:
    return {"audio": _key(utterance), "reason": reason}
