# SPDX-License-Identifier: Apache-2.0
"""Plans against runs: parameters of every process, steps of an epoch, and everything that would be refused at once."""

import pickle
import resource
import time

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_mtbi.demo.recipe import load_pool
from nemo_mtbi.parallel import groups
from nemo_mtbi.planning import data_checks
from nemo_mtbi.planning.build import make_plan
from nemo_mtbi.planning.checks import check_world, device_names
from nemo_mtbi.planning.layout_table import own_facts
from nemo_mtbi.planning.plan import Plan
from nemo_mtbi.speech_llm.pretrained import DEMO, load_speech_llm
from nemo_mtbi.testing import VOCABULARY

TRAINER = {"devices": 1, "accelerator": "cpu"}


@pytest.fixture
def planned(model_section):
    """``planned(model={}, trainer={}, ...)``: the plan of the tiny model with changes."""

    def run(model=None, trainer=None, *checks, environ=None, **given):
        section = model_section(**{"micro_batch_tokens": 200, **(model or {})})
        cfg = OmegaConf.create({"model": section, "trainer": {**TRAINER, **(trainer or {})}})
        return make_plan(cfg, *checks, environ=environ or {}, **given)

    return run


# ---------------------------------------------------------------------------------------------------------- parameters


def build_and_compare(path, pretrained_asr, pretrained_llm):
    """Worker: the model of this process holds what the plan says."""
    from nemo_mtbi.config.connector import ConnectorConfig

    with open(path, "rb") as file:
        layout, connector, ranks = pickle.load(file)
    groups.initialize(layout)
    model, _ = load_speech_llm(pretrained_asr, pretrained_llm, ConnectorConfig(**connector))
    found, planned = own_facts(model), ranks[groups.dist.get_rank()]
    assert (found.place, found.trained, found.frozen) == (planned.place, planned.trained, planned.frozen)


