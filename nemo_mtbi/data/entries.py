# SPDX-License-Identifier: Apache-2.0
"""Checks of the entries of a manifest, before the code of NeMo or Lhotse meets it.

Both take a manifest's values as they are: a number in the place of a text, or NaN in that of a duration, fails far
from its place and ends the reader. The checks here work on lines (mappings) and on objects of Lhotse alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nemo_mtbi.io.text import is_writable_text

WRONG_TYPE, BAD_TIMES, BAD_NAME, BAD_TEXT = "wrong_type", "bad_times", "bad_name", "bad_text"
# Above it, Lhotse's decimal arithmetic of samples fails; 30 years.
_MOST_SECONDS, _MOST_RATE = 1e9, 1e8
_MOST_BYTES_IN_A_NAME, _MOST_BYTES_IN_A_PATH = 255, 4095


class Problem(NamedTuple):
    """A fault of an entry.

    Attributes:
        reason: name under which it is counted.
        text: which key is wrong, and why, for a message.
    """

    reason: str
    text: str


class BadEntryError(ValueError):
    """An entry that cannot be used.

    Args:
        message: names the entry, and what is wrong.
        reason: name under which it is counted.
    """

    def __init__(self, message: str, reason: str = WRONG_TYPE):
        super().__init__(message)  # torch makes the error of a worker process anew, from its text alone
        self.reason = reason


class _BadValue(Exception):
    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.problem = Problem(reason, text)


def problem_of(check: Any, *args: Any) -> Problem | None:
    """Return the problem that a check of this module reports; ``None`` if there is none."""
    try:
        check(*args)
    except _BadValue as error:
        return error.problem
    return None


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# ----------------------------------------------------------------------------------------------------------- values


def check_text(value: Any, key: str, optional: bool = True) -> None:
    """Check that a value is a string that can be written as UTF-8, or ``None`` where that is ``optional``."""
    if value is None and optional:
        return
    if not isinstance(value, str):
        raise _BadValue(WRONG_TYPE, f"{key} must be a string, not {_shown(value)}")
    if not is_writable_text(value):
        raise _BadValue(BAD_TEXT, f"{key} holds half of a surrogate pair, which is not text: {_shown(value)}")


def check_seconds(value: Any, key: str, least: float = 0.0, optional: bool = False) -> None:
    """Check that a value is a finite number of seconds, at least ``least``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _BadValue(WRONG_TYPE, f"{key} must be seconds, not {_shown(value)}")
    if not math.isfinite(value) or not least <= value <= _MOST_SECONDS:
        raise _BadValue(BAD_TIMES, f"{key} is {_shown(value)} seconds")


