# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation: scores of each system, its distance from the text, and comparisons of systems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_mtbi.evaluation.items import EvalSet, Item, Reply, find_metric, is_transcription
from nemo_mtbi.metrics.behavior import (
    agreement,
    anchor_bias,
    behavior_gap,
    forgetting_rate,
    mean_kl,
    prompt_spread,
    prompt_worst,
    text_f1,
    uncrossed_tasks,
)
from nemo_mtbi.metrics.corpus import ERROR_KINDS
from nemo_mtbi.metrics.statistics import bootstrap, compare, holm, seed_spread
from nemo_mtbi.metrics.tally import Tally, mean, mean_tally, pooled


@dataclass(frozen=True)
class SystemAnswers:
    """The answers of a system to some questions.

    Attributes:
        items: The questions.
        seeds: For each seed of the system its answers, in the order of ``items``.
    """

    items: Sequence[Item]
    seeds: Sequence[Sequence[Reply]]

    def where(self, keep: Callable[[Item], bool]) -> SystemAnswers:
        """Return the questions that pass, with their answers."""
        kept = [index for index, item in enumerate(self.items) if keep(item)]
        return SystemAnswers([self.items[i] for i in kept], [[replies[i] for i in kept] for replies in self.seeds])

    def in_group(self, group: str) -> SystemAnswers:
        """Return the questions of one group, with their answers."""
        return self.where(lambda item: item.group == group)

    def of_task(self, task: str) -> SystemAnswers:
        """Return the questions of one task, with their answers."""
        return self.where(lambda item: item.task == task)

    def scored(self) -> SystemAnswers:
        """Return the questions that have a right answer and a metric, with their answers."""
        return self.where(lambda item: item.reference is not None and bool(item.metrics))

    def answers(self, seed: int) -> list[str]:
        """Return the texts of one seed's answers; a system with fewer seeds than another repeats them."""
        return [reply.answer for reply in self.seeds[seed % len(self.seeds)]]


@dataclass(frozen=True)
class Resampling:
    """Parameters of bootstrap and permutation tests."""

    resamples: int = 2000
    seed: int = 0


def score(items: Sequence[Item], answers: Sequence[str], name: str | None = None) -> Tally:
    """Score answers, each by the first metric of its item or by the one named.

    Raises:
        ValueError: there is nothing to score, or metrics that are no means of points are mixed.
    """
    names = [name or item.metrics[0] for item in items]
    if len(set(names)) == 1:
        return find_metric(names[0]).tally([item.reference for item in items], answers)
    rows, abstained = np.zeros((len(items), 2)), np.zeros(len(items), dtype=bool)
    for kind in sorted(set(names)):
        where = [index for index, other in enumerate(names) if other == kind]
        tally = find_metric(kind).tally([items[i].reference for i in where], [answers[i] for i in where])
        if not is_share(kind):
            raise ValueError(f"{kind} can't be averaged with {', '.join(sorted(set(names) - {kind}))}")
        rows[where], abstained[where] = tally.rows, tally.abstained
    return Tally("score", rows, mean, abstained=abstained)


def is_share(name: str) -> bool:
    """Return whether a metric is a mean of points from 0 to 1, of which more is better."""
    chosen = find_metric(name)
    return chosen.combine is mean and chosen.higher_is_better and chosen.scale == 1.0


def right(scores: Tally) -> Tally:
    """Return the share of items that have all of their points."""
    points = scores.rows[:, 0] == scores.rows[:, 1]
    return mean_tally("right", points, abstained=scores.abstained)


def figure(tallies: Sequence[Tally], utterances: Sequence[str], resampling: Resampling) -> dict[str, Any]:
    """Return one figure over all seeds: value, bootstrap interval over utterances, spread over seeds.

    Args:
        tallies: One for each seed, over the same items.
        utterances: Of each item.
        resampling: Of the bootstrap.

    Returns:
        ``value, low, high, flat, n, left_out`` and ``seeds``: value of each, mean, deviation, low, high.
    """
    whole = pooled(tallies)
    interval = bootstrap(whole, list(utterances) * len(tallies), resamples=resampling.resamples, seed=resampling.seed)
    bounds = {"value": interval.value, "low": interval.low, "high": interval.high, "flat": interval.flat}
    return {**bounds, "n": len(whole), "left_out": whole.left_out, "seeds": spread(tallies)}


