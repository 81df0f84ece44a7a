# SPDX-License-Identifier: Apache-2.0
"""Answers of a transcription that is not finished: the next run goes on behind its last whole line.

``OUT.partial`` holds the first lines of the output, as they will stand there. ``OUT.partial.json`` says which model
made them (its first line), and which audios were left out (a line for each).
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
        utterances: how many, from the first on.
        lines: answers to them.
        skipped: those that were left out, and why.
        size: bytes of the lines.
    """

    utterances: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[Utterance, str]] = field(default_factory=list)
    size: int = 0


class Unfinished(AbstractContextManager):
    """The files of a run while it is at work. On a process that does not write it has none, and stores nothing.

    Args:
        output: file of the answers.
        model: says which model answers, and how.
        utterances: what is asked.
        writes: whether this is the process that writes.
    """

    def __init__(self, output: Path, model: str, utterances: Sequence[Utterance], writes: bool = True):
        self.output, self.utterances, self.writes = output, utterances, writes
        self.partial, self._notes = working_files(output)
        self._header = {"format": FORMAT, "model": model}
        self._files: list[Any] = []

    def read(self) -> Done:
        """Return what a former run has finished.

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
        """Go through the questions as long as they have been answered, or their audio was left out."""
        done, position = Done(), 0
        for index, utterance in enumerate(self.utterances):
            if _key(utterance) in skipped:
                done.skipped.append((utterance, skipped[_key(utterance)]))
            else:
                found = [_parse(line) for line in lines[position : position + len(utterance.prompts)]]
                if any(_question(line) != _question(utterance.line(p)) for line, p in zip(found, utterance.prompts)):  # noqa: B905 (the last may have fewer)
                    self._refuse(f"holds an answer to another question in line {position + 1}")
                if len(found) < len(utterance.prompts):
                    break
                done.size += sum(len(line) + 1 for line in lines[position : position + len(found)])
                done.lines += found
                position += len(found)
            done.utterances = index + 1
        else:
            if position < len(lines):
                self._refuse(f"holds more answers than there are questions, from line {position + 1} on")
        return done

    def _read_notes(self) -> tuple[Any, dict[str, str]]:
        """Header, and why audios were left out, by what they are."""
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
        """Note that an audio was left out."""
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
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pred_text"), str) else {}


def _question(line: dict[str, Any]) -> str:
    """A line without its answer; as text, since NaN does not equal itself."""
    return json.dumps({key: value for key, value in line.items() if key != "pred_text"})


def _key(utterance: Utterance) -> str:
    return json.dumps([utterance.name, utterance.offset, utterance.duration, utterance.problem])


def _note(utterance: Utterance, reason: str) -> dict[str, Any]:
    return {"audio": _key(utterance), "reason": reason}
