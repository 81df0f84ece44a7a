# SPDX-License-Identifier: Apache-2.0
"""The whole model at a tiny scale: what is trained, what is saved, what it answers."""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tar_tricks
import torch
from lhotse import CutSet
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import OmegaConf

from nemo_mtbi.config.model import FORMAT_VERSION
from nemo_mtbi.demo.corpora.corpus import write_flac
from nemo_mtbi.models import steps
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.speech_llm.trainable import CONNECTOR
from nemo_mtbi.testing import tiny_asr_nemo, tiny_cuts

ROOT = Path(__file__).resolve().parents[2]
RATE = 16000
PROMPTS = ["say it", "first word", "count it"]


def trainer(steps, callbacks=(), **changes):
    settings = dict(max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, num_sanity_val_steps=0)
    settings |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings |= dict(use_distributed_sampler=False, limit_val_batches=0)
    return Trainer(**{**settings, **changes}, callbacks=list(callbacks))


def fit(section, steps, seed=0, callbacks=(), **changes):
    """A model after some steps."""
    seed_everything(seed, verbose=False)
    runner = trainer(steps, callbacks, **changes)
    model = MTBIModel(section, runner)
    runner.fit(model)
    assert runner.global_step == steps
    return model


def weights(module):
    """Parameters and buffers, those that ``state_dict`` leaves out too."""
    return {name: value.clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Recorder(Callback):
    """Losses and connector weights after each step."""

    def __init__(self):
        self.losses, self.weights = [], []

    def on_train_batch_end(self, trainer, module, *unused):
        self.losses.append(float(trainer.callback_metrics.get("train_loss", "nan")))
        self.weights.append(weights(module.speech_llm.connector))


@pytest.fixture(scope="module")
def model(model_section):
    """A model after a few steps. Read only."""
    return fit(model_section(), 4)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.nemo"
    model.save_to(str(path))
    return path


# Training ------------------------------------------------------------


def test_only_the_connector_is_trained_and_saved(model):
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {CONNECTOR.prefix + name for name, _ in model.speech_llm.connector.named_parameters()}
    assert set(model.state_dict()) == trained
    (group,) = model.trainer.optimizers[0].param_groups
    assert {id(value) for value in group["params"]} == {id(value) for value in model.speech_llm.connector.parameters()}


def test_the_frozen_parts_stay_bit_for_bit_as_they_are(model_section):
    seed_everything(0, verbose=False)
    runner = trainer(5)
    model = MTBIModel(model_section(), runner)
    before = weights(model)
    runner.fit(model)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(CONNECTOR.prefix)}


def test_the_loss_of_a_batch_falls_when_it_is_learned_by_heart(model_section, tmp_path):
    """As far as frames can steer an LLM of random weights: 4.7 to 3.0."""
    cut = next(iter(CutSet.from_file(model_section().train_ds.cuts_path)))
    cut.custom["behaviors"] = [row for row in cut.custom["behaviors"] if row["task"] == "first"][:1]
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl.gz")
    record, data = Recorder(), {"cuts_path": str(tmp_path / "cuts.jsonl.gz")}
    fit(model_section(train_ds=data, interleave=None, connector={"hidden_size": 64}), 60, callbacks=[record])
    assert record.losses[-1] < 0.7 * record.losses[0]
    assert all(after < before for before, after in zip(record.losses[::10], record.losses[10::10], strict=False))


def test_a_run_depends_on_its_seed_alone(model_section):
    section = model_section(train_ds={"shuffle": True})
    one, two = (weights(fit(section, 4, seed=7).speech_llm.connector) for _ in range(2))
    other = weights(fit(section, 4, seed=8).speech_llm.connector)
    assert same(one, two)
    assert not same(one, other)


def test_a_section_may_point_to_keys_outside_of_it(model_section):
    whole = OmegaConf.create({"seed": 5, "model": model_section(train_ds={"seed": "${seed}"})})
    model = MTBIModel(whole.model)
    assert model.cfg.train_ds.seed == 5
    assert len(next(iter(model._train_dl)).cut_ids) == 4


def test_the_data_depend_on_the_datas_seed(model_section):
    one, two = (
        weights(fit(model_section(train_ds={"shuffle": True, "seed": seed}), 4).speech_llm.connector)
        for seed in (0, 1)
    )
    assert not same(one, two)


