# SPDX-License-Identifier: Apache-2.0
"""A loss that compares with the text twin, against its definition, row by row (``plain_sums`` of the parity suite)."""

from dataclasses import replace

import parity_data as data
import pytest
import torch
import torch.nn.functional as F

from nemo_mtbi.config.loss import DIVERGENCES, LossConfig
from nemo_mtbi.layouts.layout import StepBatch, collate, make_row
from nemo_mtbi.speech_llm import model as module
from nemo_mtbi.testing import tiny_speech_llm

LOSSES = {
    **data.LOSSES,
    "reverse": LossConfig(1.0, 0.5, "reverse_kl", temperature=3.0, scale_by_temperature=False),
    "hidden": LossConfig(0.0, hidden_weight=2.0),
}


@pytest.fixture(autouse=True)
def _clean(speech_llm):
    speech_llm.zero_grad(set_to_none=True)
    speech_llm.train()
    yield
    speech_llm.loss = LossConfig()


def make_batch(model, seed=0, tokens=60, **step):
    step = {"rows": 3, "utterances": 3, "text": 2, "interleave": True, "twins": True, **step}
    return data.step_batch(data.make_step(model.frame_counter, seed, **step), tokens)


def gradients(model):
    return torch.cat([value.grad.flatten() for value in model.connector.parameters()])


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_equals_its_definition(speech_llm, name):
    speech_llm.loss = LOSSES[name]
    batch = make_batch(speech_llm)
    sums = data.plain_sums(speech_llm, batch)
    loss = data.plain_loss(speech_llm, batch) / batch.num_targets
    loss.backward()
    expected = gradients(speech_llm)
    assert expected.abs().max() > 1e-3  # a comparison with something
    speech_llm.zero_grad(set_to_none=True)
    found, parts = speech_llm.train_step(batch, batch.num_targets)
    assert relative(found, loss.detach()) < 1e-12
    assert relative(gradients(speech_llm), expected) < 1e-10
    assert tuple(parts) == speech_llm.loss.parts
    for part, value in parts.items():
        assert relative(value * batch.num_targets, sums[part].detach()) < 1e-12
    # the sum without gradients, in validation
    speech_llm.zero_grad(set_to_none=True)
    found, parts = speech_llm.evaluate_step(batch)
    assert relative(found, loss.detach() * batch.num_targets) < 1e-12
    assert relative(parts["ce"], sums["ce"].detach()) < 1e-12
    assert all(value.grad is None for value in speech_llm.parameters())


def test_only_the_connector_trains(speech_llm):
    speech_llm.loss = LOSSES["js_temperature"]
    speech_llm.train_step(make_batch(speech_llm), 10)
    assert {name.split(".")[0] for name, value in speech_llm.named_parameters() if value.grad is not None} == {
        "connector"
    }


# ------------------------------------------------------------------------------------------------- positions of tokens


def text_rows():
    """Rows of text that are their own twins, of prompts and responses of many lengths."""
    generator = torch.Generator().manual_seed(4)

    def draw(count):
        return torch.randint(4, 100, (count,), generator=generator).tolist()

    rows = [make_row(draw(2 + n % 5), draw(1 + n % 4)) for n in range(7)]
    return [replace(row, twin=row) for row in rows]


def shifted(batch, by):
    """The step with the teacher's states taken from neighbouring positions."""
    twins = [
        replace(twin, response_index=(twin.response_index + by * len(twin.lengths)).clamp(0, twin.labels.numel() - 1))
        for twin in batch.twins
    ]
    return replace(batch, twins=twins)


def test_student_and_teacher_that_read_the_same_do_not_differ(speech_llm):
    speech_llm.loss = LossConfig(kl_weight=1.0, hidden_weight=1.0)
    batch = collate([], [], text_rows(), 20)
    assert len(batch.microbatches) > 1 and len(batch.twins) > 1
    _, parts = speech_llm.evaluate_step(batch)
    assert abs(parts["kl"]) < 1e-12 and parts["hidden"] < 1e-20
    for by in (-1, 1):
        _, parts = speech_llm.evaluate_step(shifted(batch, by))
        assert parts["kl"] > 0.1 and parts["hidden"] > 0.1


@pytest.mark.parametrize("by", [-1, 1])
def test_a_mask_that_is_off_by_one_is_caught(speech_llm, by):
    """A step whose teacher is misplaced is not the definition, but the definition misplaced as far."""
    speech_llm.loss = LossConfig(kl_weight=1.0)
    batch = make_batch(speech_llm)
    sums = data.plain_sums(speech_llm, batch)
    assert relative(speech_llm.evaluate_step(batch).parts["kl"], sums["kl"].detach()) < 1e-12
    found = speech_llm.evaluate_step(shifted(batch, by)).parts["kl"]
    assert relative(found, sums["kl"].detach()) > 1e-3
    if by < 0:  # to the right, the last row would read behind its end
        wrong = data.plain_sums(speech_llm, batch, shift=by)
        assert relative(found, wrong["kl"].detach()) < 1e-12


def test_the_end_of_a_truncated_response_is_not_compared(speech_llm):
    """The row of a whole response adds the divergence at its end; the truncated one has it not."""
    speech_llm.loss = LossConfig(kl_weight=1.0)
    audio, frames = torch.randn(9000), speech_llm.frame_counter(9000)
    heard = [1, *(-(n + 1) for n in range(frames)), 5]
    found = []
    for response in ([20, 30], [20, 30, 2]):
        row = make_row(heard, response, 0)
        batch = collate([audio], [frames], [replace(row, twin=make_row([1, 7, 8, 5], response))], 100)
        batch.plain_rows = [replace(row, twin=make_row([1, 7, 8, 5], response))]
        found.append(float(speech_llm.evaluate_step(batch).parts["kl"]))
        assert found[-1] == pytest.approx(data.plain_sums(speech_llm, batch)["kl"].item(), rel=1e-10)
    assert found[1] > found[0] + 1e-3