def spread(tallies: Sequence[Tally]) -> dict[str, Any]:
    """Return the spread of a figure over seeds; None where it is undefined for one of them."""
    values = [tally.value for tally in tallies]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"values": values, "mean": None, "deviation": None, "low": None, "high": None}
    return {"values": values, **{key: value for key, value in asdict(seed_spread(known)).items() if key != "seeds"}}


def over_seeds(tallies: Sequence[Tally]) -> dict[str, Any]:
    """Return a figure whose bootstrap interval would be biased: the mean over seeds and their spread alone."""
    seeds = spread(tallies)
    return {
        "value": seeds["mean"],
        "low": seeds["low"],
        "high": seeds["high"],
        "flat": False,
        "n": len(tallies[0]),
        "left_out": 0,
        "seeds": seeds,
    }


def describe(
    chosen: EvalSet,
    own: SystemAnswers,
    text: SystemAnswers | None,
    bare: Sequence[str] | None,
    resampling: Resampling,
    in_tasks: bool = True,
) -> dict[str, Any]:
    """Return all figures of a system on the questions of one group or task.

    Args:
        chosen: The set.
        own: The answers of the system.
        text: The answers of the text system to the same questions; None where there is none.
        bare: Its answers to the bare transcript of each question; None likewise.
        resampling: Of intervals.
        in_tasks: Whether to add the figures of each task.
    """
    utterances = [chosen.clips[item.clip].id for item in own.items]
    figures: dict[str, Any] = {"n": len(own.items), "utterances": len(set(utterances)), "seeds": len(own.seeds)}
    replies = [reply for seed in own.seeds for reply in seed]
    figures["truncated"] = sum(reply.truncated for reply in replies)
    figures["unheard"] = sum(reply.unheard is not None for reply in replies)
    figures["tokens"] = sum(reply.tokens for reply in replies)
    figures["empty"] = sum(not reply.answer.strip() for reply in replies)
    figures |= _scores(chosen, own, text, resampling)
    if text is not None:
        figures |= _behavior(utterances, own, text, bare, resampling)
    if in_tasks:
        figures |= _transcription(chosen, own, resampling)
        figures["tasks"] = {}
        for task in sorted({item.task for item in own.items}):
            mine, twin = own.of_task(task), text and text.of_task(task)
            figures["tasks"][task] = describe(chosen, mine, twin, None, resampling, in_tasks=False)
    return figures


def _scores(chosen: EvalSet, own: SystemAnswers, text: SystemAnswers | None, resampling: Resampling) -> dict[str, Any]:
    """Return the figures that need right answers."""
    scored = own.scored()
    figures: dict[str, Any] = {"n_scored": len(scored.items), "metrics": {}}
    if not scored.items:
        return figures
    utterances = [chosen.clips[item.clip].id for item in scored.items]
    count = range(len(scored.seeds))
    if all(is_share(item.metrics[0]) for item in scored.items):
        scores = [score(scored.items, scored.answers(seed)) for seed in count]
        rights = [right(tally) for tally in scores]
        figures["abstained"] = sum(tally.abstentions for tally in scores)
        figures["score"] = figure(scores, utterances, resampling)
        figures["right"] = figure(rights, utterances, resampling)
        tasks, wordings = [item.task for item in scored.items], [item.prompt for item in scored.items]
        if any(len({i.prompt for i in scored.items if i.task == task}) > 1 for task in set(tasks)):
            figures["prompt_worst"] = over_seeds([prompt_worst(tally, tasks, wordings) for tally in rights])
            figures["prompt_spread"] = over_seeds([prompt_spread(tally, tasks, wordings) for tally in rights])
            figures["uncrossed"] = sorted(uncrossed_tasks(tasks, wordings, utterances))
            figures["wordings"] = wording_scores(scored, rights)
        if text is not None:
            read = text.scored()
            base = [right(score(scored.items, read.answers(seed))) for seed in count]
            for measure in (behavior_gap, forgetting_rate):
                tallies = [measure(a, b) for a, b in zip(base, rights, strict=True)]
                figures[measure.__name__] = figure(tallies, utterances, resampling)
    for name in sorted({name for item in scored.items for name in item.metrics}):
        figures["metrics"][name] = _metric(chosen, scored, name, resampling)
    return figures


