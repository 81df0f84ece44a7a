# SPDX-License-Identifier: Apache-2.0
"""A whole run at a tiny scale, in this process: from the configuration to ``results.json``."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from hf_models import hf_llm
from omegaconf import OmegaConf

from nemo_mtbi.commands import train as training
from nemo_mtbi.commands.train import train
from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import load_text_llm

TASKS = {
    "tasks": [
        {
            "name": "transcribe",
            "scoring": "wer",
            "split": "train",
            "prompts": {"train": ["say it", "repeat it"], "heldout": ["once more"]},
        },
        {"name": "who", "scoring": "exact", "split": "train", "prompts": {"train": ["who"], "heldout": ["name it"]}},
        {"name": "first", "scoring": "exact", "split": "heldout", "prompts": {"train": ["first word"]}},
    ]
}


@pytest.fixture(scope="module")
def config(model_section, tmp_path_factory):
    """``config(**changes)``: a whole configuration; each has an ``exp_dir`` of its own."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "tasks.yaml").write_text(yaml.safe_dump(TASKS))
    sections = {
        "name": "tiny",
        "seed": 3,
        "data": {
            "cache_dir": str(folder / "cache"),
            "tasks": str(folder / "tasks.yaml"),
            "train_utterances": 6,
            "validation_utterances": 2,
            "test_utterances": 3,
            "tasks_per_cut": 2,
        },
        "model": {
            **model_section(),
            "transcription_task": "transcribe",
            "train_ds": {"cuts_path": None, "batch_size": 3, "rows_per_cut": 2, "seed": "${seed}"},
            "validation_ds": {"cuts_path": None, "batch_size": 4},
        },
        "trainer": {
            "max_steps": 3,
            "max_epochs": -1,
            "accelerator": "cpu",
            "devices": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        },
        "exp_manager": {"name": "${name}", "create_checkpoint_callback": False},
    }

    def make(**changes):
        own = tmp_path_factory.mktemp("run")
        return OmegaConf.merge(sections, {"exp_manager": {"exp_dir": str(own / "experiments")}}, changes)

    return make


@pytest.fixture(scope="module")
def run(config):
    """The path that a run returns, and its configuration."""
    pytest.importorskip("espeakng_loader")
    cfg = config()
    return train(cfg), cfg


def is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def test_results_hold_what_others_read(run):
    """The interface that stays, key by key."""
    path, cfg = run
    assert path.name == "results.json"
    results = json.loads(path.read_text())
    assert {"seed", "train", "transcription", "behavior", "tasks", "nemo"} <= results.keys()
    assert {"title", "systems", "sets", "not_measured"} <= results.keys()
    assert results["sets"]["test"]["systems"].keys() == results["systems"].keys() == {"mtbi", "text"}
    assert results["seed"] == 3
    assert results["train"]["steps"] == 3
    assert 0 < results["train"]["seconds"] < 600 and 0.1 < results["train"]["peak_rss_gib"] < 100
    assert results["transcription"]["wer"] >= 0 and results["transcription"]["n"] == 3
    counts = {"seen": 6, "heldout_wordings": 6, "heldout_tasks": 3}
    assert set(results["behavior"]) == set(counts)
    for group, n in counts.items():
        figures = results["behavior"][group]
        assert figures["n"] == n
        assert all(is_share(figures[name]) for name in ("text", "speech", "agreement"))
    assert set(results["tasks"]) == {"transcribe", "who", "first"}
    assert all(is_share(figures["agreement"]) for figures in results["tasks"].values())
    assert results["tasks"]["first"]["heldout"] and not results["tasks"]["who"]["heldout"]


def test_the_model_of_the_results_answers(run):
    path, cfg = run
    nemo = Path(json.loads(path.read_text())["nemo"])
    assert nemo.parent == path.parent and nemo.name == "tiny.nemo"
    model = MTBIModel.restore_from(str(nemo), map_location="cpu")
    test = next(Path(cfg.data.cache_dir).glob("synthetic-test-*")) / "audio" / "000"
    audio = sorted(test.glob("*.flac"))
    answers = model.generate(audio, "say it")
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)


