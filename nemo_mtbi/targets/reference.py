# SPDX-License-Identifier: Apache-2.0
"""Targets that are right answers instead of the LLM's own: multi-task fine-tuning, which MTBI is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.data.behaviors import CHAT_FORMAT, Behavior, custom_value
from nemo_mtbi.targets.plan import TargetPlan
from nemo_mtbi.targets.store import shard_path, with_behaviors, write_shard
from nemo_mtbi.targets.tasks import TaskPool

REFERENCES = "references"  # custom field of a cut: task -> right answer


def reference_targets(
    cuts: Iterable[Cut],
    out_dir: Path,
    *,
    pool: TaskPool,
    chat: ChatFormat,
    llm: str,
    plan: TargetPlan,
    wording: str = "{}",
) -> Path:
    """Write cuts whose behaviors are their right answers to the tasks and wordings that ``plan`` draws.

    Args:
        cuts: with the custom field ``references``.
        out_dir: folder of the one shard; made if it is missing.
        pool: tasks and wordings.
        chat: of the LLM that will be trained with.
        llm: its fingerprint: the answers are not its own, but they are read in its format.
        plan: which tasks and wordings are drawn for each cut.
        wording: how an answer is put, which stands in place of ``{}``.

    Returns:
        The shard; one that is there already is left as it is.

    Raises:
        ValueError: if a cut has no right answer to a task that is drawn for it.
    """
    path = shard_path(out_dir, 0)
    if path.exists():
        return path
    origin: dict[str, Any] = {
        "llm": llm,
        "chat": chat.fingerprint(),
        "pool": pool.fingerprint(),
        "responses": "reference",
    }
    origin[CHAT_FORMAT] = chat.description()
    tasks = plan.tasks(pool)

    def answered(cut: Cut) -> Cut:
        right = custom_value(cut, REFERENCES) or {}
        rows = []
        for task, prompt in plan.draws(cut.id, tasks):
            if task.name not in right:
                raise ValueError(
                    f"cut {cut.id} has no right answer to task '{task.name}' in its field {REFERENCES}: leave the "
                    "task out of data.train_tasks, or set data.targets: behavior"
                )
            rows.append(Behavior(task.name, prompt, wording.replace("{}", right[task.name])).to_dict())
        return with_behaviors(cut, rows, origin)

    out_dir.mkdir(parents=True, exist_ok=True)
    write_shard(path, map(answered, cuts))
    return path
