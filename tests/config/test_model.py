# SPDX-License-Identifier: Apache-2.0
"""The ``model:`` section: what is refused, and what the message says."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_mtbi.config.connector import ConnectorConfig
from nemo_mtbi.config.encoder import EncoderSection, SecondEncoder
from nemo_mtbi.config.interleave import InterleaveConfig, InterleaveSchedule
from nemo_mtbi.config.model import FORMAT_VERSION, parse_model_config
from nemo_mtbi.data.loader_config import check_config

CONF = Path(__file__).resolve().parents[2] / "conf"
BASE = {"pretrained_asr": "demo", "pretrained_llm": "demo"}


def test_what_is_left_out_has_a_default():
    config = parse_model_config(BASE)
    assert config.connector == ConnectorConfig()
    assert config.on_bad_audio == "raise" and not config.targets.allow_foreign
    assert config.format_version == FORMAT_VERSION


def test_a_dict_config_and_a_mapping_mean_the_same():
    given = {**BASE, "connector": {"kind": "stack"}, "interleave": None}
    assert parse_model_config(OmegaConf.create(given)) == parse_model_config(given)
    assert parse_model_config(given).interleave is None


@pytest.mark.parametrize("given", [dict, OmegaConf.create])
def test_a_section_within_a_section_that_is_optional_can_be_given(given):
    schedule = {"epochs": 4, "text_share": 0.9}
    found = parse_model_config(given({**BASE, "interleave": {"unit": "word", "schedule": schedule}})).interleave
    assert found == InterleaveConfig(unit="word", schedule=InterleaveSchedule(epochs=4, text_share=0.9))
    beside = {"path": "demo", "pad": False}
    encoder = parse_model_config(given({**BASE, "encoder": {"beside": beside}})).encoder
    assert encoder == EncoderSection(beside=SecondEncoder(path="demo", pad=False))


def test_interpolations_within_the_section_are_resolved():
    assert parse_model_config({**BASE, "pretrained_asr": "${pretrained_llm}"}).pretrained_asr == "demo"


def test_interpolations_may_point_out_of_the_section():
    whole = OmegaConf.create({"asr": "demo", "model": {**BASE, "pretrained_asr": "${asr}"}})
    assert parse_model_config(whole.model).pretrained_asr == "demo"


def test_the_callers_config_is_left_as_it_is():
    given = OmegaConf.create({**BASE, "micro_batch_tokens": 7})
    before = OmegaConf.to_yaml(given)
    parse_model_config(given)
    assert OmegaConf.to_yaml(given) == before


@pytest.mark.parametrize(
    "extra, key, nearest",
    [
        ({"conector": {}}, "model.conector", "connector"),
        ({"on_bad_adio": "skip"}, "model.on_bad_adio", "on_bad_audio"),
        ({"connector": {"frame_rat": 6}}, "model.connector.frame_rat", "frame_rate"),
        ({"interleave": {"probabilty": 1}}, "model.interleave.probabilty", "probability"),
        ({"generation": {"max_new_token": 1}}, "model.generation.max_new_token", "max_new_tokens"),
        ({"targets": {"allow_foregin": True}}, "model.targets.allow_foregin", "allow_foreign"),
        ({"interleave": {"schedule": {"epoch": 4}}}, "model.interleave.schedule.epoch", "epochs"),
        ({"loss": {"kl_wieght": 1.0}}, "model.loss.kl_wieght", "kl_weight"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(extra, key, nearest):
    with pytest.raises(ValueError, match=f"^unknown key {key}: did you mean '{nearest}'\\?$"):
        parse_model_config({**BASE, **extra})


def test_an_unknown_key_that_is_near_to_none_names_them_all():
    with pytest.raises(ValueError, match="^unknown key model.connector.zzzz: known keys: kind, frame_rate, "):
        parse_model_config({**BASE, "connector": {"zzzz": 1}})


@pytest.mark.parametrize("key", BASE)
@pytest.mark.parametrize("given", [{}, "???"])
def test_a_missing_key_is_named_with_the_remedy(key, given):
    values = {name: value for name, value in BASE.items() if name != key}
    values |= {key: given} if given else {}
    with pytest.raises(ValueError, match=f"^model.{key} is missing: set it in the YAML"):
        parse_model_config(values)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"pretrained_llm": None}, "model.pretrained_llm: "),
        ({"micro_batch_tokens": "many"}, "model.micro_batch_tokens: Value 'many'"),
        ({"micro_batch_tokens": 1.5}, "model.micro_batch_tokens: Value '1.5'"),
        ({"connector": "conv"}, "model.connector must hold keys and values, got 'conv'"),
        ({"connector": None}, "model.connector: .*not Optional"),
        ({"connector": {"frame_rate": "fast"}}, "model.connector.frame_rate: Value 'fast'"),
        ({"interleave": True}, "model.interleave must hold keys and values, got True"),
        ({"generation": {"max_new_tokens": "many"}}, "model.generation.max_new_tokens: Value 'many'"),
        ({"targets": {"allow_foreign": "perhaps"}}, "model.targets.allow_foreign: Value 'perhaps'"),
        ({"pretrained_asr": "${nowhere}"}, "model.pretrained_asr: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_in_one_line(extra, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        parse_model_config({**BASE, **extra})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", [[], "conv", 3])
def test_a_section_without_keys_is_refused(section):
    with pytest.raises(ValueError, match="model: must hold keys and values"):
        parse_model_config(section)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"connector": {"kind": "convv"}}, "model.connector.kind is 'convv'; it must be one of conv, stack"),
        ({"connector": {"kernel_size": 4}}, "model.connector.kernel_size is 4; it must be odd"),
        ({"loss": {"temperature": 2.0}}, "model.loss.temperature is 2.0, but model.loss.kl_weight is 0"),
        ({"interleave": {"unit": "letter"}}, "model.interleave.unit is 'letter'; it must be one of word, span"),
        ({"interleave": {"probability": 1.5}}, "model.interleave.probability is 1.5; it must be between 0 and 1"),
        ({"interleave": {"text_share": -0.1}}, "model.interleave.text_share is -0.1; it must be between 0 and 1"),
        ({"interleave": {"mean_span": 0}}, "model.interleave.mean_span is 0.0; it must be between 1 and 100"),
        ({"generation": {"max_new_tokens": 0}}, "model.generation.max_new_tokens is 0; it must be at least 1"),
        ({"micro_batch_tokens": 0}, "model.micro_batch_tokens is 0; it must be at least 1"),
        ({"on_bad_audio": "ignore"}, "model.on_bad_audio is 'ignore'; it must be raise or skip"),
        (
            {"activations_checkpoint_granularity": "ful"},
            "it must be one of null, selective, full .did you mean 'full'?",
        ),
        ({"dist_timeout": 0}, "model.dist_timeout is 0.0; it must be above 0, or null"),
        ({"test_ds": {"cuts_path": "x"}}, "model.test_ds is not used: set it to null, .*examples/mtbi_eval.py"),
        ({"format_version": FORMAT_VERSION + 1}, "install a newer nemo_mtbi"),
    ],
)
def test_a_contradiction_names_the_key_and_the_remedy(extra, message):
    with pytest.raises(ValueError, match=message):
        parse_model_config({**BASE, **extra})


@pytest.mark.parametrize("kind, rate", [("conv", 5.0), ("stack", 30.0), ("conv", 0.0), ("stack", -1.0)])
def test_a_frame_rate_that_the_encoder_cannot_give_names_those_that_it_can(kind, rate):
    with pytest.raises(ValueError, match=f"frame_rate {rate} Hz can't be made .*choose one of 12.5, 6.25, "):
        ConnectorConfig(kind=kind, frame_rate=rate).reduction(12.5)


def shipped_configs():
    """The YAML files in ``conf/`` that describe a model, by themselves or through their defaults."""
    found = []
    for path in sorted(CONF.glob("*.yaml")):
        content = OmegaConf.load(path)
        if path.stem != "mtbi_base" and ("model" in content or "defaults" in content):
            found.append(path.stem)
    return found


YOURS = {
    "model.pretrained_asr": "encoder.nemo",
    "model.pretrained_llm": "llm",
    "model.train_ds.input_cfg": [{"type": "lhotse", "cuts_path": "cuts.jsonl.gz", "weight": 1.0}],
    "model.validation_ds.cuts_path": "cuts.jsonl.gz",
}


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_fits_the_schema(name):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(name)
    for key, value in YOURS.items():  # what a user gives
        section, _, last = key.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(cfg, section), last):
            OmegaConf.update(cfg, key, value)
    config = parse_model_config(cfg.model)
    assert config.optim["lr"] > 0
    for section in (config.train_ds, config.validation_ds):
        full, _ = check_config(section, 16000)
        assert full.batch_tokens or full.batch_size


def test_the_demo_config_is_among_them():
    assert "mtbi_demo" in shipped_configs()
