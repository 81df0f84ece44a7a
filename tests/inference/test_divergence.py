# SPDX-License-Identifier: Apache-2.0
"""The divergence from the text twin against its definition, row by row; parallel layouts: test_generate_parallel."""

from dataclasses import replace

import pytest
import torch

from nemo_mtbi.inference.divergence import twin_divergences
from nemo_mtbi.layouts.layout import make_row, speech

FRAMES = 9


@pytest.fixture
def frames(speech_llm):
    generator = torch.Generator().manual_seed(1)
    shape = (FRAMES, speech_llm.decoder.config.hidden_size)
    return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(heard, read, response):
    return replace(make_row(heard, response), twin=make_row(read, response))


def rows():
    """Prompts and responses of many lengths; those of text twins differ from those of speech."""
    return [
        pair([1, *speech(0, 4), 5], [1, 30, 31, 5], [20]),
        pair([1, *speech(4, 5), 5, 6], [1, 32, 33, 34, 5, 6], [21, 22, 23, 2]),
        pair([1, *speech(2, 1), 40, 41, *speech(7, 2), 5], [1, 33, 40, 41, 34, 35, 36, 37, 38, 5], [24, 2]),
        pair([7, 8, 9], [7, 8, 9], [25, 26, 2]),  # text that is its own twin
    ]


@torch.no_grad()
def defined(model, row, frames):
    """Mean over response tokens of the sum over the vocabulary of p (log p - log q)."""
    logs = []
    for part in (row.twin, row):
        layout = torch.tensor([part.layout])
        hidden = model.decoder.hidden(model.embed(layout, frames))  # [T, 1, H]
        index = torch.arange(len(part.layout))[-len(part.response) :]
        real = model.decoder.architecture.vocab_size
        logs.append(model.decoder.logits(hidden, index)[:, :real].log_softmax(-1))
    log_p, log_q = logs
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("batch_tokens", [1, 25, 10**6])
def test_it_is_what_it_says_in_every_batch(speech_llm, frames, batch_tokens):
    expected = [defined(speech_llm, row, frames) for row in rows()]
    assert min(expected[:3]) > 1e-3 and len(set(expected)) == 4  # a comparison with something
    assert twin_divergences(speech_llm, rows(), frames, batch_tokens) == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_the_order_of_rows_changes_nothing(speech_llm, frames):
    found = twin_divergences(speech_llm, rows(), frames, 25)
    assert twin_divergences(speech_llm, rows()[::-1], frames, 25)[::-1] == pytest.approx(found, rel=1e-12, abs=1e-13)


def test_nothing_has_no_divergence(speech_llm, frames):
    assert twin_divergences(speech_llm, [], frames, 25) == []


@pytest.mark.parametrize("twin", [None, make_row([1, 5], [21])])
def test_rows_without_a_twin_of_their_own_are_refused(speech_llm, frames, twin):
    with pytest.raises(ValueError, match="each row needs a text twin with its own response"):
        twin_divergences(speech_llm, [replace(rows()[0], twin=twin)], frames, 25)


def test_modes_and_gradients_stay_as_they_were(speech_llm, frames):
    speech_llm.train()
    twin_divergences(speech_llm, rows(), frames.requires_grad_(), 25)
    assert speech_llm.decoder.training and frames.grad is None
