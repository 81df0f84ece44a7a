# SPDX-License-Identifier: Apache-2.0
"""The steps that the parity suite trains on, the same in every process: noise, and random tokens about it."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.layouts.layout import IGNORE, StepBatch, collate, make_row, speech

STEPS = 5
DATA = {  # name: what each step is made of, and the size of its microbatches
    "k1": ([dict(rows=1)] * STEPS, 30),
    "k1_interleaved": ([dict(rows=1, interleave=True)] * STEPS, 30),
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
    "kl": (  # with text rows, which have no twin, in the same microbatches
        [dict(rows=3, utterances=2, text=2, twins=True), dict(rows=2, utterances=3, twins=True)],
        60,
    ),
    "js_temperature": (  # a step without speech, and one of fewer utterances than processes
        [
            dict(rows=2, utterances=2, text=1, interleave=True, twins=True),
            dict(rows=2, utterances=0, text=3, twins=True),
            dict(rows=2, utterances=1, twins=True),
        ],
        60,
    ),
}
LOSSES = {  # of the data that are not trained on with cross entropy alone
    "kl": LossConfig(ce_weight=0.0, kl_weight=1.0),
    "js_temperature": LossConfig(ce_weight=0.5, kl_weight=3.0, divergence="js", temperature=2.0, hidden_weight=0.1),
}


def make_step(counter, seed, rows, utterances=4, text=0, interleave=False, equal=False, short=False, twins=False):
    """Utterances of noise, rows of random tokens about them, and rows without speech."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def row(said, utterance):
        prompt = [1, *(draw(4, 100) for _ in range(4 if equal else draw(1, 6))), *said, 5]
        response = [draw(4, 100) for _ in range(4 if equal else draw(1, 8))]
        made = make_row(prompt, response, utterance)
        if not twins or utterance is None:
            return made
        text = [draw(4, 100) for _ in range(draw(1, 30))]  # longer than the speech in some rows
        return replace(made, twin=make_row([value for value in prompt if value >= 0] + text, response))

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
    rows = [replace(row, utterance=mine.index(row.utterance)) for row in step["rows"] if row.utterance in mine]
    rows += [row for row in step["rows"] if row.utterance is None][part::parts]
    if not rows:
        return StepBatch.empty({})
    audio = [step["audio"][u] for u in mine]
    batch = collate(audio, [step["frames"][u] for u in mine], rows, tokens, [f"cut{u}" for u in mine])
    # NeMo's front end works in float32 and moves by 1e-6 with the length of the padding: let it be the same
    longest = max((len(samples) for samples in step["audio"]), default=0)
    batch.audio = F.pad(batch.audio, (0, longest - batch.audio.shape[1]))
    batch.plain_rows = rows
    return batch


def step_batches(counter, name, part=0, parts=1):
    """The steps of one data-parallel process."""
    steps, tokens = DATA[name]
    return [step_batch(make_step(counter, n, **step), tokens, part, parts) for n, step in enumerate(steps)]


def plain_sums(speech_llm, batch, shift=0):
    """Cross entropy, divergence and hidden distance from their definitions, row by row and with torch's own functions.

    ``shift`` misplaces the teacher's positions.
    """
    loss, frames = speech_llm.loss, speech_llm.encode(batch).split(batch.frame_lengths.tolist())
    sums = {"ce": 0, "kl": 0, "hidden": 0}

    def read(row, shift=0):
        heard = speech_llm.no_frames() if row.utterance is None else frames[row.utterance]
        hidden = speech_llm.decoder.hidden(speech_llm.embed(torch.tensor([row.layout]), heard))[:, 0]
        at = [place + shift for place, label in enumerate(row.labels) if label != IGNORE]
        logits = speech_llm.decoder.logits(hidden[:, None], torch.tensor(at))
        return hidden[at], logits[:, : speech_llm.decoder.architecture.vocab_size]

    for row in batch.plain_rows:
        hidden, logits = read(row)
        sums["ce"] += F.cross_entropy(logits, torch.tensor(row.response), reduction="sum")
        if row.twin is None:
            continue
        with torch.no_grad():
            wanted, teacher = read(row.twin, shift)
        log_q, log_p = (values.div(loss.temperature).log_softmax(-1) for values in (logits, teacher))
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        kl = {
            "forward_kl": lambda p=log_p, q=log_q: F.kl_div(q, p, reduction="sum", log_target=True),
            "reverse_kl": lambda p=log_p, q=log_q: F.kl_div(p, q, reduction="sum", log_target=True),
            "js": lambda p=log_p, q=log_q, m=log_m: (
                sum(F.kl_div(m, x, reduction="sum", log_target=True) for x in (p, q)) / 2
            ),
        }[loss.divergence]()
        sums["kl"] += kl * (loss.temperature**2 if loss.scale_by_temperature else 1)
        sums["hidden"] += F.mse_loss(hidden, wanted, reduction="sum") / hidden.shape[-1]
    return sums


def plain_loss(speech_llm, batch):
    """What ``speech_llm.loss`` makes of them, as one graph."""
    sums, loss = plain_sums(speech_llm, batch), speech_llm.loss
    return loss.ce_weight * sums["ce"] + loss.kl_weight * sums["kl"] + loss.hidden_weight * sums["hidden"]
