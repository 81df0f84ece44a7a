# SPDX-License-Identifier: Apache-2.0
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.layouts.layout import Row, StepBatch, collate, make_row, speech
from nemo_mtbi.testing import tiny_speech_llm

SAMPLES = (16000, 4100, 29000)


@pytest.fixture(autouse=True)
def _clean(speech_llm):
    speech_llm.zero_grad(set_to_none=True)
    speech_llm.train()


def make_rows(counts, rows_per_utterance=3, seed=0):
    """Rows of text before, around and instead of speech, of many lengths."""
    rng = random.Random(seed)

    def text(low, high):
        return [rng.randrange(128) for _ in range(rng.randint(low, high))]

    rows = []
    for utterance, count in enumerate(counts):
        first = rng.randrange(count)
        heard = [
            speech(0, count),
            [*speech(0, first), *text(1, 4), *speech(first, count - first)],  # interleaved
            [*speech(first, count - first), *text(1, 3), *speech(0, first)],  # frames out of order, as in no data
        ]
        for n in range(rows_per_utterance):
            rows.append(make_row(text(1, 6) + heard[n % 3] + text(0, 3), text(1, 9), utterance))
    return rows


def make_batch(model, samples=SAMPLES, rows=None, micro_batch_tokens=60, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    audio = [torch.randn(n, generator=generator) for n in samples]
    counts = [model.frame_counter(n) for n in samples]
    rows = make_rows(counts, **kwargs) if rows is None else rows
    return collate(audio, counts, rows, micro_batch_tokens, [f"cut-{n}" for n in range(len(samples))]), rows


def plain_loss(model, batch, rows):
    """The mean loss per response token as one graph: row by row, position by position, no schedule, no padding."""
    encoded, lengths = model.encoder(batch.audio, batch.audio_lengths)
    frames = [model.connector(encoded[u : u + 1, :n], lengths[u : u + 1])[0][0] for u, n in enumerate(lengths)]
    table = model.decoder.embedding.word_embeddings.weight
    losses = []
    for row in rows:
        vectors = [table[v] if v >= 0 else frames[row.utterance][-v - 1] for v in row.layout]
        hidden = model.decoder.hidden(torch.stack(vectors)[:, None])
        logits = model.decoder.logits(hidden, torch.arange(len(vectors)))
        losses.append(F.cross_entropy(logits, torch.tensor(row.labels), ignore_index=-100, reduction="sum"))
    return sum(losses) / batch.num_targets


def gradients(model):
    return {name: value.grad.clone() for name, value in model.connector.named_parameters()}


def step(model, batch, num_targets=None):
    model.zero_grad(set_to_none=True)
    loss = model.train_step(batch, num_targets or batch.num_targets).loss
    return loss, gradients(model)


def assert_equal_steps(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert value.abs().max() > 1e-4, name  # a comparison with something
        torch.testing.assert_close(found[1][name], value, rtol=tolerance, atol=tolerance, msg=name)


# -------------------------------------------------------------------------------------------------- encode and embed


def test_frames_of_a_step_are_those_of_its_utterances_in_order(speech_llm):
    batch, _ = make_batch(speech_llm)
    frames = speech_llm.encode(batch)
    assert frames.shape == (batch.num_frames, 32)
    assert batch.frame_lengths.tolist() == [speech_llm.frame_counter(n) for n in SAMPLES] == [7, 2, 12]
    for frame, samples, part in zip(
        batch.frame_lengths, SAMPLES, frames.split(batch.frame_lengths.tolist()), strict=True
    ):
        audio = batch.audio[list(SAMPLES).index(samples), :samples][None]
        alone = speech_llm.encode_audio(audio, torch.tensor([samples]), frame[None])
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-5)  # the front end is float32


def test_data_made_for_another_encoder_is_refused_by_the_name_of_the_cut(speech_llm):
    batch, _ = make_batch(speech_llm)
    wrong = replace(batch, frame_lengths=batch.frame_lengths + torch.tensor([0, 1, 0]))
    with pytest.raises(RuntimeError, match="cut-1 has 2 speech frames, but its layout was built for 3"):
        speech_llm.encode(wrong)
    with pytest.raises(RuntimeError, match="utterance 1 has 2"):
        speech_llm.encode_audio(wrong.audio, wrong.audio_lengths, wrong.frame_lengths)


def test_no_utterance_gives_no_frame(speech_llm):
    assert speech_llm.encode(StepBatch.empty({})).shape == (0, 32)


def test_embed_takes_token_rows_and_frames_exactly(speech_llm):
    frames = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = torch.tensor([[3, -1, -5, 0], [-3, 127, 7, -1]])
    found = speech_llm.embed(layout, frames)
    assert found.shape == (4, 2, 32) and found.is_contiguous()
    table = speech_llm.decoder.embedding.word_embeddings.weight
    for r in range(2):
        for t in range(4):
            value = int(layout[r, t])
            assert torch.equal(found[t, r], table[value] if value >= 0 else frames[-value - 1])


def test_the_gradient_of_frames_is_that_of_a_dense_choice(speech_llm):
    """Frames that several positions and rows read, and frames that none reads."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    layout = torch.randint(-5, 20, (4, 9), generator=generator)
    upstream = torch.randn(9, 4, 32, generator=generator, dtype=torch.float64)
    leaf = frames.clone().requires_grad_(True)
    speech_llm.embed(layout, leaf).backward(upstream)
    choice = F.one_hot((-layout - 1).clamp(min=-1) + 1, 7)[..., 1:].double()  # [R, T, F]; text chooses nothing
    torch.testing.assert_close(leaf.grad, torch.einsum("rtf,trh->fh", choice, upstream), rtol=0, atol=1e-12)
    assert (leaf.grad[5] == 0).all()


# ------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("seed", range(3))
def test_a_step_equals_one_plain_graph(speech_llm, seed):
    batch, rows = make_batch(speech_llm, seed=seed)
    assert len(batch.microbatches) > 2
    loss = plain_loss(speech_llm, batch, rows)
    loss.backward()
    assert_equal_steps(step(speech_llm, batch), (loss.detach(), gradients(speech_llm)))


@pytest.mark.parametrize("kind", ["conv", "stack"])
def test_other_connectors_and_a_tied_head(kind):
    model = tiny_speech_llm(3, torch.float64, ConnectorConfig(kind, 12.5 / 4, hidden_size=8, kernel_size=5))
    batch, rows = make_batch(model)
    loss = plain_loss(model, batch, rows)
    loss.backward()
    assert_equal_steps(step(model, batch), (loss.detach(), gradients(model)))


@pytest.mark.parametrize("micro_batch_tokens", [1, 45, 10**6])
def test_the_grouping_into_microbatches_changes_nothing(speech_llm, micro_batch_tokens):
    batch, rows = make_batch(speech_llm)
    other, _ = make_batch(speech_llm, rows=rows, micro_batch_tokens=micro_batch_tokens)
    assert len(other.microbatches) != len(batch.microbatches)
    assert_equal_steps(step(speech_llm, other), step(speech_llm, batch))


def test_the_order_of_rows_changes_nothing(speech_llm):
    batch, rows = make_batch(speech_llm)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert_equal_steps(step(speech_llm, make_batch(speech_llm, rows=shuffled)[0]), step(speech_llm, batch))


def test_several_rows_of_an_utterance_add_up(speech_llm):
    """One row at a time, against all rows of one utterance, each gradient scaled by the same number of tokens."""
    batch, rows = make_batch(speech_llm, samples=(16000,), rows_per_utterance=5)
    parts = [
        step(speech_llm, make_batch(speech_llm, samples=(16000,), rows=[row])[0], batch.num_targets) for row in rows
    ]
    loss = sum(part[0] for part in parts)
    summed = {name: sum(part[1][name] for part in parts) for name in parts[0][1]}
    assert_equal_steps(step(speech_llm, batch), (loss, summed))


def test_a_step_is_scaled_by_the_tokens_of_all_ranks(speech_llm):
    batch, _ = make_batch(speech_llm)
    loss, grads = step(speech_llm, batch)
    scaled = loss / 4, {name: value / 4 for name, value in grads.items()}
    assert_equal_steps(step(speech_llm, batch, 4 * batch.num_targets), scaled, 1e-12)


def test_gradients_accumulate_over_steps(speech_llm):
    batch, _ = make_batch(speech_llm)
    _, once = step(speech_llm, batch)
    speech_llm.train_step(batch, batch.num_targets)
    for name, value in gradients(speech_llm).items():
        torch.testing.assert_close(value, 2 * once[name], rtol=1e-12, atol=0)


def test_only_the_connector_trains(speech_llm):
    batch, _ = make_batch(speech_llm)
    step(speech_llm, batch)
    trained = {name for name, value in speech_llm.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in speech_llm.named_parameters() if value.requires_grad}
    assert trained and all(name.startswith("connector.") for name in trained)


def test_evaluation_is_the_sum_without_gradients(speech_llm):
    batch, rows = make_batch(speech_llm)
    expected = plain_loss(speech_llm, batch, rows).detach() * batch.num_targets
    for mode in (True, False):
        speech_llm.train(mode)
        found = speech_llm.evaluate_step(batch).loss
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        assert not found.requires_grad
    assert all(value.grad is None for value in speech_llm.parameters())


def test_a_step_of_skipped_cuts_adds_nothing(speech_llm):
    empty = StepBatch.empty({"silent": 4})
    for num_targets in (0, 17):  # of all ranks: this one may be alone with nothing
        assert speech_llm.train_step(empty, num_targets).loss.item() == 0
    assert speech_llm.evaluate_step(empty).loss.item() == 0
    assert all(value.grad is None for value in speech_llm.parameters())


def test_rows_without_speech_count_in_the_loss_and_train_nothing(speech_llm):
    rows = [Row((3, 4, 5), (-100, 7, 8)), Row((9,), (1,))]
    text, _ = make_batch(speech_llm, samples=(), rows=rows)
    loss = speech_llm.train_step(text, text.num_targets).loss
    torch.testing.assert_close(loss, plain_loss_of_text(speech_llm, rows) / 3, rtol=1e-12, atol=0)
    assert all(value.grad is None for value in speech_llm.parameters())
    mixed, _ = make_batch(speech_llm)
    both, _ = make_batch(speech_llm, rows=make_batch(speech_llm)[1] + rows, micro_batch_tokens=10**6)
    _, expected = step(speech_llm, mixed, 100)
    for name, value in step(speech_llm, both, 100)[1].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def plain_loss_of_text(model, rows):
    total = 0
    for row in rows:
        hidden = model.decoder.hidden(model.decoder.embed_tokens(torch.tensor([row.layout])).transpose(0, 1))
        logits = model.decoder.logits(hidden, torch.arange(len(row.layout)))
        total += F.cross_entropy(logits, torch.tensor(row.labels), ignore_index=-100, reduction="sum")
    return total


def test_a_bfloat16_decoder_trains_a_float32_connector_in_the_right_direction():
    exact = tiny_speech_llm(dtype=torch.float64)
    mixed = tiny_speech_llm(dtype=torch.bfloat16)
    mixed.connector.float().load_state_dict(exact.connector.state_dict())
    batch, _ = make_batch(exact)
    (loss, expected), (found_loss, found) = step(exact, batch), step(mixed, batch)
    assert found_loss.dtype == torch.float32
    assert abs(found_loss - loss) < 0.02 * loss
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert F.cosine_similarity(found[name].double().flatten(), value.flatten(), dim=0) > 0.98, name
