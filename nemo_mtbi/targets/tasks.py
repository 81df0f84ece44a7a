# SPDX-License-Identifier: Apache-2.0
"""Task pools: tasks about an utterance, their wordings, and how the answer is scored.

A pool is a YAML file that users can write themselves::

    name: my_pool
    tasks:
      - name: transcribe
        scoring: wer              # cer for languages without spaces between words
        split: train              # train: the connector learns on it; heldout: only evaluated
        prompts:
          train: [repeat the sentence, say it again]
          heldout: [what was said?]   # wordings that are only evaluated
        max_new_tokens: 64        # optional
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_mtbi.config.checks import OneOf
from nemo_mtbi.io.seeds import stable_rng
from nemo_mtbi.io.text import read_text
from nemo_mtbi.metrics.scorers import SCORERS

# Names only: the scorers live in nemo_mtbi/metrics/corpus.py.
SPLITS = ("train", "heldout")

_POOL_KEYS = ("name", "tasks")
_TASK_KEYS = ("name", "scoring", "split", "prompts", "max_new_tokens")
_TASK_REQUIRED = ("name", "scoring", "split", "prompts")


@dataclass(frozen=True)
class Task:
    """One behavior of the LLM.

    Attributes:
        name: Unique name in its pool.
        scoring: A key of :data:`nemo_mtbi.metrics.scorers.SCORERS`.
        heldout: True if the task is never trained on.
        prompts: Wordings that may be trained on; the empty string is a legal prompt.
        heldout_prompts: Wordings that are only evaluated.
        max_new_tokens: Length limit of a response in tokens; None leaves it to the caller.

    Raises:
        ValueError: If a field is not legal; the message names the task and the remedy.
    """

    name: str
    scoring: str
    heldout: bool
    prompts: tuple[str, ...]
    heldout_prompts: tuple[str, ...] = ()
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a task needs a non-empty string as its name, got {self.name!r}")
        where = f"task '{self.name}'"
        OneOf(registry=SCORERS).check(f"{where}: scoring", self.scoring)
        if not self.prompts:
            raise ValueError(f"{where}: no train prompt; add at least one wording under prompts.train")
        wordings = self.prompts + self.heldout_prompts
        for prompt in wordings:
            if not isinstance(prompt, str):
                raise ValueError(f"{where}: prompt {prompt!r} is not a string; put it in quotes")
        for prompt in wordings:
            if wordings.count(prompt) > 1:
                raise ValueError(
                    f"{where}: prompt {prompt!r} stands twice; a wording belongs to prompts.train or to"
                    " prompts.heldout, once: remove the other one"
                )
        limit = self.max_new_tokens
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"{where}: max_new_tokens must be a whole number ≥ 1 or left out, got {limit!r}")


@dataclass(frozen=True)
class TaskPool:
    """An ordered set of tasks with unique names.

    Raises:
        ValueError: If there is no task, or two have the same name.
    """

    name: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError(f"task pool '{self.name}' has no task; add at least one under 'tasks'")
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"duplicate task name '{name}' (task pool '{self.name}'); rename or remove one of them"
                )

    @classmethod
    def from_yaml(cls, path: str | Path) -> TaskPool:
        """Read a pool from a YAML file (see the module's docstring for the form).

        Raises:
            ValueError: If the file is missing, does not parse, or holds an illegal pool; the message names the file.
        """
        path = Path(path)
        try:
            text = read_text(path)
        except ValueError as err:
            raise ValueError(f"{path}: cannot read the task pool ({err}); give the path of a YAML text file") from err
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as err:
            raise ValueError(f"{path}: not valid YAML; correct the place named here: {err}") from err
        return cls.from_dict(data, default_name=path.stem, source=str(path))

    @classmethod
    def from_dict(cls, data: Any, default_name: str = "pool", source: str = "task pool") -> TaskPool:
        """Build a pool from plain containers.

        Args:
            data: ``{name?, tasks: [...]}`` as in the YAML form.
            default_name: Name of the pool where ``data`` holds none.
            source: What error messages call the origin of ``data``.

        Raises:
            ValueError: If the content is illegal.
        """
        try:
            _check_keys(data, _POOL_KEYS, ("tasks",), "the task pool")
            if not isinstance(data["tasks"], list):
                raise ValueError(f"'tasks' must be a list of tasks, got {type(data['tasks']).__name__}")
            tasks = tuple(_parse_task(item, number) for number, item in enumerate(data["tasks"], start=1))
            return cls(name=str(data.get("name", default_name)), tasks=tasks)
        except ValueError as err:
            raise ValueError(f"{source}: {err}") from err

    def __getitem__(self, name: str) -> Task:
        for task in self.tasks:
            if task.name == name:
                return task
        known = ", ".join(task.name for task in self.tasks)
        raise KeyError(f"no task '{name}' in task pool '{self.name}'; it has: {known}")

    @property
    def train(self) -> tuple[Task, ...]:
        """Tasks that may be trained on, in the pool's order."""
        return tuple(task for task in self.tasks if not task.heldout)

    @property
    def heldout(self) -> tuple[Task, ...]:
        """Tasks that are only evaluated, in the pool's order."""
        return tuple(task for task in self.tasks if task.heldout)

    def subset(self, names: Iterable[str]) -> TaskPool:
        """Return the pool with only the tasks in ``names``, in the pool's order.

        Raises:
            ValueError: If a name is unknown or ``names`` is empty or one string.
        """
        if isinstance(names, str):
            raise ValueError(f"give a list of task names, not the string {names!r}")
        wanted = set(names)
        known = [task.name for task in self.tasks]
        unknown = sorted(wanted.difference(known))
        if unknown:
            raise ValueError(f"no task {', '.join(unknown)} in task pool '{self.name}'; it has: {', '.join(known)}")
        return TaskPool(self.name, tuple(task for task in self.tasks if task.name in wanted))

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the tasks in their order, on which draws depend, without the pool's name."""
        content = [
            [t.name, t.scoring, t.heldout, list(t.prompts), list(t.heldout_prompts), t.max_new_tokens]
            for t in self.tasks
        ]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def draw_tasks(pool_tasks: Sequence[Task], k: int, *key: Any) -> list[Task]:
    """Draw ``k`` distinct tasks as a pure function of ``key``; all of them, in order, if they are at most ``k``.

    Raises:
        ValueError: If ``k`` is negative.
    """
    if k < 0:
        raise ValueError(f"the number of tasks to draw must be ≥ 0, got {k}")
    if k >= len(pool_tasks):
        return list(pool_tasks)
    return stable_rng("tasks", *key).sample(list(pool_tasks), k)


def draw_prompt(prompts: Sequence[str], *key: Any) -> str:
    """Draw one wording as a pure function of ``key``.

    Raises:
        ValueError: If there is no wording to draw from.
    """
    if not prompts:
        raise ValueError("no prompt to draw from; the task has no wording in this split")
    return stable_rng("prompt", *key).choice(list(prompts))


def _check_keys(data: Any, known: Sequence[str], required: Sequence[str], where: str) -> None:
    """Raise ValueError unless ``data`` is a mapping with all required keys and no unknown one."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(known)}, got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; the known keys are {', '.join(known)}")
    for key in required:
        if key not in data:
            raise ValueError(f"{where}: key '{key}' is missing; the required keys are {', '.join(required)}")


def _parse_task(item: Any, number: int) -> Task:
    name = item.get("name") if isinstance(item, Mapping) else None
    where = f"task '{name}'" if name else f"task number {number}"
    _check_keys(item, _TASK_KEYS, _TASK_REQUIRED, where)
    OneOf(*SPLITS).check(f"{where}: split", item["split"])
    prompts = item["prompts"]
    _check_keys(prompts, SPLITS, (), f"{where}, prompts")
    wordings = {}
    for split in SPLITS:
        value = prompts.get(split)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{where}: prompts.{split} must be a list of strings, got {type(value).__name__}")
        wordings[split] = tuple(value or ())
    return Task(
        name=item["name"],
        scoring=item["scoring"],
        heldout=item["split"] == "heldout",
        prompts=wordings["train"],
        heldout_prompts=wordings["heldout"],
        max_new_tokens=item.get("max_new_tokens"),
    )