def test_an_llm_of_hugging_face_is_trained_with(config, tmp_path):
    """Targets, training, validation, benchmark and ``.nemo``: nothing of the package asks what the LLM comes from."""
    pytest.importorskip("espeakng_loader")
    llm = str(hf_llm(tmp_path / "llm"))
    results = json.loads(train(config(model={"pretrained_llm": llm, "chat": {"audio": "before"}})).read_text())
    assert results["train"]["steps"] == 3
    model = MTBIModel.restore_from(results["nemo"], map_location="cpu")
    assert model.chat.end == "<|im_end|>" and model.cfg.pretrained_llm == llm


def test_an_llm_that_trains_is_compared_with_what_it_was(config, monkeypatch):
    """The text column of the table is the LLM's before training; the speech column is that of the trained model."""
    asked = {}

    def fake(speech, text, chosen):
        weights = [dict(one.responder.model.decoder.named_parameters()) for one in (speech, text)]
        asked["changed"] = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
        asked["text"] = text.responder.text([("say it", "red cat")])
        return real(speech, text, chosen)

    real = training.run_benchmark
    monkeypatch.setattr(training, "run_benchmark", fake)
    cfg = config(model={"llm": {"freeze": ["layers"]}})
    results = json.loads(train(cfg).read_text())
    assert asked["changed"] == {
        f"{n}.weight" for n in ("embedding.word_embeddings", "decoder.final_layernorm", "output_layer")
    }
    text = load_text_llm(cfg.model.pretrained_llm)
    limits = parse_model_config(cfg.model).generation
    assert asked["text"] == Responder(LayoutDecoder(text.chunks), text.chat, limits).text([("say it", "red cat")])
    assert MTBIModel.restore_from(results["nemo"], map_location="cpu").speech_llm.llm_state.weights_train


def test_tensorboard_gets_figures_and_examples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, _ = run
    board = EventAccumulator(str(path.parent))
    board.Reload()
    tags = board.Tags()
    assert {"train_loss", "val_loss", "val_agreement", "val_wer", "benchmark/seen"} <= set(tags["scalars"])
    assert "examples/text_summary" in tags["tensors"]
    (event,) = board.Tensors("examples/text_summary")
    assert b"answer to speech" in event.tensor_proto.string_val[0]


def own_cuts(model_section):
    """What a run of one step on cuts of the user's own needs, without a benchmark."""
    cuts = model_section().train_ds.cuts_path
    section = {"train_ds": {"cuts_path": cuts}, "validation_ds": {"cuts_path": cuts}}
    return {"data": None, "model": section, "trainer": {"max_steps": 1}}


def test_own_cuts_without_a_benchmark_end_with_the_model(config, model_section):
    path = train(config(**own_cuts(model_section)))
    assert path.name == "tiny.nemo" and path.is_file()


@pytest.mark.parametrize(
    "exp_manager, folder", [({"version": "mine"}, "mine"), ({"use_datetime_version": False}, "version_0")]
)
def test_the_folder_of_a_run_is_named_by_its_configuration(config, model_section, monkeypatch, exp_manager, folder):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
    path = train(config(**own_cuts(model_section), exp_manager=exp_manager))
    assert path.parent.name == folder
    assert not os.environ.get("NEMO_EXPM_VERSION")  # where the next run of this process would find it


def test_a_resumed_run_looks_where_nemo_saves(config, model_section, monkeypatch, capsys):
    monkeypatch.setenv("NEMO_EXPM_VERSION", "named")
    cfg = config(**own_cuts(model_section))
    manager = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True, "create_checkpoint_callback": True}
    manager |= {"checkpoint_callback_params": {"monitor": "val_loss"}}
    cfg = OmegaConf.merge(cfg, {"exp_manager": manager, "trainer": {"val_check_interval": 1}})
    for times in (0, 1):
        assert train(cfg.copy()).parent.name == "named"
        assert capsys.readouterr().out.count("resuming ·") == times


def test_the_benchmark_can_be_left_to_others(config, model_section):
    section = own_cuts(model_section)
    cuts = section["model"]["train_ds"]["cuts_path"]
    assert train(config(**section, benchmark={"cuts": cuts, "enabled": False})).name == "tiny.nemo"