# ------------------------------------------------------------------------------------------------------ how it is done


@pytest.mark.parametrize("piece", [1, 300])
def test_comparing_piece_by_piece_changes_nothing(speech_llm, monkeypatch, piece):
    speech_llm.loss = LOSSES["js_temperature"]
    batch = make_batch(speech_llm)
    loss = speech_llm.train_step(batch, 10).loss
    expected = gradients(speech_llm)
    speech_llm.zero_grad(set_to_none=True)
    monkeypatch.setattr(module, "COMPARED_AT_ONCE", piece)  # a position of 128 logits, or two of them
    assert relative(speech_llm.train_step(batch, 10).loss, loss) < 1e-12
    assert relative(gradients(speech_llm), expected) < 1e-12


def test_the_teacher_keeps_hidden_states_of_response_positions(speech_llm):
    batch = make_batch(speech_llm)
    states = speech_llm.teach(batch)
    paired = sum(len(part.paired) for part in batch.microbatches)
    assert states.shape == (paired, 32) and not states.requires_grad
    assert 0 < paired < batch.num_targets  # text rows have no twin


def test_the_bound_on_a_microbatch_holds_for_twins(speech_llm):
    batch = make_batch(speech_llm, tokens=40)
    assert len(batch.twins) > 2
    assert all(len(twin.lengths) == 1 or twin.layout.numel() <= 40 for twin in batch.twins)


def test_cross_entropy_alone_asks_no_teacher(speech_llm, monkeypatch):
    batch = make_batch(speech_llm)
    expected = data.plain_sums(speech_llm, batch)["ce"].item()
    monkeypatch.setattr(speech_llm, "teach", None)
    loss, parts = speech_llm.evaluate_step(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert parts == {}


@pytest.mark.parametrize("loss", [LossConfig(kl_weight=1.0), LossConfig(0.0, 1.0), LossConfig(0.0, hidden_weight=1.0)])
def test_steps_without_speech_or_without_anything(speech_llm, loss):
    speech_llm.loss = loss
    text = make_batch(speech_llm, utterances=0)
    assert text.twins == []
    found, parts = speech_llm.train_step(text, text.num_targets)
    assert found.item() == pytest.approx(loss.ce_weight * float(parts["ce"]))
    assert parts["ce"] > 0 and all(parts[name] == 0 for name in loss.parts[1:])
    found, parts = speech_llm.train_step(StepBatch.empty({}), 17)
    assert found.item() == 0
    assert set(map(float, parts.values())) == {0.0}


def test_rows_without_twins_are_refused_with_the_remedy(speech_llm):
    speech_llm.loss = LossConfig(kl_weight=1.0)
    batch = make_batch(speech_llm, twins=False)
    for run in (speech_llm.evaluate_step, lambda step: speech_llm.train_step(step, 1)):
        with pytest.raises(RuntimeError, match="rows of this step have none: build the dataset with with_twins=True"):
            run(batch)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation_changes_nothing(speech_llm, granularity):
    recompute = {"recompute_granularity": granularity}
    if granularity == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    batch = make_batch(speech_llm)
    speech_llm.loss = LOSSES["js_temperature"]
    expected = speech_llm.train_step(batch, 10).loss, gradients(speech_llm)
    config, before = speech_llm.decoder.config, {}
    for key, value in recompute.items():
        before[key] = getattr(config, key)
        setattr(config, key, value)
    attentions = [layer.self_attention for layer in speech_llm.decoder.decoder.layers]
    core = [attention.checkpoint_core_attention for attention in attentions]
    for attention in attentions:
        attention.checkpoint_core_attention = granularity == "selective"
    calls = []
    hook = attentions[0].core_attention.register_forward_hook(lambda *unused: calls.append(1))
    try:
        speech_llm.zero_grad(set_to_none=True)
        found = speech_llm.train_step(batch, 10).loss, gradients(speech_llm)
    finally:
        hook.remove()
        for key, value in before.items():
            setattr(config, key, value)
        for attention, value in zip(attentions, core, strict=True):
            attention.checkpoint_core_attention = value
    assert len(calls) == len(batch.twins) + 2 * len(batch.microbatches)  # the teacher has no backward
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-12


def test_a_bfloat16_decoder_trains_a_float32_connector_in_the_right_direction():
    exact, mixed = (tiny_speech_llm(dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    mixed.connector.float().load_state_dict(exact.connector.state_dict())
    batch, found = make_batch(exact), []
    for divergence in DIVERGENCES:
        for model in (exact, mixed):
            model.loss = LossConfig(0.0, 1.0, divergence, temperature=2.0, hidden_weight=0.1)
            model.zero_grad(set_to_none=True)
            found.append((model.train_step(batch, batch.num_targets).loss, gradients(model)))
        (loss, expected), (other, gradient) = found[-2:]
        assert other.dtype == gradient.dtype == torch.float32
        assert abs(other - loss) < 0.02 * loss
        assert F.cosine_similarity(gradient.double(), expected, dim=0) > 0.98
    text = make_batch(exact, utterances=0)  # a teacher without states has the dtype of one with
    assert mixed.train_step(text, 1).loss.item() == 0
