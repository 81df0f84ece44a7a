# SPDX-License-Identifier: Apache-2.0
"""Steps of a text LLM on rows of tokens and speech, for tests that compare layouts."""

import torch

from nemo_mtbi.layouts.layout import MicroBatch, make_row
from nemo_mtbi.testing import ARCHITECTURE

FRAMES = 7


def microbatches(replica=0, replicas=1):
    """Rows of tokens and speech, of which replicas take turns."""
    generator = torch.Generator().manual_seed(4)

    def some(n):
        return torch.randint(3, ARCHITECTURE["vocab_size"], (n,), generator=generator).tolist()

    rows = [make_row([*some(3), -1, -2, -3, *some(2)], some(4)), make_row(some(5), some(3))]
    rows += [make_row([-4, *some(2), -5], some(2)), make_row([*some(6), -6, -7], some(5))]
    groups = [rows[:2], rows[2:3], rows[3:], rows[1:2]]
    return [MicroBatch.from_rows(group, []) for group in groups[replica::replicas]]


def frames(hidden, dtype=torch.float64):
    return torch.randn(FRAMES, hidden, generator=torch.Generator().manual_seed(9), dtype=dtype)


def run(model, batches, forward_only=False):
    """Summed loss of this process, and gradients in what trains and in the frames; ``None`` off the last stage."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.speech_llm.losses import response_cross_entropy

    leaf = frames(model.decoder.config.hidden_size, model.decoder.config.params_dtype).requires_grad_()

    def finish(decoder, batch, hidden):
        logits = decoder.logits(hidden, batch.response_index)
        loss = response_cross_entropy(logits, batch.targets, groups.tensor_parallel_group())
        return loss, loss.detach()

    kept = model.run_schedule(batches, leaf, finish, forward_only)
    return torch.stack(kept).sum() if kept else None