def test_validation_reports_loss_agreement_and_word_error_rate(model_section):
    runner = trainer(2, limit_val_batches=1.0, check_val_every_n_epoch=None, val_check_interval=2)
    model = MTBIModel(model_section(), runner)
    runner.fit(model)
    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert {"train_loss", "val_loss", "val_agreement", "val_f1", "val_wer"} <= found.keys()
    assert found["val_loss"] > 0 and found["val_wer"] > 0
    assert 0 <= found["val_agreement"] <= found["val_f1"] <= 1


def test_a_loss_that_compares_with_the_text_reports_its_parts(model_section):
    runner = trainer(2, limit_val_batches=1.0, check_val_every_n_epoch=None, val_check_interval=2)
    section = model_section(loss={"ce_weight": 0.5, "kl_weight": 2.0, "divergence": "js"})
    model = MTBIModel(section, runner)
    assert model.config.loss.divergence == model.speech_llm.loss.divergence == "js"
    runner.fit(model)
    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    for stage in ("train", "val"):
        assert found[f"{stage}_ce"] > 0 and found[f"{stage}_kl"] > 0
        assert found[f"{stage}_loss"] == pytest.approx(0.5 * found[f"{stage}_ce"] + 2 * found[f"{stage}_kl"])
    (batch,) = model._validation_dl
    _, parts = model.speech_llm.evaluate_step(batch)
    assert found["val_kl"] == pytest.approx(parts["kl"].item() / batch.num_targets)


def test_cross_entropy_alone_makes_no_twins_and_reports_no_parts(model):
    assert model.config.loss.uses_teacher is False
    assert next(iter(model._train_dl)).twins is None
    assert not {"train_ce", "train_kl"} & model.trainer.callback_metrics.keys()


def test_the_figures_of_validation_are_those_of_generate_and_of_the_loss(model, model_section, monkeypatch):
    """Rows, answers and loss from outside of the validation loop."""
    heard, step = [], model.validation_step
    monkeypatch.setattr(model, "validation_step", lambda *args: heard.append(step(*args)) or heard[-1])
    (metrics,) = trainer(1, limit_val_batches=1.0).validate(model, verbose=False)
    (batch,) = model._validation_dl
    cuts = {cut.id: cut.load_audio() for cut in CutSet.from_file(model_section().validation_ds.cuts_path)}
    answers = model.generate([cuts[row.cut_id] for row in batch.rows], [row.instruction for row in batch.rows])
    assert heard[0]["answers"] == answers and len(answers) == 8 * 8
    right = [answer == row.reference for answer, row in zip(answers, batch.rows, strict=True)]
    assert metrics["val_agreement"] == pytest.approx(np.mean(right))
    assert metrics["val_loss"] == pytest.approx(model.speech_llm.evaluate_step(batch).loss.item() / batch.num_targets)