def check_count(value: Any, key: str, least: int, most: float = math.inf) -> None:
    """Check that a value is a whole number, such as a rate in hertz or a number of samples."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise _BadValue(WRONG_TYPE, f"{key} must be a whole number, not {_shown(value)}")
    if not least <= value <= most:
        raise _BadValue(BAD_TIMES, f"{key} is {_shown(value)}")


def check_name(value: Any, key: str) -> None:
    """Check that a value can be the name of a file, absolute or relative, or an address."""
    check_text(value, key, optional=False)
    size = len(os.fsencode(value))
    longest = max((len(os.fsencode(part)) for part in value.split("/")), default=0)
    if not value or value == "-" or "\0" in value:
        raise _BadValue(BAD_NAME, f"{key} is not the name of a file: {_shown(value)}")
    if "://" not in value and (longest > _MOST_BYTES_IN_A_NAME or size > _MOST_BYTES_IN_A_PATH):
        raise _BadValue(BAD_NAME, f"{key} has {size} bytes, which is too long for the name of a file: {_shown(value)}")


def _check_list(value: Any, key: str) -> Iterable[Any]:
    if not isinstance(value, (list, tuple)):
        raise _BadValue(WRONG_TYPE, f"{key} must be a list, not {_shown(value)}")
    return value


def _check_mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _BadValue(WRONG_TYPE, f"{key} must be a mapping, not {_shown(value)}")
    return value


def _check_channels(value: Any, key: str) -> None:
    for item in value if isinstance(value, (list, tuple)) else [value]:
        check_count(item, key, 0)


def check_alignment(value: Any, key: str = "alignment") -> None:
    """Check that a value is ``{"word": [[symbol, start, duration], ...], ...}``, or ``None``."""
    if value is None:
        return
    for kind, items in _check_mapping(value, key).items():
        for item in _check_list(items, f"{key}.{kind}"):
            parts = list(item.values()) if isinstance(item, Mapping) else item
            if not isinstance(parts, (list, tuple)) or not 3 <= len(parts) <= 4:
                raise _BadValue(WRONG_TYPE, f"{key}.{kind} holds {_shown(item)}: give [symbol, start, duration]")
            check_text(parts[0], f"a symbol of {key}.{kind}", optional=False)
            check_seconds(parts[1], f"a start of {key}.{kind}", -_MOST_SECONDS)
            check_seconds(parts[2], f"a duration of {key}.{kind}", -1e-6)


_TASK_KEYS = ("task", "prompt", "response")


def check_custom(custom: Any, key: str = "custom") -> None:
    """Check the custom fields that we read: ``behaviors``, ``behaviors_from``, ``references``, ``alignment``."""
    if custom is None:
        return
    custom = _check_mapping(custom, key)
    check_alignment(custom.get("alignment"))
    for name in ("behaviors_from", "references"):
        if custom.get(name) is not None:
            _check_mapping(custom[name], name)
    for entry in _check_list(custom["behaviors"], "behaviors") if custom.get("behaviors") is not None else ():
        for name in _TASK_KEYS:
            check_text(_check_mapping(entry, "an entry of behaviors").get(name), f"{name} of a behavior")


# ------------------------------------------------------------------------------------------------------------- cuts


def check_cut_values(cut: Any) -> None:
    """Check a Lhotse cut or the mapping that it is made of: types, and finite times."""
    check_text(_get(cut, "id"), "id", optional=False)
    tracks = _get(cut, "tracks")
    if tracks is None:
        _check_single(cut)
        return
    if not _check_list(tracks, "tracks"):
        raise _BadValue(WRONG_TYPE, "tracks is empty")
    for track in tracks:
        check_seconds(_get(track, "offset"), "offset of a track", optional=True)
        snr = _get(track, "snr")
        if snr is not None:
            check_seconds(snr, "snr of a track", -_MOST_SECONDS)
        inner = _get(track, "cut")
        if inner is None:
            raise _BadValue(WRONG_TYPE, "a track has no cut")
        if "PaddingCut" not in (_get(track, "type"), type(inner).__name__):
            check_cut_values(inner)


def _check_single(cut: Any) -> None:
    check_seconds(_get(cut, "start"), "start", -1e-3)
    check_seconds(_get(cut, "duration"), "duration")
    _check_channels(_get(cut, "channel"), "channel")
    for key in ("recording", "features", "supervisions", "custom"):
        if isinstance(cut, Mapping) and key in cut and cut[key] is None and key != "custom":
            raise _BadValue(WRONG_TYPE, f"{key} is null")
    if _get(cut, "recording") is not None:
        _check_recording(_get(cut, "recording"))
    for segment in _check_list(_get(cut, "supervisions") or [], "supervisions"):
        _check_supervision(segment)
    check_custom(_get(cut, "custom"))


def _check_recording(recording: Any) -> None:
    if isinstance(recording, (str, int, float, list, tuple)):
        raise _BadValue(WRONG_TYPE, f"recording must be a mapping, not {_shown(recording)}")
    check_text(_get(recording, "id"), "id of the recording", optional=False)
    check_count(_get(recording, "sampling_rate"), "sampling_rate", 1, _MOST_RATE)
    check_count(_get(recording, "num_samples"), "num_samples", 0, _MOST_RATE * _MOST_SECONDS)
    check_seconds(_get(recording, "duration"), "duration of the recording")
    for source in _check_list(_get(recording, "sources"), "sources"):
        kind, name = _get(source, "type"), _get(source, "source")
        check_text(kind, "type of a source", optional=False)
        _check_list(_get(source, "channels"), "channels of a source")
        _check_channels(_get(source, "channels"), "channels of a source")
        if kind == "file":
            check_name(name, "source")


def _check_supervision(segment: Any) -> None:
    if isinstance(segment, (str, int, float, list, tuple)) or segment is None:
        raise _BadValue(WRONG_TYPE, f"a supervision must be a mapping, not {_shown(segment)}")
    for key in ("text", "language", "speaker", "gender"):
        check_text(_get(segment, key), key)
    check_seconds(_get(segment, "start"), "start of a supervision", -_MOST_SECONDS)
    check_seconds(_get(segment, "duration"), "duration of a supervision")
    check_alignment(_get(segment, "alignment"))
    custom = _get(segment, "custom")
    check_custom(custom)
    for key in ("cer", "context_speaker_similarity"):  # NeMo's filters compare them
        value = None if custom is None else custom.get(key)
        if value is not None and not isinstance(value, (int, float)):
            raise _BadValue(WRONG_TYPE, f"{key} must be a number, not {_shown(value)}")


# ----------------------------------------------------------------------------------------------------- NeMo's lines


def check_nemo_entry(entry: Mapping[str, Any], text_keys: Iterable[str], tarred: bool) -> None:
    """Check a line of a NeMo manifest.

    Args:
        entry: its mapping.
        text_keys: keys that must hold strings, if anything.
        tarred: ``audio_filepath`` names a member of an archive.
    """
    check_name(entry["audio_filepath"], "audio_filepath")
    check_seconds(entry.get("duration"), "duration", 0.0)
    check_seconds(entry.get("offset"), "offset", 0.0, optional=True)
    for key in ("sampling_rate", "sample_rate"):
        if entry.get(key) is not None:
            check_count(entry[key], key, 1, _MOST_RATE)
    for key in text_keys:
        check_text(entry.get(key), key)
    if tarred and "shard_id" in entry:
        check_count(entry["shard_id"], "shard_id", -1)
    check_custom(entry, "the entry")


def check_conversation_entry(entry: Mapping[str, Any]) -> None:
    """Check a line of NeMo's multimodal or ShareGPT conversations."""
    if isinstance(entry.get("id"), (list, dict)):
        raise _BadValue(WRONG_TYPE, f"id must be a string, not {_shown(entry['id'])}")
    for key in ("sound", "ori_sound"):
        if entry.get(key) is not None:
            check_name(entry[key], key)
    if entry.get("custom") is not None:
        _check_mapping(entry["custom"], "custom")
    for turn in _check_list(entry.get("conversations"), "conversations"):
        turn = _check_mapping(turn, "a turn of conversations")
        check_text(turn.get("from"), "from", optional=False)
        check_text(turn.get("value"), "value", optional=False)
        if turn.get("type") == "audio":
            check_name(turn["value"], "value of an audio turn")
        check_seconds(turn.get("duration"), "duration of a turn", optional=True)
        check_seconds(turn.get("offset"), "offset of a turn", optional="offset" not in turn)


def check_conversation(conversation: Any) -> None:
    """Check a conversation of NeMo's readers, with the cuts of its audios."""
    for turn in conversation.turns:
        check_text(turn.role, "role of a turn", optional=False)
        if getattr(turn, "cut", None) is None:
            check_text(turn.value, "value of a turn", optional=False)
        else:
            check_cut_values(turn.cut)
