# SPDX-License-Identifier: Apache-2.0
"""The steps that the parity suite trains on, the same in every process: noise, and random tokens about it."""

import torch
import torch.nn.functional as F

from nemo_mtbi.data.layout import Row, StepBatch, collate, make_row, speech

STEPS = 5
DATA = {  # name: what each step is made of, and the size of its microbatches
    "k1": ([dict(rows=1)] * STEPS, 30),
    "k4": ([dict(rows=4)] * STEPS, 110),
    "k4_interleaved": ([dict(rows=4, interleave=True)] * STEPS, 110),
    "k4_equal": ([dict(rows=4, equal=True)] * STEPS, 110),
    "text_rows": ([dict(rows=2, text=5)] * STEPS, 60),  # in microbatches with others and in some of their own
    "uneven": (  # fewer utterances than processes, none, and more; an utterance too short to own a frame
        [
            dict(rows=2, utterances=1),
            dict(rows=2, utterances=3, short=True),
            dict(rows=2, utterances=0, text=3),
            dict(rows=2, utterances=5),
            dict(rows=2, utterances=1, text=2),
        ],
        60,
    ),
}


def make_step(counter, seed, rows, utterances=4, text=0, interleave=False, equal=False, short=False):
    """Utterances of noise, rows of random tokens about them, and rows without speech."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def row(said, utterance):
        prompt = [1, *(draw(4, 100) for _ in range(4 if equal else draw(1, 6))), *said, 5]
        return make_row(prompt, [draw(4, 100) for _ in range(4 if equal else draw(1, 8))], utterance)

    audio, frames, made = [], [], []
    for utterance in range(utterances):
        samples = 16000 if equal else 100 if short and utterance == 0 else draw(6000, 24000)
        audio.append(0.1 * torch.randn(samples, generator=generator))
        frames.append(counter(samples))
        for _ in range(rows):
            said = speech(0, frames[-1])
            if interleave:  # the middle is text
                said = said[: len(said) // 3] + [draw(4, 100) for _ in range(3)] + said[2 * len(said) // 3 :]
            made.append(row(said, utterance))
    made += [row([draw(4, 100) for _ in range(draw(1, 20))], None) for _ in range(text)]
    return {"audio": audio, "frames": frames, "rows": made}


def step_batch(step, tokens, part=0, parts=1):
    """The share of one data-parallel process: every so manieth utterance with its rows, and so of rows without one."""
    mine = [u for u in range(len(step["audio"])) if u % parts == part]
    rows = [Row(r.layout, r.labels, mine.index(r.utterance)) for r in step["rows"] if r.utterance in mine]
    rows += [row for row in step["rows"] if row.utterance is None][part::parts]
    if not rows:
        return StepBatch.empty({})
    audio = [step["audio"][u] for u in mine]
    batch = collate(audio, [step["frames"][u] for u in mine], rows, tokens, [f"cut{u}" for u in mine])
    # NeMo's front end works in float32 and moves by 1e-6 with the length of the padding: let it be the same
    longest = max((len(samples) for samples in step["audio"]), default=0)
    batch.audio = F.pad(batch.audio, (0, longest - batch.audio.shape[1]))
    return batch


def step_batches(counter, name, part=0, parts=1):
    """The steps of one data-parallel process."""
    steps, tokens = DATA[name]
    return [step_batch(make_step(counter, n, **step), tokens, part, parts) for n, step in enumerate(steps)]