def test_gradient_accumulation_is_refused_with_the_remedy(model_section):
    runner = trainer(2, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1: .*raise model.train_ds.batch_tokens"):
        runner.fit(MTBIModel(model_section(), runner))


# Bad data ------------------------------------------------------------


def with_silence(section, folder, silent):
    """The data of ``section`` in a folder of their own; the utterances whose numbers are in ``silent`` are silent."""
    cuts = tiny_cuts(folder, 8, llm=section.pretrained_llm)
    for number, cut in enumerate(CutSet.from_file(cuts)):
        if number in silent:
            write_flac(Path(cut.recording.sources[0].source), np.zeros(cut.num_samples))
    section.train_ds.cuts_path = section.validation_ds.cuts_path = str(cuts)
    section.on_bad_audio = "skip"
    return section


def test_a_step_without_a_usable_cut_moves_no_weight(model_section, tmp_path):
    record = Recorder()
    fit(with_silence(model_section(), tmp_path, range(4, 8)), 2, callbacks=[record])
    first, second, third = record.weights  # the second one has no usable cut, and is no step
    assert same(first, second)  # in spite of the optimizer's momentum
    assert not same(second, third)


def test_what_was_left_out_is_reported_at_the_end_of_each_epoch(model_section, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(steps.logging, "warning", heard.append)
    fit(with_silence(model_section(), tmp_path, [1, 5, 6]), 4)
    assert heard == ["left out in epoch 0: silent: 3", "left out in epoch 1: silent: 3"]


def test_an_unusable_cut_ends_the_run_by_default(model_section, tmp_path):
    section = with_silence(model_section(), tmp_path, [1])
    section.on_bad_audio = "raise"
    with pytest.raises(ValueError, match="tiny-0-0001 is silent.*set on_bad_audio: skip"):
        fit(section, 1)


def test_rows_that_the_llm_cannot_take_are_left_out_and_counted(model_section, tmp_path):
    """40 s of speech are 250 frames, but the tiny LLM takes 128 positions, 8 of them for the answer."""
    section = model_section(on_bad_audio="skip")
    cuts = list(CutSet.from_file(section.train_ds.cuts_path))
    write_flac(tmp_path / "long.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 40 * RATE))
    cuts[2].recording.sources[0].source = str(tmp_path / "long.flac")
    cuts[2].recording.num_samples, cuts[2].recording.duration = 40 * RATE, 40.0
    cuts[2].duration = cuts[2].supervisions[0].duration = 40.0
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    section.train_ds.cuts_path = section.validation_ds.cuts_path = str(tmp_path / "cuts.jsonl.gz")
    model = MTBIModel(section)
    for loader, rows in ((model._train_dl, 2), (model._validation_dl, 8)):
        assert sum(batch.skipped.get("row_length", 0) for batch in loader) == rows
    trainer(1, limit_val_batches=1.0).validate(model, verbose=False)


# .nemo ------------------------------------------------------------

RESTORE = """
import json, sys
import numpy as np
from nemo_mtbi import MTBIModel
model = MTBIModel.restore_from(sys.argv[1], map_location="cpu")
audio = list(np.load(sys.argv[2]).values())
print("answers:", json.dumps(model.generate(audio=audio, prompts=json.loads(sys.argv[3]))))
"""


def test_a_new_process_gives_the_same_answers(model, saved, model_section, tmp_path):
    cuts = CutSet.from_file(model_section().train_ds.cuts_path).subset(first=3)
    utterances = [cut.load_audio() for cut in cuts]
    expected = model.generate(utterances, PROMPTS)
    assert len(set(expected)) == 3  # the audio and the prompts matter
    np.savez(tmp_path / "audio.npz", *utterances)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", RESTORE, str(saved), str(tmp_path / "audio.npz"), json.dumps(PROMPTS)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = next(line for line in done.stdout.splitlines() if line.startswith("answers: "))
    assert json.loads(answers.removeprefix("answers: ")) == expected


def test_a_restored_model_has_the_same_weights_and_can_be_trained_on(saved, model, model_section):
    restored = MTBIModel.restore_from(str(saved), map_location="cpu")
    assert same(weights(restored), weights(model))
    section = model_section()
    restored.setup_training_data(section.train_ds)
    assert len(next(iter(restored._train_dl)).cut_ids) == 4


def test_a_model_is_restored_where_its_data_are_not(saved, model, model_section):
    cuts = Path(model_section().train_ds.cuts_path)
    away = cuts.rename(cuts.with_name("away.jsonl.gz"))
    try:
        restored = MTBIModel.restore_from(str(saved), map_location="cpu")
    finally:
        away.rename(cuts)
    assert restored._train_dl is None and restored._validation_dl is None
    assert same(weights(restored), weights(model))


def test_the_archive_holds_config_and_tensors_and_no_pickle(saved):
    with tarfile.open(saved) as archive:
        names = {Path(member.name).name for member in archive.getmembers() if member.isfile()}
    assert names == {"model_config.yaml", "model_weights.safetensors", "llm.yaml", "tokenizer.model", "digests.json"}
    stored = MTBIModel.restore_from(str(saved), return_config=True)
    assert stored.format_version == FORMAT_VERSION
    assert stored.target == "nemo_mtbi.models.mtbi_model.MTBIModel"
    assert set(stored.fingerprints) == {"asr", "llm"}


def test_a_frozen_part_that_has_moved_can_be_named_anew(saved, tmp_path, model):
    stored = MTBIModel.restore_from(str(saved), return_config=True)
    moved = Path(stored.pretrained_llm).rename(tmp_path / "moved")
    try:
        with pytest.raises(ValueError, match="model.pretrained_llm=.* does not exist"):
            MTBIModel.restore_from(str(saved))
        stored.pretrained_llm = str(moved)
        assert same(weights(MTBIModel.restore_from(str(saved), override_config_path=stored)), weights(model))
    finally:
        moved.rename(model.cfg.pretrained_llm)


def repacked(saved, path, change=None, drop=()):
    """A copy of the archive whose configuration is changed, or without some files."""

    def alter(files):
        for name in drop:
            del files[name]
        if change:
            files["model_config.yaml"] = change(files["model_config.yaml"])

    tar_tricks.repacked(saved, path, alter)


NO_ARCHIVES = {
    "text": lambda saved, path: path.write_text("no archive"),
    "empty": lambda saved, path: path.write_bytes(b""),
    "half": lambda saved, path: path.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2]),
    "folder": lambda saved, path: path.mkdir(),
    "missing": lambda saved, path: None,
    "no configuration": lambda saved, path: repacked(saved, path, drop=["model_config.yaml"]),
    "no weights": lambda saved, path: repacked(saved, path, drop=["model_weights.safetensors"]),
    "configuration is a list": lambda saved, path: repacked(saved, path, lambda content: b"[1, 2]"),
    "configuration is no YAML": lambda saved, path: repacked(saved, path, lambda content: b"a: [1,"),
    "another model": lambda saved, path: tiny_asr_nemo(path),
}


@pytest.mark.parametrize("kind", NO_ARCHIVES)
def test_what_is_no_nemo_of_ours_is_one_clear_error(saved, tmp_path, kind):
    path = tmp_path / "thing.nemo"
    NO_ARCHIVES[kind](saved, path)
    with pytest.raises(ValueError, match="thing.nemo can't be restored: it .* MTBI model"):
        MTBIModel.restore_from(str(path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: content + b"\nunheard_of: 1\n", "unknown key model.unheard_of"),
        (lambda content: content.replace(b"format_version: 3", b"format_version: 99"), "install a newer nemo_mtbi"),
    ],
)
def test_an_archive_from_the_future_says_so(saved, tmp_path, change, message):
    repacked(saved, tmp_path / "future.nemo", change)
    with pytest.raises(ValueError, match=message):
        MTBIModel.restore_from(str(tmp_path / "future.nemo"))