def _metric(chosen: EvalSet, scored: SystemAnswers, name: str, resampling: Resampling) -> dict[str, Any]:
    """Return the figure of one metric over the items that name it."""
    part = scored.where(lambda item: name in item.metrics)
    where = [chosen.clips[item.clip].id for item in part.items]
    tallies = [score(part.items, part.answers(seed), name) for seed in range(len(part.seeds))]
    return figure(tallies, where, resampling) | {"abstained": sum(tally.abstentions for tally in tallies)}


def _transcription(chosen: EvalSet, own: SystemAnswers, resampling: Resampling) -> dict[str, Any]:
    """Return the error rates of the answers that should be the transcript; nothing where there are none."""
    part = own.where(lambda item: is_transcription(item, chosen.clips[item.clip].transcript))
    if not part.items:
        return {}
    where = [chosen.clips[item.clip].id for item in part.items]
    count = range(len(part.seeds))
    rates = {name: [score(part.items, part.answers(seed), name) for seed in count] for name in ERROR_KINDS}
    return {"transcription": {name: figure(tallies, where, resampling) for name, tallies in rates.items()}}


def wording_scores(own: SystemAnswers, rights: Sequence[Tally]) -> list[dict[str, Any]]:
    """Return the share of right answers under each wording of each task, over all seeds."""
    points: dict[tuple[str, str], list[float]] = {}
    for tally in rights:
        for item, value in zip(own.items, tally.rows[:, 0], strict=True):
            points.setdefault((item.task, item.prompt), []).append(value)
    return [
        {"task": task, "prompt": prompt, "right": math.fsum(values) / len(values)}
        for (task, prompt), values in sorted(points.items())
    ]


def _behavior(
    utterances: Sequence[str],
    own: SystemAnswers,
    text: SystemAnswers,
    bare: Sequence[str] | None,
    resampling: Resampling,
) -> dict[str, Any]:
    """Return the figures against the answers to the text; they need no right answers."""
    pairs = [(text.answers(seed), own.answers(seed)) for seed in range(len(own.seeds))]
    figures = {
        "agreement": figure([agreement(*pair) for pair in pairs], utterances, resampling),
        "token_f1": figure([text_f1(*pair) for pair in pairs], utterances, resampling),
    }
    measured = [[_divergence(reply) for reply in replies] for replies in own.seeds]
    compared = [i for i in range(len(own.items)) if all(pairs[i] is not None for pairs in measured)]
    if compared:
        known = [[pair for i in compared if (pair := pairs[i]) is not None] for pairs in measured]
        kls = [mean_kl([kl for kl, _ in pairs], [tokens for _, tokens in pairs]) for pairs in known]
        figures["mean_kl"] = figure(kls, [utterances[i] for i in compared], resampling)
    if bare is not None and any(item.prompt for item in own.items):
        prompted = [index for index, item in enumerate(own.items) if item.prompt]
        unprompted = [bare[i] for i in prompted]
        biases = [anchor_bias([a[i] for i in prompted], unprompted, [b[i] for i in prompted]) for a, b in pairs]
        figures["anchor_bias"] = figure(biases, [utterances[i] for i in prompted], resampling)
    return figures


def _divergence(reply: Reply) -> tuple[float, int] | None:
    """Return the KL divergence of a reply and its number of tokens; None where it was not measured."""
    if reply.divergence is None or reply.divergence.kl is None:
        return None
    return reply.divergence.kl, reply.divergence.tokens


