# SPDX-License-Identifier: Apache-2.0
"""A model whose LLM trains itself, in one process: what is trained, saved, restored, gone on with and asked."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lora_values import draw_learned
from omegaconf import OmegaConf

from nemo_mtbi.archive.save_restore import NemoFile
from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.io.nemo_tar import WEIGHTS
from nemo_mtbi.llm.state import LlmState
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel import groups
from nemo_mtbi.parallel.strategy import MTBIStrategy
from nemo_mtbi.speech_llm.model import StepLoss
from nemo_mtbi.speech_llm.trainable import LLM
from nemo_mtbi.testing import tiny_text_llm

SECTION = {"freeze": ["embedding", r"layers\.0\."], "lr": 1e-3}
NO_DATA = {"train_ds": None, "validation_ds": None}


def build(section, **changes):
    seed_everything(3, verbose=False)
    return MTBIModel(section(**{"llm": SECTION, **changes}))


@pytest.fixture(scope="module")
def model(model_section):
    """Its LLM has learned something."""
    model = build(model_section, **NO_DATA)
    draw_learned(model.speech_llm.chunks)
    return model


def answers(model):
    rng = np.random.default_rng(0)
    audio = [rng.uniform(-0.1, 0.1, samples).astype(np.float32) for samples in (16000, 24000)]
    return model.generate(audio, ["say it", "count it"])


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("full", [False, True])
def test_a_nemo_holds_what_the_llm_has_learned(model, tmp_path, full):
    """Among the weights that are trained, or, if the whole LLM is stored, once and in it."""
    model.save_to(tmp_path / "llm.nemo", full=full)
    restored = MTBIModel.restore_from(tmp_path / "llm.nemo", map_location="cpu")
    before = weights(model)
    assert all(torch.equal(value, before[name]) for name, value in restored.named_parameters())
    assert answers(restored) == answers(model)
    with NemoFile(tmp_path / "llm.nemo") as file:
        held = set(file.tensors(WEIGHTS).names())
    learned = {name for name in model.state_dict() if name.startswith(LLM.prefix)}
    assert len(learned) == 8 and held == set(model.state_dict()) - (learned if full else set())
    restored.save_to(tmp_path / "again.nemo")
    assert (tmp_path / "again.nemo").read_bytes() == (tmp_path / "llm.nemo").read_bytes()


def test_a_full_nemo_knows_that_its_llm_was_trained(model, model_section, tmp_path):
    """Also where it trains no more, and with the LLM that it was in its place nothing is lost in silence."""
    model.save_to(tmp_path / "full.nemo", full=True)
    restored = MTBIModel.restore_from(tmp_path / "full.nemo", override_config_path={"llm": None}, map_location="cpu")
    assert restored.speech_llm.llm_state is LlmState.TRAINED
    assert answers(restored) == answers(model)
    restored.save_to(tmp_path / "again.nemo")
    again = MTBIModel.restore_from(tmp_path / "again.nemo", map_location="cpu")
    with pytest.raises(ValueError, match="this model's LLM itself was trained"):
        again.responder().without_adapters().text([("say it", "red cat")])
    other = {"pretrained_llm": model_section().pretrained_llm}
    with pytest.raises(ValueError, match="is not the LLM of this .nemo, which was itself trained and is inside"):
        MTBIModel.restore_from(tmp_path / "full.nemo", override_config_path={**other, "llm": None}, strict=False)


@pytest.mark.parametrize("change", ["freeze", "unfreeze"])
def test_what_nemo_freezes_for_a_while_stays_what_it_is(model_section, tmp_path, change):
    model = build(model_section, **NO_DATA)
    draw_learned(model.speech_llm.chunks)
    model.save_to(tmp_path / "before.nemo")
    getattr(model, change)()
    model.save_to(tmp_path / "after.nemo")
    assert (tmp_path / "after.nemo").read_bytes() == (tmp_path / "before.nemo").read_bytes()


def test_kl_from_the_llm_that_it_was_is_not_measured(model):
    from nemo_mtbi.evaluation.items import Reply
    from nemo_mtbi.evaluation.systems import Slots, SpeechSystem

    slots = Slots([[-1, -2]], torch.zeros(2, model.speech_llm.decoder.config.hidden_size))
    answers = [Reply("red", 2, False)]
    (found,) = SpeechSystem(model.responder()).divergences(slots, [("say it", 0)], ["red"], answers)
    assert found.kl is None and found.tokens == 0


def test_another_choice_does_not_fit(model, tmp_path):
    model.save_to(tmp_path / "llm.nemo")
    with pytest.raises(ValueError, match="does not fit model.llm.freeze; missing or unknown: speech_llm.llm.*unknown"):
        MTBIModel.restore_from(tmp_path / "llm.nemo", override_config_path={"llm": None})


def test_first_the_connector_then_the_llm(model, model_section, tmp_path):
    alone = build(model_section, llm=None, **NO_DATA)
    alone.save_to(tmp_path / "connector.nemo")
    model.save_to(tmp_path / "llm.nemo")
    later, before = build(model_section, **NO_DATA), weights(build(model_section, **NO_DATA))
    later.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(tmp_path / "connector.nemo")})
    kept = [name for name in before if not name.startswith("speech_llm.connector.")]
    assert all(torch.equal(weights(later)[name], before[name]) for name in kept)
    later.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": str(tmp_path / "llm.nemo")})
    assert all(torch.equal(value, weights(model)[name]) for name, value in later.named_parameters())


def test_what_an_llm_has_learned_is_not_taken_where_it_would_be_lost(model, model_section, tmp_path):
    model.save_to(tmp_path / "small.nemo")
    model.save_to(tmp_path / "full.nemo", full=True)
    other = str(tiny_text_llm(tmp_path / "other", seed=7, tie_embeddings=False))
    with pytest.raises(ValueError, match="has trained weights of another LLM than model.pretrained_llm: give that"):
        build(model_section, pretrained_llm=other, **NO_DATA).maybe_init_from_pretrained_checkpoint(
            {"init_from_nemo_model": str(tmp_path / "small.nemo")}
        )
    for section in (SECTION, None):
        with pytest.raises(ValueError, match="full .nemo whose LLM has been trained: restore it, or unpack it"):
            build(model_section, llm=section, **NO_DATA).maybe_init_from_pretrained_checkpoint(
                {"init_from_nemo_model": str(tmp_path / "full.nemo")}
            )


def test_it_is_not_asked_for_the_llm_that_it_was(model):
    with pytest.raises(ValueError, match="this model's LLM itself was trained.*ask the LLM that it was, by its path"):
        model.responder().without_adapters().text([("say it", "red cat")])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora": {"rank": 2}}, "model.llm trains the LLM itself and model.lora adapters in it: choose one"),
        ({"loss": {"kl_weight": 1.0}}, "model.loss compares with the LLM as it was, which model.llm.freeze does not"),
        ({"optim": {"_target_": "torch.optim.SGD"}}, "model.optim.name is torch.optim.SGD, but the LLM is trained by"),
        ({"optim": {"lr": 0}}, "model.optim.lr is 0, and the LLM follows its schedule"),
        ({"optim": {"name": "sgd"}}, "model.optim.name is sgd, but the LLM is trained by Adam: set it to adamw"),
    ],
)
def test_what_contradicts_it_is_refused(changes, message):
    section = {"pretrained_asr": "demo", "pretrained_llm": "demo", **changes}
    parse_model_config(section)
    with pytest.raises(ValueError, match=message):
        parse_model_config({**section, "llm": {"freeze": False}})
    parse_model_config({**section, "llm": {"freeze": True}})


# ----------------------------------------------------------------------------------------------------------- training


class SaveOnce(Callback):
    """Saves behind the second batch."""

    def __init__(self, path):
        self.path = path
        self.weights = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1 and self.weights is None and self.path:
            trainer.save_checkpoint(self.path)
            self.weights = weights(module)


def fit(model, steps=4, save=None, resume=None, callback=None):
    from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO

    checkpoints = ShardedCheckpointIO(
        lambda: model.state_dict(keep_vars=True), lambda: trainer.optimizers, llm=lambda: model.llm_optimizer
    )
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[callback or SaveOnce(save)],
        strategy=MTBIStrategy(model.config.layout, checkpoint_io=checkpoints),
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        use_distributed_sampler=False,
    )
    trainer.fit(model, ckpt_path=resume)
    return weights(model)


@pytest.fixture(scope="module")
def section(model_section):
    schedule = {"name": "CosineAnnealing", "warmup_steps": 1, "max_steps": 40}
    return lambda **changes: model_section(
        optim={"name": "adamw", "lr": 1e-2, "betas": [0.9, 0.98], "sched": schedule}, **changes
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_as_one_that_never_stopped(section, tmp_path, dtype):
    """Bit by bit, in 16 bits too, where the optimizer's own weights are finer than the LLM's."""
    model = build(section, frozen_dtype=dtype)
    before = weights(model)
    whole = fit(model, save=tmp_path / "2.ckpt")
    changed = {name for name in before if not torch.equal(whole[name], before[name])}
    llm = {name for name in changed if name.startswith("speech_llm.chunks.")}
    assert len(llm) == 8 and all(".layers.1." in name or "final" in name or "output" in name for name in llm)
    assert any(name.startswith("speech_llm.connector.") for name in changed)
    assert model.llm_optimizer is None  # its memory is given back

    found = fit(build(section, frozen_dtype=dtype), resume=tmp_path / "2.ckpt")
    assert {name for name in whole if not torch.equal(found[name], whole[name])} == set()


@pytest.mark.parametrize("why", ["not finite", "no targets"])
def test_steps_that_are_left_out_change_nothing(section, tmp_path, monkeypatch, why):
    """And a run goes on from a checkpoint that was saved before the LLM has learned anything."""
    model, save = build(section, on_nonfinite="skip"), SaveOnce(tmp_path / "2.ckpt")
    before, place = weights(model), model.speech_llm if why == "not finite" else groups
    name = "train_step" if why == "not finite" else "data_parallel_sum"
    failing = {"train_step": lambda *_: StepLoss(torch.tensor(float("nan")), {})}
    real, bad = getattr(place, name), failing.get(name, torch.zeros_like)
    monkeypatch.setattr(place, name, lambda *args: (bad if save.weights is None else real)(*args))
    after = fit(model, callback=save)
    assert all(torch.equal(value, before[name]) for name, value in save.weights.items())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    assert torch.load(tmp_path / "2" / "common.pt")["checkpoint"]["llm_optimizer"] == {"steps": 0}
    later = fit(build(section), resume=tmp_path / "2.ckpt")
    assert any(not torch.equal(value, before[name]) for name, value in later.items())


def test_a_checkpoint_without_the_moments_is_not_gone_on_with(section, tmp_path):
    model = build(section)
    fit(model, 2)
    model.trainer.save_checkpoint(tmp_path / "late.ckpt")
    with pytest.raises(ValueError, match="holds nothing of the LLM's optimizer, since it was saved behind a fit"):
        fit(build(section), resume=tmp_path / "late.ckpt")


def test_the_learning_rate_follows_the_schedule(section, monkeypatch):
    from nemo_mtbi.parallel.llm_optimizer import LlmOptimizer

    rates, own = [], []
    step = LlmOptimizer.step

    def noted(optimizer, decay):
        step(optimizer, decay)
        rates.append(optimizer._optimizer.param_groups[0]["lr"])
        own.append(model.trainer.optimizers[0].param_groups[0]["lr"])

    monkeypatch.setattr(LlmOptimizer, "step", noted)
    model = build(section)
    fit(model)
    assert len(set(rates)) > 1 and rates == pytest.approx([0.1 * rate for rate in own])  # 1e-3 against 1e-2


def test_the_largest_step_is_found_with_its_optimizer(section):
    from nemo_mtbi.models.profiling import fits_in_memory

    model = build(section, **NO_DATA)
    before = weights(model)
    fits = fits_in_memory(model, 2, 16000, 4)
    assert fits(2) and fits(3)
    trained = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert trained == set()  # it is tried with a learning rate of zero


def test_the_section_may_be_given_by_nemos_configuration(model):
    stored = OmegaConf.to_container(model.cfg)["llm"]
    assert stored == SECTION
