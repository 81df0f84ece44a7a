# SPDX-License-Identifier: Apache-2.0
"""Examples of a set: questions with the answers of all systems, chosen to show agreement and disagreement."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_mtbi.evaluation.figures import AnsweredSet
from nemo_mtbi.evaluation.items import Clip
from nemo_mtbi.evaluation.settings import EvalConfig
from nemo_mtbi.io.display import printable
from nemo_mtbi.metrics.scorers import exact

_LONGEST = 300  # characters of one text in an example
_MARKUP = "\\`*_{}[]<>&|#~$"


@dataclass(frozen=True)
class Example:
    """A question with the answers of all systems.

    Attributes:
        clip: The utterance.
        task: Name of the task.
        prompt: The wording of the task.
        group: Group of the question.
        text: The answer of the text system; empty where there is none.
        speech: The answer of the speech system that is compared with it.
        reference: The right answer, or None.
        answers: The answer of each system, by name.
    """

    clip: Clip
    task: str
    prompt: str
    group: str
    text: str
    speech: str
    reference: Any
    answers: Mapping[str, str]

    @property
    def agrees(self) -> bool:
        """Whether text and speech have equal answers, after folding whitespace."""
        return exact(self.text, self.speech) == 1.0


def speech_system(answered: AnsweredSet, config: EvalConfig) -> str | None:
    """Return the first speech system that answered, or None."""
    return next((name for name in answered.systems if config.systems[name].kind == "speech"), None)


def examples_of(answered: AnsweredSet, config: EvalConfig) -> list[Example]:
    """Return all questions of a set as examples, with the answers of the first seed; none without a speech system."""
    speech = speech_system(answered, config)
    if speech is None:
        return []
    text = config.text_of(speech)
    replies = {name: given.answers(0) for name, given in answered.systems.items()}
    examples = []
    for index, item in enumerate(answered.systems[speech].items):
        answers = {name: texts[index] for name, texts in replies.items()}
        read = answers.get(text, "") if text else ""
        clip = answered.chosen.clips[item.clip]
        question = (clip, item.task, item.prompt, item.group)
        examples.append(Example(*question, read, answers[speech], item.reference, answers))
    return examples


def pick_examples(examples: Sequence[Example], k: int) -> list[Example]:
    """Return up to k examples: half of them disagreements where there are that many, then agreements.

    Groups, tasks and utterances are spread as far as possible; the choice depends on the examples, not on their order.
    """
    ordered = sorted(examples, key=_random_key)
    differing = [example for example in ordered if not example.agrees]
    equal = [example for example in ordered if example.agrees]
    wanted = min(len(differing), max(k // 2, k - len(equal)))
    agreements = _spread(equal, k - wanted, [])
    return _spread(differing, wanted, agreements) + agreements


def examples_markdown(examples: Sequence[Example], k: int = 6) -> str:
    """Return k examples (see :func:`pick_examples`) as a Markdown table, as TensorBoard's text tab shows it."""
    lines = ["| transcript | prompt | answer to text | answer to speech | same |", "|---|---|---|---|---|"]
    for example in pick_examples(examples, k):
        texts = (example.clip.transcript or "", example.prompt, example.text, example.speech)
        cells = [_markdown(displayed(text)) for text in texts]
        lines.append(f"| {' | '.join(cells)} | {'yes' if example.agrees else '**no**'} |")
    return "\n".join(lines) + "\n"


def displayed(text: str) -> str:
    """Return a text without control characters (a model may write any), cut where it is long."""
    text = "".join("�" if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() else c for c in text)
    text = printable("\n".join(line.strip() for line in text.strip().splitlines()))
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " [...]"
    return text or "(empty)"


def _random_key(example: Example) -> str:
    parts = (example.clip.id, example.task, example.prompt, example.group, example.text, example.speech)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _spread(candidates: Sequence[Example], k: int, before: Sequence[Example]) -> list[Example]:
    """Return k candidates, each the one whose group, task and utterance were picked least often so far."""
    left, picked = list(candidates), list[Example]()
    for _ in range(min(k, len(left))):
        all_picked = [*before, *picked]
        best = min(
            range(len(left)),
            key=lambda i: (
                sum(other.group == left[i].group for other in all_picked),
                sum(other.task == left[i].task for other in all_picked),
                sum(other.clip.id == left[i].clip.id for other in all_picked),
                i,
            ),
        )
        picked.append(left.pop(best))
    return picked


def _markdown(text: str) -> str:
    # character references stay text in every Markdown dialect, also where a backslash would not help (tables)
    escaped = "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in text)
    return escaped.replace("\n", "<br>")
