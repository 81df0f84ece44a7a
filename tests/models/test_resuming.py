# SPDX-License-Identifier: Apache-2.0
"""A run that goes on from a checkpoint of another one: what must be the same, and what is told."""

import pytest
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf

from nemo_mtbi.models import resuming
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.models.resuming import CONTENT, RUN, run_settings
from nemo_mtbi.parallel.checkpoint.content import plain_copy
from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm


def build(section, settings=None):
    seed_everything(3, verbose=False)
    model = MTBIModel(section)
    model.run_settings = settings
    return model


def checkpoint_of(model):
    """What Lightning saves of it, as our checkpoints give it back."""
    checkpoint = {"hyper_parameters": {"cfg": model.cfg}}
    model.on_save_checkpoint(checkpoint)
    return plain_copy(checkpoint)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(resuming.logging, "warning", found.append)
    return found


SETTINGS = {"seed": 0, "data": {"tasks": "demo", "cache_dir": "/a"}, "trainer": {"max_steps": 6}, CONTENT: "a"}


def test_an_undisturbed_run_goes_on_in_silence(model_section, warnings):
    checkpoint = checkpoint_of(build(model_section(), SETTINGS))
    moved = {**SETTINGS, "data": {"tasks": "demo", "cache_dir": "/b"}, CONTENT: "b"}  # another machine
    build(model_section(), moved).on_load_checkpoint(checkpoint)
    assert warnings == []
    with_cache = model_section(dist_timeout=60, nemo_content="full")
    build(with_cache, moved).on_load_checkpoint(checkpoint)
    assert warnings == []


def test_another_encoder_or_llm_is_refused(model_section, tmp_path):
    section = model_section(targets={"allow_foreign": True})
    checkpoint = checkpoint_of(build(section))
    asr, llm = tiny_asr_nemo(tmp_path / "asr.nemo", seed=7), tiny_text_llm(tmp_path / "llm", 7, tie_embeddings=False)
    older = {key: value for key, value in checkpoint.items() if key != RUN}  # the hashes were in it before, too
    for key, other, name in (("pretrained_asr", asr, "encoder"), ("pretrained_llm", llm, "LLM")):
        resumed = build(OmegaConf.merge(section, {key: str(other)}))
        message = rf"the checkpoint given was trained with the {name} {section[key]}, whose hash is sha256:\w+, but "
        message += rf"model.{key} is {other}, whose hash .*: give the one that it was trained with"
        for given in (checkpoint, older):
            with pytest.raises(ValueError, match=message):
                resumed.on_load_checkpoint(given)


def test_the_same_parts_in_another_place_go_on(model_section, tmp_path, warnings):
    checkpoint = checkpoint_of(build(model_section()))
    llm = tiny_text_llm(tmp_path / "llm", tie_embeddings=False)
    build(model_section(pretrained_llm=str(llm))).on_load_checkpoint(checkpoint)
    assert warnings == []


def test_another_chat_format_is_refused_and_shown(model_section):
    checkpoint = checkpoint_of(build(model_section()))
    stored = checkpoint[RUN]["chat"]
    checkpoint[RUN]["chat"] = {**stored, "fingerprint": "another", "end": "<end>"}
    with pytest.raises(
        ValueError, match=r"trained with another chat format: end '<end>' \(now '</s>'\). Set model.chat"
    ):
        build(model_section()).on_load_checkpoint(checkpoint)


CHANGES = {
    "batch": ({"train_ds": {"batch_size": 2}}, {}, "model.train_ds.batch_size 4 → 2"),
    "interleaving": ({"interleave": {"probability": 0.9}}, {}, "model.interleave not set → {'probability': 0.9}"),
    "loss": ({"loss": {"ce_weight": 0.5}}, {}, "model.loss not set → {'ce_weight': 0.5}"),
    "learning rate": ({"optim": {"lr": 1e-3}}, {}, "model.optim.lr 0.01 → 0.001 (the checkpoint's stays in force)"),
    "seed": ({}, {"seed": 5}, "seed 0 → 5"),
    "task pool": ({}, {"data": {"tasks": "other.yaml"}}, "data.tasks demo → other.yaml"),
    "no data section": ({}, {"data": None}, "data {'tasks': 'demo', 'cache_dir': '/a'} → None"),
    "steps": ({}, {"trainer": {"max_steps": 8}}, "trainer.max_steps 6 → 8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_differ_are_told_by_name(model_section, warnings, name):
    model, run, message = CHANGES[name]
    checkpoint = checkpoint_of(build(model_section(), SETTINGS))
    build(model_section(**model), {**SETTINGS, **run}).on_load_checkpoint(checkpoint)
    (warning,) = warnings
    assert warning.endswith(f"with settings that differ from those of its run: {message}")


def test_a_checkpoint_that_says_nothing_is_warned_of_once(model_section, warnings):
    build(model_section()).on_load_checkpoint({})
    assert len(warnings) == 1 and "they can't be compared" in warnings[0]


def test_the_content_of_the_cuts_is_among_the_settings(model_section, tmp_path):
    cuts = tmp_path / "cuts.jsonl"
    cfg = OmegaConf.create(
        {"seed": 3, "data": None, "trainer": {"max_steps": 5}, "model": {"train_ds": {"cuts_path": str(cuts)}}}
    )
    build(model_section())  # starts the groups
    cuts.write_text("a")
    first = run_settings(cfg)
    cuts.write_text("b")
    second = run_settings(cfg)
    assert first["seed"] == 3 and first["trainer"]["max_steps"] == 5 and first["data"] is None
    differ = {key for key in first if first[key] != second[key]}
    assert differ == {CONTENT}
    assert "exp_manager" not in first  # where keys of loggers may stand