def comparisons(
    chosen: EvalSet,
    systems: Mapping[str, SystemAnswers],
    pairs: Sequence[tuple[str, str]],
    texts: Mapping[str, str | None],
    resampling: Resampling,
) -> list[dict[str, Any]]:
    """Return the differences between systems, group by group: of right answers, and of agreement with the text.

    Args:
        chosen: The set.
        systems: Their answers.
        pairs: Each a system and the one that is subtracted from it.
        texts: The text system that each agrees with, or None.
        resampling: Of intervals and tests.

    Returns:
        A row for each measure, group and pair; p-values corrected by Holm over all systems from which the same one
        is subtracted, by measure and group.
    """
    rows: list[dict[str, Any]] = []
    for measure in ("agreement", "right"):
        compared = (
            _compared(chosen, systems, pair, group, measure, texts, resampling)
            for group in sorted({item.group for item in chosen.items})
            for pair in pairs
            if set(pair) <= set(systems)
        )
        rows += [row for row in compared if row is not None]
    return [{**row, "p_holm": p_holm} for row, p_holm in zip(rows, _corrected(rows), strict=True)]


def _corrected(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the p-values by Holm, each family of tests apart."""
    families: dict[tuple[str, ...], dict[str, float]] = {}
    keys = [tuple(row[name] for name in ("measure", "group", "against")) for row in rows]
    for row, key in zip(rows, keys, strict=True):
        if row["p"] is not None:
            families.setdefault(key, {})[row["system"]] = row["p"]
    adjusted = {key: holm(family) for key, family in families.items()}
    return [adjusted.get(key, {}).get(row["system"]) for row, key in zip(rows, keys, strict=True)]


def _compared(
    chosen: EvalSet,
    systems: Mapping[str, SystemAnswers],
    pair: tuple[str, str],
    group: str,
    measure: str,
    texts: Mapping[str, str | None],
    resampling: Resampling,
) -> dict[str, Any] | None:
    """Return one difference; None where the measure is not defined for both."""
    measured = []
    for name in pair:
        in_group = systems[name].in_group(group)
        if measure == "right":
            tallies = _rights(in_group)
        else:
            text = systems.get(texts.get(name) or "")
            tallies = _agreements(in_group, text.in_group(group)) if text else None
        if tallies is None:
            return None
        measured.append(tallies)
    # a paired test needs as many answers of both systems to each question
    times = math.lcm(*(len(tallies) for _, tallies in measured))
    a, b = (pooled(tallies * (times // len(tallies))) for _, tallies in measured)
    utterances = [chosen.clips[item.clip].id for item in measured[0][0]] * times
    result = compare(a, b, utterances, resamples=resampling.resamples, seed=resampling.seed)
    interval = result.difference
    row = {"measure": measure, "group": group, "system": pair[0], "against": pair[1], "difference": interval.value}
    row |= {"low": interval.low, "high": interval.high, "flat": interval.flat}
    return {**row, "p": result.p_value, "exact": result.exact}


def _agreements(own: SystemAnswers, text: SystemAnswers) -> tuple[Sequence[Item], list[Tally]] | None:
    if not own.items:
        return None
    return own.items, [agreement(text.answers(seed), own.answers(seed)) for seed in range(len(own.seeds))]


def _rights(own: SystemAnswers) -> tuple[Sequence[Item], list[Tally]] | None:
    scored = own.scored()
    if not scored.items or not all(is_share(item.metrics[0]) for item in scored.items):
        return None
    return scored.items, [right(score(scored.items, scored.answers(seed))) for seed in range(len(scored.seeds))]


@dataclass(frozen=True)
class AnsweredSet:
    """A set with all answers to it.

    Attributes:
        chosen: The set.
        systems: Answers by system; a text system is not there where transcripts are missing.
        bare: For each text system its answers to the transcripts without a prompt, by index of the utterance.
    """

    chosen: EvalSet
    systems: Mapping[str, SystemAnswers]
    bare: Mapping[str, Mapping[int, str]]
