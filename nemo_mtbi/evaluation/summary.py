# SPDX-License-Identifier: Apache-2.0
"""Speech against text in a few figures: a short view of the results of one speech system and its text system.

Every figure is a mean over questions (micro average; one question is one utterance under one prompt), so a task counts
by its number of questions. The figures of each single task stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_mtbi.evaluation.figures import AnsweredSet, Resampling, SystemAnswers, describe
from nemo_mtbi.evaluation.items import Item
from nemo_mtbi.evaluation.questions import GROUPS, NEW_TASKS, SEEN
from nemo_mtbi.metrics.corpus import ERROR_KINDS, SCORERS, cer, normalize, wer

_VALUES_ONLY = Resampling(1)  # intervals are not read here


def summary(answered: AnsweredSet, figures: Mapping[str, Any], speech: str, text: str) -> dict[str, Any]:
    """Return the keys ``transcription``, ``behavior`` and ``tasks`` of ``results.json``.

    ``transcription``: ``wer`` of the speech answers of the transcription task (scored by WER or CER, seen wordings)
    against the transcript, and ``n`` utterances; ``wer`` is None if there are none. ``cer`` is there too if a task is
    scored by it. ``behavior``: for each group ``text`` and ``speech`` (share of right answers, score exactly 1, among
    the ``n_scored`` questions with a reference), ``text_score`` and ``speech_score`` (mean scores of the same
    questions), ``ratio`` (``speech / text``), ``agreement`` (share of questions whose two answers are equal),
    ``token_f1`` (mean, of the speech answer against the text answer) and ``n``. A figure without a question behind it
    is None. ``tasks``: the same over all questions of a task, with ``scoring``, ``heldout`` and the figures of each of
    its ``groups``.

    Args:
        answered: The answers, of one seed.
        figures: The ``systems`` of their set in the results.
        speech: Name of the speech system.
        text: Name of the text system.
    """
    tasks = sorted({item.task for item in answered.chosen.items})
    return {
        "transcription": _transcription(answered, answered.systems[speech]),
        "behavior": {group: _row(figures[speech].get(group), figures[text].get(group)) for group in GROUPS},
        "tasks": {task: _task(task, answered, figures, speech, text) for task in tasks},
    }


def _row(speech: Mapping[str, Any] | None, text: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the values of one group or task."""
    row = {
        "text": _value(text, "right"),
        "speech": _value(speech, "right"),
        "ratio": _value(speech, "behavior_gap"),
        "text_score": _value(text, "score"),
        "speech_score": _value(speech, "score"),
        "agreement": _value(speech, "agreement"),
        "token_f1": _value(speech, "token_f1"),
    }
    counts = speech or {}
    return {**row, "n": counts.get("n", 0), "n_scored": counts.get("n_scored", 0)}


def _value(figures: Mapping[str, Any] | None, key: str) -> float | None:
    return figures[key]["value"] if figures and key in figures else None


def _task(task: str, answered: AnsweredSet, figures: Mapping[str, Any], speech: str, text: str) -> dict[str, Any]:
    mine, reference = (answered.systems[name].of_task(task) for name in (speech, text))
    groups = [group for group in GROUPS if any(item.group == group for item in mine.items)]
    pooled = [
        describe(answered.chosen, asked, twin, None, _VALUES_ONLY, in_tasks=False)
        for asked, twin in ((mine, reference), (reference, None))
    ]
    by_group = {group: _row(*(figures[name][group]["tasks"][task] for name in (speech, text))) for group in groups}
    kind = _scoring(mine.items[0])
    return {"scoring": kind, "heldout": NEW_TASKS in groups, **_row(*pooled), "groups": by_group}


def _scoring(item: Item) -> str:
    """Return the kind of scoring of an item's task; see ``items.metrics_of``."""
    return next(name for name in item.metrics if name in SCORERS)


def _transcription(answered: AnsweredSet, speech: SystemAnswers) -> dict[str, Any]:
    said, written, kinds = [], [], set()
    for item, answer in zip(speech.items, speech.answers(0), strict=True):
        transcript = answered.chosen.clips[item.clip].transcript or ""
        # a task scored by an error rate against something else than the transcript, such as a translation, is none
        is_said = item.reference is None or normalize(item.reference) == normalize(transcript)
        if item.group == SEEN and _scoring(item) in ERROR_KINDS and is_said:
            said.append(transcript)
            written.append(answer)
            kinds.add(_scoring(item))
    rates = {"wer": wer(said, written) if said else None, "n": len(said)}
    return {**rates, "cer": cer(said, written)} if "cer" in kinds else rates
