# SPDX-License-Identifier: Apache-2.0
"""Measures of behavior: the answers of a speech LLM to speech against those of the same LLM to the text.

Every measure is a :class:`~nemo_mtbi.metrics.tally.Tally`: its value, and counts of each item to resample.
"""

from collections.abc import Callable, Hashable, Sequence, Sized

import numpy as np

from nemo_mtbi.metrics.abstention import is_empty
from nemo_mtbi.metrics.scorers import exact, token_f1
from nemo_mtbi.metrics.tally import Tally, divide, mean_tally


def agreement(text: Sequence[str], speech: Sequence[str]) -> Tally:
    """Return the share of items whose two answers are equal after folding whitespace.

    Args:
        text: The LLM's answers to the transcripts.
        speech: Its answers to the speech of the same items.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    return _compared("agreement", exact, text, speech)


def text_f1(text: Sequence[str], speech: Sequence[str]) -> Tally:
    """Return the mean token F1 of the answer to speech against the answer to text (see :func:`agreement`)."""
    return _compared("token_f1", token_f1, text, speech)


def mean_kl(divergences: Sequence[float], tokens: Sequence[int]) -> Tally:
    """Return the mean KL divergence from the text twin, in nats for each teacher token.

    Args:
        divergences: For each item the mean over its teacher tokens.
        tokens: For each item how many these are; a long answer counts by its length, as in the loss.

    Raises:
        ValueError: the lists differ in length or are empty, a divergence is not finite or is below 0 by more than
            rounding, or an item has no token.
    """
    values, counts = np.asarray(divergences, dtype=np.float64), np.asarray(tokens)
    if (values < -1e-4).any():
        raise ValueError(f"a KL divergence of {values.min():.3g} is below 0: pass means of log(p/q) under p")
    if (counts < 1).any():
        raise ValueError("an item without teacher tokens has no divergence: leave it out")
    return mean_tally("mean_kl", divergences, tokens, higher_is_better=False)


def behavior_gap(text: Tally, speech: Tally) -> Tally:
    """Return the score of speech divided by the score of text: 1 if speech loses nothing.

    Undefined (None) where the LLM scores 0 on text: there is no behavior to imitate then, whatever speech scores.

    Args:
        text: The LLM's answers to the transcripts, scored by any metric of which more is better.
        speech: Its answers to the speech of the same items, scored by the same metric.

    Raises:
        ValueError: the two are of different metrics or numbers of items, or less is better.
    """
    return _ratio("behavior_gap", text, speech, offset=0.0)


def forgetting_rate(text: Tally, speech: Tally) -> Tally:
    """Return Δ of Speech-IFEval: ``(speech - text) / text``, negative where speech loses; see :func:`behavior_gap`."""
    return _ratio("forgetting_rate", text, speech, offset=-1.0)


def prompt_worst(scores: Tally, tasks: Sequence[Hashable], wordings: Sequence[Hashable]) -> Tally:
    """Return the score under the worst wording of a task, as a mean over tasks.

    The worst of noisy scores is worse than their true worst, and more so in a resample: a bootstrap interval leans
    to the worse side and may even leave the value out. Show the spread over seeds instead.

    Args:
        scores: One metric over all items.
        tasks: The task of each item.
        wordings: The wording that it was asked under.

    Raises:
        ValueError: the lengths differ.
    """
    extreme = np.fmin if scores.higher_is_better else np.fmax
    return _over_wordings("prompt_worst", scores, tasks, wordings, lambda figures: extreme.reduce(figures, axis=-1))


def prompt_spread(scores: Tally, tasks: Sequence[Hashable], wordings: Sequence[Hashable]) -> Tally:
    """Return the standard deviation of the score over the wordings of a task, as a mean over tasks.

    Tasks with one wording have no spread and are left out; None if there is no other. Ask every wording about the
    same utterances (:func:`uncrossed_tasks`), or the spread holds the luck of the draw too. Arguments, and a bootstrap
    interval that leans to the worse side, as in :func:`prompt_worst`.
    """
    made = _over_wordings("prompt_spread", scores, tasks, wordings, _deviation)
    return Tally(made.name, made.rows, made.combine, False, False, made.abstained, made.left_out)


def uncrossed_tasks(
    tasks: Sequence[Hashable], wordings: Sequence[Hashable], utterances: Sequence[Hashable]
) -> list[Hashable]:
    """Return the tasks whose wordings were asked about different utterances, so that their spread is partly luck."""
    questions: dict[Hashable, dict[Hashable, set[Hashable]]] = {}
    for task, wording, utterance in zip(tasks, wordings, utterances, strict=True):
        questions.setdefault(task, {}).setdefault(wording, set()).add(utterance)
    return [task for task, of_task in questions.items() if len({frozenset(ids) for ids in of_task.values()}) > 1]


def anchor_bias(
    prompted: Sequence[str], unprompted: Sequence[str], speech: Sequence[str], threshold: float = 0.5
) -> Tally:
    """Return the share of answers that obey the speech instead of the prompt.

    The answer of the LLM to the transcript without a prompt is what the speech alone asks for, its answer under the
    prompt is what the prompt asks for. An answer to the speech obeys the speech if its token F1 with the unprompted
    answer is at least ``threshold`` and above that with the prompted answer. Two kinds of items are undecided and left
    out (``left_out``): those whose two text answers reach ``threshold`` with each other, and empty answers.

    Args:
        prompted: The LLM's answers to transcript and prompt.
        unprompted: Its answers to the bare transcript.
        speech: Its answers to speech and prompt.
        threshold: Token F1 from which two answers are taken for the same; above 0, at most 1.

    Raises:
        ValueError: the lists differ in length or are empty, or the threshold is out of range.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
    _same_length("anchor_bias", prompted, unprompted)
    _same_length("anchor_bias", prompted, speech)
    silent = np.array([is_empty(answer) for answer in speech], dtype=bool)
    points, weights = [], []
    for obedient, bare, spoken, empty in zip(prompted, unprompted, speech, silent, strict=True):
        similarity = token_f1(bare, spoken)
        points.append(float(similarity >= threshold and similarity > token_f1(obedient, spoken)))
        weights.append(float(not empty and token_f1(obedient, bare) < threshold))
    return mean_tally(
        "anchor_bias", points, weights, higher_is_better=False, abstained=silent, left_out=weights.count(0.0)
    )