LAYOUTS = {  # name: model keys and processes
    "one": ({}, 1),
    "tp2": ({"tensor_model_parallel_size": 2}, 2),
    "pp2": ({"pipeline_model_parallel_size": 2}, 2),
    "pp2_vp2": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 2),
    "tp2_pp2": ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4),
    "tp2_dp2": ({"tensor_model_parallel_size": 2}, 4),
}


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """A text LLM for every layout: four layers, and a vocabulary that must be padded."""
    from nemo_mtbi.testing import tiny_text_llm

    changes = dict(num_layers=4, vocab_size=VOCABULARY + 1, tie_embeddings=True)
    return tiny_text_llm(tmp_path_factory.mktemp("llm"), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["tiny", "demo"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_those_of_the_models_that_are_built(
    name, parts, planned, four_layers, model_section, tmp_path, processes
):
    keys, count = LAYOUTS[name]
    asr, llm = (model_section().pretrained_asr, str(four_layers)) if parts == "tiny" else ("demo", "demo")
    connector = {"hidden_size": 24, "kind": "conv" if parts == "tiny" else "stack"}
    changes = {**keys, "pretrained_asr": asr, "pretrained_llm": llm, "connector": connector}
    changes["targets"] = {"allow_foreign": True}
    plan = planned(changes, {"devices": count})
    assert not plan.problems and len(plan.ranks) == plan.world == count
    (tmp_path / "plan.pkl").write_bytes(pickle.dumps((plan.layout, connector, plan.ranks)))
    processes(build_and_compare, tmp_path / "plan.pkl", asr, llm, count=count, timeout=120)


def demo(*overrides):
    with initialize_config_dir(str(DEMO.parents[2] / "conf"), version_base=None):
        return compose("mtbi_demo", overrides=list(overrides))


def test_the_demo_configuration_is_not_refused():
    cfg = demo()
    plan = make_plan(cfg, environ={})
    assert plan.problems == [] and plan.steps_per_epoch == "unknown until the corpus of 3000 utterances is built"
    assert plan.step.positions == cfg.model.train_ds.batch_tokens
    (fact,) = plan.ranks
    assert fact.trained == 608_448  # of the released .nemo


def test_what_is_prepared_before_training_is_said():
    cfg = demo("+data.prompts_per_task=2", "model.train_ds.cuts_path=mine.jsonl.gz")
    plan = make_plan(cfg, environ={})
    trained = load_pool("demo").train
    count = f"{3000 * 8 * 2:,} train, {40 * len(trained)} validation"
    corpus, asked, kept = plan.preparation
    assert "3190 utterances are spoken by espeak-ng" in corpus and "data=null leaves all of this out" in kept
    assert "are put to the LLM model.pretrained_llm=demo" in asked and asked.endswith(count)
    (note,) = plan.notes
    assert note.startswith("model.train_ds.cuts_path=mine.jsonl.gz is not read") and "data=null" in note


# -------------------------------------------------------------------------------------------------------- large models


@pytest.fixture
def large(tmp_path):
    """The directory of a 70B LLM whose weights have not been copied yet."""
    architecture = dict(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        vocab_size=128256,
        max_sequence_length=8192,
        rotary_base=500000.0,
        tie_embeddings=False,
    )
    settings = yaml.safe_load((DEMO / "llm" / "llm.yaml").read_text())
    (tmp_path / "llm.yaml").write_text(yaml.safe_dump({**settings, "architecture": architecture}))
    (tmp_path / "tokenizer.model").write_bytes((DEMO / "llm" / "tokenizer.model").read_bytes())
    return tmp_path


def test_70b_is_planned_at_once_and_without_memory(large, planned, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a plan must not do this")

    for owner, name in (
        (torch.distributed, "init_process_group"),
        (torch.cuda, "init"),
        (torch.cuda, "_lazy_init"),
        (groups, "initialize"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    changes = {
        "pretrained_llm": str(large),
        "pretrained_asr": "demo",
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": 5,
        "sequence_parallel": True,
        "activations_checkpoint_granularity": "selective",
        "micro_batch_tokens": 8192,
        "targets": {"allow_foreign": True},
    }
    planned({"pretrained_asr": "demo"})  # imports are not counted
    held, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = planned(changes, {"devices": 8, "num_nodes": 8}, frozen_dtype="bfloat16")
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200 * 1024  # KiB
    assert plan.problems == [f"model.pretrained_llm={large}: {large} lacks model.safetensors"]
    assert len(plan.ranks) == 64 and plan.replicas == 2
    assert plan.ranks[17].place.stage == 1 and plan.ranks[17].place.runs[0] == (4, 5, 6, 7)
    speech = plan.stages[0].frozen - plan.stages[0].weights[0].factors[0][0]
    whole = 8 * (sum(stage.frozen for stage in plan.stages) - speech)
    assert whole == 70_553_706_496 + 7 * 8192 * (2 * 80 + 1)  # norms stand on each tensor-parallel process
    assert plan.stages[1].weights[0].size == 2 * plan.stages[1].frozen
    choices = [plan.choices[choice, split] for split in (False, True) for choice in (None, "selective", "full")]
    assert choices == sorted(choices[:3])[::-1] + sorted(choices[3:])[::-1] and choices[0] > choices[3]


# ------------------------------------------------------------------------------------------------------------ problems


def test_all_problems_are_told_and_not_only_the_first(planned):
    plan = planned(
        {
            "tensor_model_parallel_size": 3,
            "pipeline_model_parallel_size": 4,
            "micro_batch_tokens": 0,
            "on_bad_audio": "ignore",
            "pretrained_asr": "/nowhere",
            "generation": {"max_new_tokens": 0},
            "activations_checkpoint_granularity": "some",
        },
        {"devices": 5, "accumulate_grad_batches": 2},
    )
    for part in (
        "5 processes do not divide by tensor x pipeline = 3 x 4",
        "4 attention heads, which 3 tensor-parallel",
        "2 query groups, which 3 tensor-parallel",
        "2 layers, which 4 pipeline stages",
        "model.micro_batch_tokens is 0",
        "model.on_bad_audio is 'ignore'",
        "model.pretrained_asr=/nowhere",
        "max_new_tokens",
        "model.activations_checkpoint_granularity is 'some'",
        "trainer.accumulate_grad_batches must be 1",
    ):
        assert sum(part in problem for problem in plan.problems) == 1, part
    assert len(plan.problems) == 10 and plan.ranks == [] and plan.stages == []


@pytest.mark.parametrize(
    "model, message",
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0; it must be at least 1"),
        ({"tensor_model_parallel_size": "two"}, "model.tensor_model_parallel_size"),
        ({"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size of at least 2"),
        ({"virtual_pipeline_model_parallel_size": 2}, "both must be at least 2, or leave the former null"),
        ({"mirco_batch_tokens": 5}, "unknown key model.mirco_batch_tokens: did you mean 'micro_batch_tokens'"),
        ({"connector": {"frame_rate": 40}}, "model.connector.frame_rate 40.0 Hz can't be made"),
        ({"lora": {"target_modules": ["q_proj"]}}, "'q_proj', which matches no layer"),
        ({"chat": {"format": "qwen", "system": "x"}}, "qwen has no plain system turn"),
        ({"train_ds": {"batch_tokens": 5, "batch_size": 5}}, "batch_size and batch_tokens are both set"),
        ({"train_ds": {"cuts_path": "/nowhere.jsonl"}}, "cuts_path: there is no '/nowhere.jsonl'"),
        ({"train_ds": {"ratio": 3}}, "unknown data key 'ratio'"),
        ({"validation_ds": {"ratio": 3}}, "unknown data key 'ratio'"),
        ({"pretrained_llm": "/nowhere"}, "model.pretrained_llm=/nowhere: /nowhere does not exist"),
        ({"pretrained_llm": "demo"}, "come from another"),
        ({"optim": "${nothing}"}, "config"),
    ],
)
def test_what_would_be_refused(model, message, planned):
    (problem,) = planned(model).problems
    assert message in problem


def test_further_checks_are_asked(planned):
    def check(cfg):
        raise ValueError(f"no {cfg.trainer.accelerator} today")

    assert planned({}, {}, check).problems == ["no cpu today"]


def test_an_llm_whose_weights_are_not_its_own(planned, model_section, tmp_path):
    from shutil import copytree

    llm = copytree(model_section().pretrained_llm, tmp_path / "llm")
    settings = yaml.safe_load((llm / "llm.yaml").read_text())
    settings["architecture"]["num_layers"] = 3
    (llm / "llm.yaml").write_text(yaml.safe_dump(settings))
    plan = planned({"pretrained_llm": str(llm), "targets": {"allow_foreign": True}})
    assert len(plan.problems) == 1 and "weights, but the LLM of its llm.yaml has" in plan.problems[0]


def test_a_directory_that_is_no_llm(planned, tmp_path):
    problems = planned({"pretrained_llm": str(tmp_path)}).problems
    assert [problem.rsplit(" ", 1)[-1] for problem in problems[:3]] == [
        "llm.yaml",
        "model.safetensors",
        "tokenizer.model",
    ]


# --------------------------------------------------------------------------------------------------------------- world


@pytest.mark.parametrize(
    "trainer, environ, world, per_node",
    [
        ({}, {}, 1, 1),
        ({"devices": 4, "num_nodes": 2}, {}, 8, 4),
        ({"devices": [0, 3]}, {}, 2, 2),
        ({"devices": "0,1,5"}, {}, 3, 3),
        ({"devices": "2"}, {}, 2, 2),
        ({"devices": 2, "num_nodes": 2}, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4, 2),
    ],
)
def test_the_number_of_processes(trainer, environ, world, per_node):
    plan = Plan()
    assert check_world(plan, trainer, environ) == per_node
    assert (plan.world, plan.problems, plan.notes) == (world, [], [])


@pytest.mark.parametrize("devices", ["auto", -1])
def test_a_number_that_only_the_machine_knows_is_noted(devices):
    plan = Plan()
    check_world(plan, {"devices": devices}, {})
    assert plan.world == 1 and f"trainer.devices is {devices}" in plan.notes[0]


def test_torchrun_with_another_number_of_processes(planned):
    (problem,) = planned({}, {"devices": 2}, environ={"WORLD_SIZE": "4"}).problems
    assert problem.startswith("4 processes were started, but trainer.devices x num_nodes = 2 x 1")


def test_devices_that_are_no_number(planned):
    assert "invalid literal" in planned({}, {"devices": "many"}).problems[0]


def test_names_of_devices():
    assert device_names(2, 2, "gpu") == ["cuda:0", "cuda:1"]
    assert device_names(2, 2, "cpu") == ["cpu", "cpu"]
    assert device_names(3, 2, "auto") == ["node 0 device:0", "node 0 device:1", "node 1 device:0"]


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("devices", [1, 2])
def test_steps_of_an_epoch_are_those_of_the_loader(devices, planned):
    plan = planned({}, {"devices": devices})
    assert plan.steps_per_epoch == str(2 // devices)  # eight utterances, four in a batch
    assert plan.step.cuts == 4 and plan.load.positions >= plan.step.row > 0
    assert plan.load.longest == plan.step.row + 8  # max_new_tokens


def test_more_batches_than_are_looked_at_are_estimated(planned, monkeypatch):
    monkeypatch.setattr(data_checks, "SAMPLED_BATCHES", 1)
    assert planned().steps_per_epoch == "about 2, from 8 utterances"


def test_a_stream_has_no_epoch(planned):
    plan = planned({"train_ds": {"force_iterable_dataset": True}})
    assert plan.problems == [] and plan.steps_per_epoch == "none: the data are a stream"


def test_the_largest_microbatch_is_bounded(planned):
    small, large = planned({"micro_batch_tokens": 1}), planned({"micro_batch_tokens": 10**6})
    assert small.load.positions == small.step.row and small.load.microbatches > 1
    assert large.load.positions == large.step.positions and large.load.microbatches == 1


@pytest.mark.parametrize(
    "optim, states", [({"name": "adamw"}, 2), ({"name": "sgd"}, 0), ({"name": "sgd", "momentum": 0.9}, 1)]
)
def test_states_of_the_optimizer(optim, states, planned):
    plan = planned({"optim": {**optim, "lr": 0.1}})
    (term,) = plan.stages[0].training
    assert term.size == plan.stages[0].trained * (2 + states) * 4 and plan.notes == []


def test_an_optimizer_of_unknown_size_is_noted(planned):
    plan = planned({"optim": {"name": "novograd"}})
    assert "counted with 2 states" in plan.notes[0] and plan.stages[0].training[0].factors[1][0] == 4