def test_weights_of_another_connector_are_refused(model, model_section):
    other = MTBIModel(model_section(connector={"kind": "stack"}))
    with pytest.raises(ValueError, match="does not fit model.connector; missing or unknown: speech_llm.connector."):
        other.load_state_dict(model.state_dict())


def test_conversations_train_beside_utterances(model_section, tmp_path):
    """Several audios, one, or none in a conversation, and utterances with their tasks, in one step."""
    section = model_section()
    cuts = section.train_ds.cuts_path
    audio = next(iter(CutSet.from_file(cuts))).recording
    heard = {"from": "User", "type": "audio", "value": audio.sources[0].source, "duration": audio.duration}
    said = {"from": "User", "type": "text", "value": "say it"}
    answer = {"from": "Assistant", "type": "text", "value": "one two"}
    path = tmp_path / "conversations.jsonl"
    asked = ([said, heard, answer], [heard, said, heard, answer], [said, answer])
    lines = [json.dumps({"id": f"c{i}", "conversations": turns}) for i, turns in enumerate(asked)]
    path.write_text("\n".join(lines) + "\n")
    talk = {"type": "multimodal_conversation", "manifest_filepath": str(path), "audio_locator_tag": "<audio>"}
    blend = [{**talk, "weight": 0.6}, {"type": "lhotse", "cuts_path": cuts, "weight": 0.4}]
    section.train_ds = {"input_cfg": blend, "batch_size": 6, "rows_per_cut": 2, "force_iterable_dataset": True}
    model = MTBIModel(section)
    seen = Counter()
    for batch in islice(model._train_dl, 5):
        loss = model.speech_llm.train_step(batch, batch.num_targets).loss
        assert torch.isfinite(loss)
        seen.update(name[:4] for name in batch.cut_ids)
        seen.update(batch.stats)
    assert seen["conversations"] and seen["tiny"] and seen["c0_r"] + seen["c1_r"]
    assert all(value.grad is not None for value in model.trained)