def _same_length(name: str, first: Sized, second: Sized) -> None:
    if len(first) != len(second):
        raise ValueError(f"{name}: {len(first)} and {len(second)} items: pass one of each for every item")


def _compared(name: str, scorer: Callable[[str, str], float], text: Sequence[str], speech: Sequence[str]) -> Tally:
    _same_length(name, text, speech)
    points = [scorer(a, b) for a, b in zip(text, speech, strict=True)]
    silent = np.array([is_empty(answer) for answer in speech], dtype=bool)
    return mean_tally(name, points, abstained=silent)


def _ratio(name: str, text: Tally, speech: Tally, offset: float) -> Tally:
    if text.name != speech.name:
        raise ValueError(f"{name} compares one metric on text and on speech, got {text.name} and {speech.name}")
    if not text.higher_is_better:
        raise ValueError(f"{name} of {text.name}: less is better there, so a ratio misleads; compare the two figures")
    if len(text) != len(speech):
        raise ValueError(f"{name}: {len(text)} items on text but {len(speech)} on speech; score the same items")
    width = text.rows.shape[1]

    def combine(sums: np.ndarray) -> np.ndarray:
        return divide(speech.combine(sums[..., width:]), text.combine(sums[..., :width])) + offset

    return Tally(
        name,
        np.concatenate([text.rows, speech.rows], axis=1),
        combine,
        per_item=False,
        abstained=speech.abstained,
        left_out=speech.left_out,
    )


def _over_wordings(
    name: str,
    scores: Tally,
    tasks: Sequence[Hashable],
    wordings: Sequence[Hashable],
    reduce: Callable[[np.ndarray], np.ndarray],
) -> Tally:
    """Return the mean over tasks of ``reduce`` of their scores ``[..., wordings]``; each wording is counted apart."""
    _same_length(name, scores.rows, tasks)
    _same_length(name, scores.rows, wordings)
    pairs = list(zip(tasks, wordings, strict=True))
    # sorted: the same bits whatever the order of the items
    order = sorted(set(pairs), key=repr)
    place = {pair: index for index, pair in enumerate(order)}
    width = scores.rows.shape[1]
    rows = np.zeros((len(pairs), len(order), width))
    for row, pair, counts in zip(rows, pairs, scores.rows, strict=True):
        row[place[pair]] = counts
    members: dict[Hashable, list[int]] = {}
    for index, (task, _) in enumerate(order):
        members.setdefault(task, []).append(index)

    def combine(sums: np.ndarray) -> np.ndarray:
        blocks = sums.reshape(*sums.shape[:-1], len(order), width)
        drawn = blocks.any(axis=-1)  # a wording that is not in a resample has no score, not a bad one
        figures = np.where(drawn, scores.combine(blocks), np.nan)
        return _present_mean(np.stack([reduce(figures[..., where]) for where in members.values()], axis=-1))

    return Tally(
        name,
        rows.reshape(len(pairs), -1),
        combine,
        scores.higher_is_better,
        per_item=False,
        abstained=scores.abstained,
        left_out=scores.left_out,
    )


def _present_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN; NaN where nothing is left."""
    present = ~np.isnan(values)
    return divide(np.where(present, values, 0.0).sum(axis=-1), present.sum(axis=-1))


def _deviation(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation (n - 1) over the last axis without NaN; NaN where fewer than two are left."""
    present = ~np.isnan(values)
    squares = np.where(present, (values - _present_mean(values)[..., None]) ** 2, 0.0).sum(axis=-1)
    return np.sqrt(divide(squares, np.maximum(present.sum(axis=-1) - 1, 0)))
