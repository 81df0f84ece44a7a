# SPDX-License-Identifier: Apache-2.0
"""Checks lines of manifests before Lhotse's and NeMo's readers get them, which an error would end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lhotse import Recording
from lhotse.audio import AudioLoadingError

from nemo_mtbi.data.entries import (
    WRONG_TYPE,
    BadEntryError,
    Problem,
    check_conversation_entry,
    check_cut_values,
    check_nemo_entry,
    problem_of,
)
from nemo_mtbi.io.sources import ForbiddenSourceError
from nemo_mtbi.io.text import in_one_line

PROBLEM = "nemo_mtbi_problem"  # custom key of a cut that stands for a bad line, where a line can't be left out
UNREADABLE = "unreadable"
_CUTS = ("MonoCut", "MultiCut", "MixedCut", "Cut")
# Keys without which NeMo's and Lhotse's readers fail.
_NEEDED = {
    "nemo": ("audio_filepath", "duration"),
    "nemo_tarred": ("audio_filepath", "duration"),
    "multimodal_conversation": ("id", "conversations"),
    "share_gpt": ("conversations",),
    "lhotse": ("id",),
}
SKIP = "set on_bad_audio: skip to leave it out"


class EntryFilter:
    """Checks the lines of manifests before Lhotse's and NeMo's readers get them.

    Args:
        skip: leave bad entries out and count them; otherwise the first is an error.
        remedy: how bad entries are left out, for messages.
        text_keys: keys of NeMo's manifests that hold text.
        kinds: ``type`` of each manifest in NeMo's ``input_cfg``, as far as it is known.
        tarred: manifests whose audio lies in archives; ``None``: all may be such.
        roots: folder of the audio of ShareGPT manifests, by manifest.
    """

    def __init__(
        self,
        skip: bool = False,
        remedy: str = SKIP,
        text_keys: Iterable[str] = ("text", "lang"),
        kinds: Mapping[str, str] = {},  # noqa: B006 (only read)
        tarred: Iterable[str] | None = (),
        roots: Mapping[str, str] = {},  # noqa: B006 (only read)
    ):
        self.skip = skip
        self.remedy = remedy
        self.text_keys = tuple(text_keys)
        self.kinds = dict(kinds)
        self.tarred = None if tarred is None else frozenset(tarred)
        self.roots = dict(roots)
        self.skipped: Counter = Counter()
        self.place = ""  # of the last line that a reader got
        self.opens_audio = False  # whether the reader opens the audio of that line itself
        self.opening = False  # while readers are made, some of which look at their first line or at all lines
        self._early: set[tuple[str, int]] = set()

    @classmethod
    def of(cls, config: Mapping[str, Any], skip: bool, remedy: str = SKIP) -> EntryFilter:
        """Return the filter for a data configuration in NeMo's keys.

        Args:
            config: of the data, with its ``input_cfg`` as lists and mappings where it is not a file.
            skip: leave bad entries out and count them; otherwise the first is an error.
            remedy: how bad entries are left out, for messages.
        """
        texts, tarred = {"text", "lang"}, set()
        kinds: dict[str, str] = {}
        roots: dict[str, str] = {}
        for entry in _entries(config):
            texts.update(str(entry[key]) for key in ("text_field", "lang_field") if entry.get(key))
            manifests = list(_expanded(entry.get("manifest_filepath")))
            kinds.update(dict.fromkeys(manifests, str(entry.get("type", "nemo"))))
            kinds.update(dict.fromkeys(_expanded(entry.get("cuts_path")), "lhotse"))
            if entry.get("tarred_audio_filepaths") is not None:
                tarred.update(manifests)
            if entry.get("audio_root") is not None:
                roots.update(dict.fromkeys(manifests, str(entry["audio_root"])))
        return cls(skip, remedy, sorted(texts), kinds, None if _elsewhere(config) else tarred, roots)

    def __call__(self, line: str, path: str, number: int) -> str | None:
        """Return the line that the reader gets in place of a line; ``None``: it is left out.

        Args:
            line: as it stands in the file.
            path: of the manifest.
            number: of the line, from 1.

        Raises:
            BadEntryError: if the line is bad, and bad ones are not left out.
            ValueError: if it is not JSON.
        """
        if number == 1:
            line = line.removeprefix("\ufeff")
        text = line.strip()
        manifest = ".json" in Path(path).name
        if not text or not (manifest or text.startswith("{")):
            return line
        place = f"line {number} of {path}"
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not manifest:
                return line  # some text
            raise BadEntryError(f"{place} is not JSON ({error}): mend the file") from error
        tarred = self.tarred is None or path in self.tarred
        self.place = f"{place}{_named(entry)}"
        problem = self._problem(entry, path, tarred)
        if problem is None:
            return line
        if not self.skip:
            raise BadEntryError(f"{self.place}: {problem.text}; mend the data, or {self.remedy}", problem.reason)
        instead = _in_place_of(entry, problem, tarred)
        if instead is None or PROBLEM not in instead:
            self._count(problem.reason, (path, number))
        return instead

    def restart(self) -> None:
        """Begin to count anew."""
        self.skipped.clear()
        self._early.clear()

    def _count(self, reason: str, line: tuple[str, int]) -> None:
        if self.opening:
            self.skipped[reason] += line not in self._early
            self._early.add(line)
        elif line in self._early:
            self._early.discard(line)  # counted already
        else:
            self.skipped[reason] += 1

    def _problem(self, entry: Any, path: str, tarred: bool) -> Problem | None:
        self.opens_audio = False
        if not isinstance(entry, dict):
            return Problem(WRONG_TYPE, "is not a JSON object")
        for key in _NEEDED.get(self.kinds.get(path, ""), ()):
            if key not in entry:
                return Problem("missing_key", f"has no {key}")
        if "conversations" in entry:
            self.opens_audio = not tarred
            problem = problem_of(check_conversation_entry, entry)
            return problem or (None if tarred or not self.skip else self._unreadable_turn(entry, path))
        if "audio_filepath" in entry:
            if entry.get("_skipme"):
                return None
            self.opens_audio = not tarred and not (entry.get("sampling_rate") or entry.get("sample_rate"))
            problem = problem_of(check_nemo_entry, entry, self.text_keys, tarred)
            if problem or not self.skip or not self.opens_audio:
                return problem
            return self._unreadable(entry["audio_filepath"], path, entry.get("offset"), entry["duration"])
        if entry.get("type") in _CUTS:
            return problem_of(check_cut_values, entry)
        if self.kinds.get(path) != "lhotse" or self.opening:  # Lhotse says itself what the first line is
            return None
        return Problem(WRONG_TYPE, f"the type of a cut is not {entry.get('type')!r}")

    def _unreadable_turn(self, entry: Mapping[str, Any], path: str) -> Problem | None:
        """Return the problem of the first audio of a conversation that NeMo's reader could not open."""
        shared = entry.get("sound") or entry.get("ori_sound")
        for turn in entry["conversations"]:
            name = turn["value"] if turn.get("type") == "audio" else None
            if name is None:
                continue
            problem = self._unreadable(name, path, turn.get("offset", 0.0), turn.get("duration"))
            if problem is not None:
                return problem
        return None if shared is None else self._unreadable(shared, path, None, None)

    def _unreadable(self, name: str, path: str, offset: Any, duration: Any) -> Problem | None:
        """Return why NeMo's reader would fail: try what it is about to do, open the header and cut the part."""
        from nemo.collections.common.parts.preprocessing.manifest import get_full_path
        from nemo.utils.data_utils import is_datastore_path

        root = self.roots.get(path)
        full = get_full_path(name, data_dir=root) if root else get_full_path(name, path, force_cache=False)
        if is_datastore_path(full):
            return None
        try:
            cut = Recording.from_file(full).to_cut()
            if offset is not None:
                cut.truncate(offset=offset, duration=duration)
        except ForbiddenSourceError:
            raise
        except (AudioLoadingError, AssertionError, OSError, ValueError) as error:
            return Problem(UNREADABLE, f"the audio {name} cannot be read: {in_one_line(error)}")
        return None


