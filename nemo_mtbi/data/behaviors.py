# SPDX-License-Identifier: Apache-2.0
"""Behaviors of a cut: the text LLM's responses to its transcript, and their provenance.

``cut.custom["behaviors"]`` is a list of ``{task, prompt, response, truncated, ids}``, where ``ids`` are the tokens
that the LLM gave, and may be missing. ``cut.custom["behaviors_from"]`` is the provenance ``{"llm": hash, "chat": hash,
"chat_format": {...}, "decoding": {...}}``. Both may also stand in a supervision's custom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lhotse.cut import Cut, MixedCut

from nemo_mtbi.chat.format import ChatFormat, chat_difference
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.layouts.interleave import WordSpan
from nemo_mtbi.layouts.layout import Row, make_row

BEHAVIORS, PROVENANCE = "behaviors", "behaviors_from"
CHAT_FORMAT = "chat_format"  # key of the provenance: what the fingerprint of the chat format is the hash of
GENERATE = "examples/mtbi_generate_targets.py"
_TOLERANCE = 0.1  # seconds by which an aligner may miss the bounds of an utterance
_FIELDS = {"task": str, "prompt": str, "response": str, "truncated": bool}


@dataclass(frozen=True)
class Behavior:
    """One response of the text LLM.

    Attributes:
        task: name of the task.
        prompt: the instruction; may be empty.
        response: what the LLM answered.
        truncated: the answer was cut by the length limit, so it teaches no end token.
        ids: the tokens that the LLM gave, without its end: the text of some encodes to others. ``None``: unknown.
    """

    task: str
    prompt: str
    response: str
    truncated: bool = False
    ids: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, data: Any, cut_id: str) -> Behavior:
        """Return one entry of ``behaviors``; ``truncated`` and ``ids`` may be missing.

        Args:
            data: the entry.
            cut_id: id of its cut, for messages.

        Raises:
            ValueError: if a key is missing or has another type; names the cut.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"cut {cut_id}: a behavior must be a mapping with the keys {list(_FIELDS)}, got {data!r}")
        values = {"truncated": False, **{name: data[name] for name in _FIELDS if name in data}}
        for name, kind in _FIELDS.items():
            if name not in values:
                raise ValueError(
                    f"cut {cut_id}: a behavior has no key {name!r}; write the targets again with {GENERATE}"
                )
            if not isinstance(values[name], kind):
                raise ValueError(f"cut {cut_id}: {name!r} of a behavior must be {kind.__name__}, got {values[name]!r}")
        ids = data.get("ids")
        if ids is not None and not (isinstance(ids, (list, tuple)) and all(type(i) is int for i in ids)):
            raise ValueError(f"cut {cut_id}: 'ids' of a behavior must be a list of token ids, got {ids!r}")
        return cls(**values, ids=None if ids is None else tuple(ids))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``behaviors`` that :meth:`from_dict` reads."""
        entry = {name: getattr(self, name) for name in _FIELDS}
        return entry if self.ids is None else {**entry, "ids": list(self.ids)}

    @property
    def teaches(self) -> bool:
        """Whether there is a token to learn; an empty truncated response has none."""
        return bool(self.response) or not self.truncated

    def row(self, chat: ChatFormat, audio: str | Sequence[int | str], utterance: int | None = None) -> Row:
        """Return the training row.

        Args:
            chat: the chat format of the model.
            audio: content of the audio slot of the prompt: text or layout values.
            utterance: index of the utterance in the step; ``None`` without speech.
        """
        response = chat.response(self.response, self.truncated, self.ids)
        return make_row(chat.prompt(self.prompt, audio), response, utterance)


def custom_value(cut: Cut, key: str) -> Any:
    """Return a custom value of the cut or of one of its supervisions: tools differ in where they put it."""
    for holder in (cut, *cut.supervisions):
        if holder.custom is not None and key in holder.custom:
            return holder.custom[key]
    return None


def transcript(cut: Cut) -> str:
    """Return the text of all supervisions in order of time, with single spaces; empty if there is none."""
    segments = sorted(cut.supervisions, key=lambda supervision: supervision.start)
    return " ".join(" ".join(segment.text or "" for segment in segments).split())


def word_times(cut: Cut) -> tuple[WordSpan, ...] | None:
    """Return the times of the words of the transcript, from ``supervision.alignment["word"]``.

    Lhotse keeps alignments in the time of the recording, whatever part of it the cut is, and does not move them when a
    cut is padded or joined to another. So the offsets are added here.

    Returns:
        Times in seconds from the start of the cut. ``None`` if there are none, or they do not fit the transcript: a
        word outside its supervision, out of order, or another number of words.
    """
    tracks = [(track.cut, track.offset) for track in cut.tracks] if isinstance(cut, MixedCut) else [(cut, 0.0)]
    segments = [(segment, offset, part.start) for part, offset in tracks for segment in part.supervisions]
    words: list[WordSpan] = []
    for segment, offset, part_start in sorted(segments, key=lambda entry: entry[0].start + entry[1]):
        for item in (segment.alignment or {}).get("word", ()):
            if not item.symbol.strip():  # aligners write silences as empty words
                continue
            start = item.start - part_start
            if start < segment.start - _TOLERANCE or start + item.duration > segment.end + _TOLERANCE:
                return None
            words.append(WordSpan(start + offset, start + offset + item.duration))
    in_order = all(a.start_s <= b.start_s for a, b in pairwise(words)) and all(w.start_s <= w.end_s for w in words)
    return tuple(words) if words and in_order and len(words) == len(transcript(cut).split()) else None


def read_behaviors(cut: Cut) -> list[Behavior]:
    """Return all behaviors of a cut.

    Raises:
        ValueError: if there is none, or one is malformed.
    """
    entries = custom_value(cut, BEHAVIORS)
    if not entries:
        raise ValueError(
            f"cut {cut.id} carries no behaviors: run {GENERATE} on this data first, and train on what it writes"
        )
    return [Behavior.from_dict(entry, cut.id) for entry in entries]


def draw_behaviors(cut: Cut, k: int | None, seed: int, epoch: int) -> list[Behavior]:
    """Return ``k`` drawn behaviors of distinct tasks (fewer if the cut has fewer); ``None``: all, in order.

    A pure function of (seed, epoch, cut id) and of the cut's behaviors. Behaviors without a token to learn are left
    out, so the result may be empty.
    """
    behaviors = [behavior for behavior in read_behaviors(cut) if behavior.teaches]
    if k is None:
        return behaviors
    by_task: dict[str, list[Behavior]] = {}
    for behavior in behaviors:
        by_task.setdefault(behavior.task, []).append(behavior)
    rng = stable_rng("behaviors", seed, epoch, cut.id)
    tasks = rng.sample(list(by_task), min(k, len(by_task)))
    return [rng.choice(by_task[task]) for task in tasks]


def check_provenance(cut: Cut, expected: Mapping[str, Any], allow_foreign: bool = False) -> bool:
    """Refuse responses of another LLM or chat format: the connector would imitate another model's behavior.

    Args:
        cut: a cut with behaviors.
        expected: fingerprints of the model that is trained, such as ``{"llm": "sha256:...", "chat": "sha256:..."}``;
            with ``chat_format`` a message can say in what the formats differ.
        allow_foreign: accept whatever the cut says.

    Returns:
        Whether they are the model's own, so that their ``ids`` mean the same tokens.

    Raises:
        ValueError: names both fingerprints and the remedy.
    """
    stated = custom_value(cut, PROVENANCE)
    stated = stated if isinstance(stated, Mapping) else {}
    other = next((key for key in expected if key != CHAT_FORMAT and stated.get(key) != expected[key]), None)
    if other is None or allow_foreign:
        return other is None
    formats = (stated.get(CHAT_FORMAT), expected.get(CHAT_FORMAT))
    difference = chat_difference(*formats, stated.get(other)) if other == "chat" else ""
    raise ValueError(
        f"the behaviors of cut {cut.id} come from another {other}: {stated.get(other)}, but the model has "
        f"{expected[other]}. {difference}{' ' * bool(difference)}Regenerate them with {GENERATE}, or set "
        "model.targets.allow_foreign: true to train on them as is"
    )