def test_own_cuts_can_have_a_benchmark(config, model_section):
    section = own_cuts(model_section)
    asked = {"cuts": section["model"]["train_ds"]["cuts_path"], "tasks": config().data.tasks}
    path = train(config(**section, benchmark=asked, exp_manager={"create_tensorboard_logger": False}))
    results = json.loads(path.read_text())
    assert results["behavior"]["seen"]["n"] == 16
    assert results["behavior"]["seen"]["text"] is None  # these cuts hold no right answers
    assert is_share(results["behavior"]["seen"]["agreement"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modell": {}}, "unknown section modell: did you mean 'model'"),
        ({"zzz": 1}, "unknown section zzz: known keys: name, seed, data"),
        ({"name": None}, "name is missing"),
        ({"seed": None}, "seed is missing"),
        ({"model": None}, "model is missing"),
        ({"trainer": None}, "trainer is missing"),
        ({"exp_manager": None}, "exp_manager is missing"),
        ({"model": {"train_ds": None}}, "model.train_ds is missing"),
        ({"model": {"optim": None}}, "model.optim is missing"),
        ({"model": {"connector": {"knd": "conv"}}}, "unknown key model.connector.knd: did you mean 'kind'"),
        ({"model": {"train_ds": {"batch_tokens": 100}}}, "batch_size and batch_tokens are both set"),
        ({"model": {"validation_ds": {"batch_siez": 1}}}, "unknown data key 'batch_siez': did you mean 'batch_size"),
        ({"data": {"knd": "digits"}}, "unknown key data.knd: did you mean 'kind'"),
        ({"benchmark": {"taks": "demo"}}, "unknown key benchmark.taks: did you mean 'tasks'"),
        ({"benchmark": {"tasks": "/nowhere.yaml"}}, "/nowhere.yaml: cannot read the task pool"),
        ({"trainer": {"max_step": 1}}, "unknown key trainer.max_step: did you mean 'max_steps'"),
        ({"exp_manager": {"exp_dirr": "x"}}, "unknown key exp_manager.exp_dirr: did you mean 'exp_dir'"),
        ({"model": {"optim": {"lr": "${nowhere}"}}}, "nowhere"),
    ],
)
def test_all_sections_are_checked_before_any_work(config, monkeypatch, changes, message):
    monkeypatch.setattr(training, "prepare", lambda *args: pytest.fail("work has begun"))
    monkeypatch.setattr(training, "MTBIModel", lambda *args: pytest.fail("work has begun"))
    cfg = config(**changes)
    for name, value in changes.items():  # a merge keeps what stands beside None
        if value is None:
            cfg[name] = None
    with pytest.raises(ValueError, match=message) as error:
        train(cfg)
    assert "\n" not in str(error.value)


def test_devices_must_be_what_torchrun_has_started(config, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started 2 processes.*trainer.devices is 1: set it to 2, or"):
        train(config())
    training._check(config(trainer={"devices": 2}))
    training._check(config(trainer={"devices": "auto"}))


def test_a_config_that_hydra_has_closed_works_too(config, monkeypatch):
    """Hydra's configurations refuse keys that they do not have, also to those who only ask."""
    monkeypatch.setattr(training, "prepare", lambda data, model: pytest.fail(f"{data.kind}, {model.generation}"))
    cfg = config()
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(pytest.fail.Exception, match="synthetic, .*max_new_tokens=8,"):
        train(cfg)


def test_what_the_model_section_leaves_out_has_its_default_in_the_data_too(config, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda data, model: pytest.fail(f"{model.generation}"))
    cfg = config()
    del cfg.model.generation
    with pytest.raises(pytest.fail.Exception, match="max_new_tokens=64,"):
        train(cfg)


def test_the_benchmark_asks_its_own_tasks_about_its_own_cuts():
    from nemo_mtbi.commands.train import BenchmarkConfig, benchmark_source
    from nemo_mtbi.demo.recipe import Prepared, load_pool

    made, own = load_pool("demo"), load_pool("demo").subset(["transcribe"])
    prepared = Prepared(Path("train"), Path("val"), Path("test"), "demo", made)
    assert benchmark_source(BenchmarkConfig(cuts="mine", tasks="own.yaml"), own, prepared) == (own, "mine")
    assert benchmark_source(BenchmarkConfig(), own, prepared) == (made, "test")
