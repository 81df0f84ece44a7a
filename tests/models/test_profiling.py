# SPDX-License-Identifier: Apache-2.0
"""Steps of a wanted size, and the search for the largest that fits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.models.profiling import fits_in_memory, largest, step_maker


@pytest.fixture(scope="module")
def model(model_section):
    return MTBIModel(model_section(train_ds=None, validation_ds=None)).train()


@given(st.integers(0, 5000), st.integers(1, 300), st.sampled_from([0.0, 0.05, 0.3]))
def test_the_search_ends_near_the_limit(limit, start, tolerance):
    asked = []
    found = largest(lambda size: asked.append(size) or size <= limit, start, tolerance)
    assert found <= limit and (found == 0) == (limit == 0)
    assert limit - found <= max(tolerance * (limit + 1) / (1 - tolerance), 1) - (tolerance == 0.0)
    assert len(asked) < 40 and min(asked) >= 1


def test_steps_are_as_large_as_they_say(model):
    make = step_maker(model, rows=3)
    step = make(torch.randn(4, 16000), torch.ones(4, 5, dtype=torch.int64))
    assert sum(int(micro.lengths.sum()) for micro in step.microbatches) == 4 * make.cost(16000, 5)
    assert step.num_targets == 4 * 3 * 5
    with pytest.raises(ValueError, match="own no speech frame"):
        make(torch.randn(1, 100), torch.ones(1, 5, dtype=torch.int64))


def test_a_step_that_does_not_fit_is_smaller_the_next_time(model, monkeypatch):
    fits, whole = fits_in_memory(model, 1, 16000, 4), model.speech_llm.train_step
    sizes = []

    def limited(batch, targets):
        sizes.append(len(batch.audio))
        if len(batch.audio) > 5:
            raise torch.OutOfMemoryError
        return whole(batch, targets)

    monkeypatch.setattr(model.speech_llm, "train_step", limited)
    before = [value.detach().clone() for value in model.trained]
    assert largest(fits, start=4, tolerance=0.0) == 5
    assert sizes == [4, 8, 6, 5]
    assert all(torch.equal(a, b) for a, b in zip(before, model.trained, strict=True))  # nothing was learned
    assert all(value.grad is None for value in model.trained)


def test_twins_where_the_loss_compares(model_section):
    other = MTBIModel(model_section(train_ds=None, validation_ds=None, loss={"kl_weight": 1.0})).train()
    batch = step_maker(other)(torch.randn(2, 16000), torch.ones(2, 4, dtype=torch.int64))
    assert batch.twins and torch.isfinite(other.speech_llm.train_step(batch, batch.num_targets).loss)


def by_schema(schema, lengths, size):
    """A batch as NeMo's OOMptimizer makes it of a schema."""
    from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType

    made = {}
    for item in schema["inputs"]:
        length, kind = lengths[item["seq_length"]], item["type"].elements_type
        if isinstance(kind, AudioSignal):
            made[item["name"]] = torch.randn(size, length, dtype=torch.bfloat16)
        elif isinstance(kind, LengthsType):
            made[item["name"]] = torch.full((size,), length)
        else:
            assert isinstance(kind, LabelsType)
            made[item["name"]] = torch.randint(0, item["vocab_size"], (size, length))
    return schema["cls"](**made)


def test_nemos_oomptimizer_trains_on_what_the_schema_says(model):
    """Its loop: a step, a backward of the loss, an update; gradients are those of the step alone."""
    batch = by_schema(model.oomptimizer_schema, {"input": 16000, "output": 5}, size=3)
    loss = model.training_step(batch, 0)["loss"]
    expected = [value.grad.clone() for value in model.trained]
    loss.sum().backward()
    assert torch.isfinite(loss) and any(grad.abs().max() > 0 for grad in expected)
    assert all(torch.equal(value.grad, grad) for value, grad in zip(model.trained, expected, strict=True))
    for value in model.trained:
        value.grad = None


def test_a_batch_of_noise_passes_through_lightning(model_section):
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from nemo_mtbi.parallel.strategy import MTBIStrategy

    model = MTBIModel(model_section(train_ds=None, validation_ds=None))
    batch = by_schema(model.oomptimizer_schema, {"input": 16000, "output": 5}, size=2)
    before = [value.detach().clone() for value in model.trained]
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        devices=1,
        strategy=MTBIStrategy(model.config.layout),
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(model, DataLoader([batch], batch_size=None))
    assert trainer.global_step == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, model.trained, strict=True))
