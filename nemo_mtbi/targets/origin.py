# SPDX-License-Identifier: Apache-2.0
"""The provenance of behaviors: LLM, plan, pool and chat format, and how two of these records are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_mtbi.chat.format import ChatFormat, chat_difference
from nemo_mtbi.data.behaviors import CHAT_FORMAT, PROVENANCE
from nemo_mtbi.targets.plan import TargetPlan
from nemo_mtbi.targets.tasks import TaskPool

_OWN_KEYS = ("chat", CHAT_FORMAT, "decoding", "plan", "pool")
_DRAWS = ("tasks_per_cut", "always_tasks", "prompts_per_task", "split", "wordings", "seed")


def behaviors_from(provenance: Mapping[str, Any], plan: TargetPlan, pool: TaskPool, chat: ChatFormat) -> dict:
    """Return the provenance that each cut carries beside its behaviors, in the form that JSON gives back.

    Args:
        provenance: of the caller: ``llm``, and what else is to be kept.
        plan: which tasks and wordings are drawn for each cut.
        pool: tasks and wordings.
        chat: chat format of the LLM.

    Raises:
        ValueError: if the plan does not fit the pool, or ``provenance`` lacks ``llm`` or holds what is filled in here.
    """
    plan.tasks(pool)  # raises where the plan does not fit the pool
    if not provenance.get("llm") or set(_OWN_KEYS) & set(provenance):
        raise ValueError(
            f"provenance must hold 'llm' (a hash of the LLM), but none of {', '.join(_OWN_KEYS)}, "
            f"which are filled in here; it holds {', '.join(sorted(provenance)) or 'nothing'}"
        )
    content = {
        **provenance,
        "chat": chat.fingerprint(),
        CHAT_FORMAT: chat.description(),
        "decoding": {"method": "greedy", "max_new_tokens": plan.max_new_tokens},
        "pool": pool.fingerprint(),
        "plan": {name: getattr(plan, name) for name in _DRAWS},
    }
    try:
        return json.loads(json.dumps(content, sort_keys=True))
    except TypeError as err:
        raise ValueError(f"provenance must hold JSON values only: {err}") from err


def without_format(origin: Any) -> Any:
    """Return a provenance as older versions wrote it: the chat format follows from its fingerprint."""
    return {key: origin[key] for key in origin if key != CHAT_FORMAT} if isinstance(origin, Mapping) else origin


def same_origin(one: Any, other: Any) -> bool:
    """Return whether two provenances are equal, be it with or without the chat format."""
    return without_format(one) == without_format(other)


def same_header(one: Any, other: Mapping[str, Any]) -> bool:
    """Return whether two headers of partial files are equal, apart from the chat format."""
    return isinstance(one, Mapping) and without_format({**one, PROVENANCE: without_format(one.get(PROVENANCE))}) == {
        **other,
        PROVENANCE: without_format(other[PROVENANCE]),
    }


def origin_difference(stored: Any, own: Mapping[str, Any]) -> str:
    """Return a text that names the keys in which the stored provenance of a file differs from that of this run."""
    stored = stored if isinstance(stored, Mapping) else {}
    other = [key for key, value in without_format(own).items() if stored.get(key) != value]
    formats = ""
    if "chat" in other:
        formats = chat_difference(stored.get(CHAT_FORMAT), own.get(CHAT_FORMAT), stored.get("chat"))
    what = ", ".join(other) or "cuts, transcripts, tokenizer, batch_tokens or shard_size"
    return f"was made with other {what}{f' ({formats})' if formats else ''}"
