# SPDX-License-Identifier: Apache-2.0
"""A task pool of two trained tasks, one without a wording, and a held-out one."""

from nemo_mtbi.targets.tasks import TaskPool

SEEN_WORDS = {"say": ["say it", "repeat it", "once more"], "first": ["first word", "the first"], "bare": [""]}
NEW_WORDS = {"say": ["what was that", "pardon"], "first": ["begin"], "bare": []}
POOL = TaskPool.from_dict(
    {
        "tasks": [
            {
                "name": name,
                "scoring": "wer" if name == "say" else "exact",
                "split": "train",
                "prompts": {"train": SEEN_WORDS[name], "heldout": NEW_WORDS[name]},
            }
            for name in SEEN_WORDS
        ]
        + [
            {
                "name": "last",
                "scoring": "exact",
                "split": "heldout",
                "prompts": {"train": ["last word", "the end"], "heldout": ["never asked"]},
            }
        ]
    }
)