def _named(entry: Any) -> str:
    """Return the name of an entry for a message, in parentheses."""
    name = (
        next((entry[key] for key in ("id", "audio_filepath") if entry.get(key)), "") if isinstance(entry, dict) else ""
    )
    name = str(name)
    return f" ({name if len(name) <= 120 else '…' + name[-119:]})" if name else ""


def _in_place_of(entry: Any, problem: Problem, tarred: bool) -> str | None:
    """Return a line by which a reader goes on without the bad one; ``None``: the line is left out."""
    if not isinstance(entry, dict):
        return None
    if entry.get("type") in _CUTS:  # Shar reads lines beside audio: none may be missing
        marked = {"type": "MonoCut", "id": str(entry.get("id")), "start": 0, "duration": 1, "channel": 0}
        return json.dumps({**marked, "supervisions": [], "custom": {PROBLEM: list(problem)}}) + "\n"
    if not tarred:
        return None
    if "conversations" not in entry:  # NeMo's own mark for lines whose audio is in the archive and is passed over
        kept = {key: entry[key] for key in ("audio_filepath", "shard_id") if key in entry}
        if isinstance(kept["audio_filepath"], str):
            return json.dumps({**kept, "duration": 1.0, "_skipme": True}) + "\n"
        return None
    turns = entry["conversations"] if isinstance(entry["conversations"], list) else []
    spoken = [turn for turn in turns if isinstance(turn, dict) and turn.get("type") == "audio"]
    audios = [{"type": "audio", "from": "user", "value": turn.get("value")} for turn in spoken]
    return json.dumps({"id": str(entry.get("id")), "conversations": audios, "custom": {"_skipme": True}}) + "\n"


def _entries(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a data configuration and all sources in it."""
    yield config
    group = config.get("input_cfg")
    if isinstance(group, (str, Path)) and Path(group).is_file():
        from omegaconf import OmegaConf

        group = OmegaConf.to_container(OmegaConf.load(group), resolve=True)
    for entry in group if isinstance(group, list) else ():
        if isinstance(entry, Mapping):
            yield from _entries(entry)


def _elsewhere(config: Mapping[str, Any]) -> bool:
    """Return whether sources are listed in a file that is not on this machine."""
    groups = [entry.get("input_cfg") for entry in _entries(config)]
    return any(isinstance(group, (str, Path)) and not Path(group).is_file() for group in groups)


def _expanded(value: Any) -> Iterator[str]:
    """Yield the files that a value of NeMo's ``manifest_filepath`` names."""
    from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths

    if isinstance(value, (str, Path)):
        yield from (str(path) for path in expand_sharded_filepaths(str(value)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _expanded(item)
