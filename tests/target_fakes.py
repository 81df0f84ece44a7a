# SPDX-License-Identifier: Apache-2.0
"""What the tests of target generation share; run as a script it is the process that they kill."""

import hashlib
import json
import sys
import time
from pathlib import Path

from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.targets.generate import TargetPlan, generate_targets
from nemo_mtbi.targets.tasks import TaskPool

PROVENANCE = {"llm": "hash-of-an-llm"}
PLAN = TargetPlan(tasks_per_cut=3, prompts_per_task=2, split="all", max_new_tokens=12, batch_tokens=150, seed=7)
POOL = TaskPool.from_dict(
    {
        "tasks": [
            {"name": "say", "scoring": "wer", "split": "train", "prompts": {"train": ["say", "repeat it", ""]}},
            {
                "name": "keys",
                "scoring": "f1",
                "split": "train",
                "prompts": {"train": ["keywords", "what matters"], "heldout": ["core"]},
                "max_new_tokens": 4,
            },
            {"name": "first", "scoring": "exact", "split": "train", "prompts": {"train": ["first", "start"]}},
            {"name": "last", "scoring": "exact", "split": "heldout", "prompts": {"train": ["last"]}},
        ]
    }
)


class Characters:
    """A tokenizer whose token ids are code points; two special tokens."""

    special = {"<user>": 1, "<end>": 2}

    def token_to_id(self, token):
        return self.special.get(token, ord(token) if len(token) == 1 else None)

    def text_to_ids(self, text):
        return [ord(character) for character in text]

    def ids_to_text(self, ids):
        return "".join(chr(i) for i in ids)


CHAT = ChatFormat(turn=("<user>", "{audio}", "|", "{prompt}"), end="<end>", tokenizer=Characters())


def answer(layout):
    """Depends on the prompt alone: some answers are empty, some reach the limit, some are both (a cut line feed)."""
    digest = hashlib.sha256(json.dumps(layout).encode()).digest()
    length = digest[0] % (PLAN.max_new_tokens + 1)
    if digest[1] % 8 == 0:
        return [ord(" ")] * PLAN.max_new_tokens, True
    return [ord("a") + byte % 26 for byte in digest[2 : 2 + length]], length == PLAN.max_new_tokens


class FakeLLM:
    """Answers batch by batch; dies before batch number ``fatal``."""

    def __init__(self, fatal=None, delay=0.0):
        self.fatal, self.delay, self.batches = fatal, delay, []

    def __call__(self, batch):
        time.sleep(self.delay)
        if len(self.batches) == self.fatal:
            raise KeyboardInterrupt
        self.batches.append(batch)
        return [answer(layout) for layout in batch]


def make_cuts(count=10, texts=()):
    cuts = []
    for n in range(count):
        text = texts[n] if n < len(texts) else f"word {'x' * (n * 7 % 5)} é {n}"
        recording = Recording(f"r{n}", [AudioSource("file", [0], f"audio/{n}.flac")], 16000, 16000, 1.0)
        word = AlignmentItem("word", 0.1, 0.3)
        segment = SupervisionSegment(f"s{n}", f"r{n}", 0.0, 1.0, text=text, alignment={"word": [word]})
        cuts.append(MonoCut(f"c{n}", 0.0, 1.0, 0, supervisions=[segment], recording=recording, custom={"kept": n}))
    return CutSet.from_cuts(cuts)


def generate(out_dir, llm=None, cuts=None, **changes):
    arguments = dict(pool=POOL, chat=CHAT, provenance=PROVENANCE, plan=PLAN, shard_size=4, progress=False)
    cuts = make_cuts() if cuts is None else cuts
    return generate_targets(cuts, out_dir, respond=llm or FakeLLM(), **{**arguments, **changes})


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def undisturbed_run(folder):
    """The folder's content and the number of batches of a run that nothing stopped."""
    llm = FakeLLM()
    generate(folder, llm)
    return content(folder), len(llm.batches)


if __name__ == "__main__":
    generate(sys.argv[1], FakeLLM(delay=0.2))
