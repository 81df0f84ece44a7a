# SPDX-License-Identifier: Apache-2.0
"""The configurations of large models: planned without weights, and their sizes against the published ones."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
import torch
from hf_models import hf_tokenizer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import nemo_mtbi
from nemo_mtbi.config.model import LAYOUT_KEYS
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.demo.encoder import configuration
from nemo_mtbi.llm.directory import open_text_llm
from nemo_mtbi.planning import memory
from nemo_mtbi.planning.build import make_plan
from nemo_mtbi.planning.footprint import read_encoder_settings

CONF = Path(nemo_mtbi.__file__).resolve().parents[1] / "conf"
GIB = 2**30
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
}
# As published on the hub: config.json, and the number of parameters that the files hold.
LLMS = {
    "Qwen2.5-7B-Instruct": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Llama-3.1-8B-Instruct": (
        {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        8_030_261_248,
    ),
    "Llama-3.1-70B-Instruct": (
        {
            **_LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496,
    ),
}
WHISPER = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "vocab_size": 51866,
}
# Of NeMo's FastConformers: layers, width, heads; parameters of the whole model in millions, as their cards say.
FASTCONFORMERS = {
    "stt_en_fastconformer_ctc_large.nemo": (17, 512, 8, 115),
    "stt_en_fastconformer_ctc_xlarge.nemo": (24, 1024, 8, 600),
}
RUNS = ("mtbi_qwen2.5-7b_fastconformer", "mtbi_llama3.1-8b_whisper-large-v3", "mtbi_llama3.1-70b_tp8_pp2")


def fastconformer(path, layers, width, heads):
    config = configuration(Path("unused"))
    config.encoder.update(n_layers=layers, d_model=width, n_heads=heads)
    config.encoder.update(subsampling_conv_channels=256, conv_kernel_size=9)
    content = OmegaConf.to_yaml(config).encode()
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("model_config.yaml")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("model_weights.ckpt"))  # which nothing here reads


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What lies on a user's disk, without the weights."""
    folder = tmp_path_factory.mktemp("hub")
    for name, (config, _) in LLMS.items():
        hf_tokenizer(folder / name, "chatml" if "Qwen" in name else "headers")
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "whisper-large-v3").mkdir()
    (folder / "whisper-large-v3" / "config.json").write_text(json.dumps(WHISPER))
    from transformers import WhisperFeatureExtractor

    WhisperFeatureExtractor(feature_size=128).save_pretrained(str(folder / "whisper-large-v3"))
    for name, (*shape, _) in FASTCONFORMERS.items():
        fastconformer(folder / name, *shape)
    (folder / "blend.yaml").write_text("[]")
    return folder


def composed(name, folder=None):
    overrides = ["model.train_ds.input_cfg=blend.yaml", "model.validation_ds.cuts_path=cuts.jsonl.gz"]
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(name, overrides)
    if folder:
        for key in ("pretrained_llm", "pretrained_asr"):
            cfg.model[key] = str(folder / cfg.model[key])
    return cfg


@pytest.mark.parametrize("name", LLMS)
def test_the_llms_have_the_published_size(hub, name):
    architecture = open_text_llm(hub / name).architecture
    assert memory.decoder_parameters(architecture, ParallelConfig(), 0) == LLMS[name][1]
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hub / name))
    assert sum(value.numel() for value in theirs.parameters()) == LLMS[name][1]


def test_whisper_has_the_published_size(hub):
    from transformers import AutoConfig, WhisperForConditionalGeneration

    with torch.device("meta"):
        theirs = WhisperForConditionalGeneration(AutoConfig.from_pretrained(hub / "whisper-large-v3"))
    theirs.tie_weights()
    assert sum(value.numel() for value in theirs.parameters()) == 1_543_490_560
    encoder = read_encoder_settings(str(hub / "whisper-large-v3"))
    assert encoder.parameters == sum(value.numel() for value in theirs.model.encoder.parameters()) == 636_968_960
    assert (encoder.shape.size, encoder.shape.frame_rate) == (1280, 50.0)


@pytest.mark.parametrize("name", FASTCONFORMERS)
def test_fastconformers_have_the_published_size(hub, name):
    encoder = read_encoder_settings(str(hub / name))
    assert encoder.parameters / 1e6 == pytest.approx(FASTCONFORMERS[name][3], rel=0.06)
    assert encoder.shape.frame_rate == 12.5


@pytest.fixture(scope="module")
def plans(hub):
    return {name: make_plan(composed(name, hub), frozen_dtype="bfloat16", environ={}) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_but_weights_and_data_is_missing(plans, name):
    expected = re.compile("lacks .*safetensors|cuts.jsonl.gz|blend.yaml")
    assert all(expected.search(text) for text in plans[name].problems)
    model = composed(name).model
    layout = {key: model[key] for key in LAYOUT_KEYS}
    assert plans[name].layout == ParallelConfig(**layout)


@pytest.mark.parametrize("name", RUNS)
def test_the_memory_in_the_comment_is_that_of_the_plan(plans, name):
    """The fullest process."""
    text = (CONF / f"{name}.yaml").read_text()
    said = float(re.search(r"([\d.]+) GiB in all", text).group(1))
    assert said == pytest.approx(max(stage.peak for stage in plans[name].stages) / GIB, abs=0.06)


@pytest.mark.parametrize("name", RUNS)
def test_the_processes_of_a_replica_hold_the_published_number(plans, hub, name):
    plan, llm = plans[name], composed(name).model.pretrained_llm
    assert plan.world == composed(name).trainer.devices * composed(name).trainer.num_nodes
    tensor = plan.layout.tensor_model_parallel_size
    held = sum(stage.frozen for stage in plan.stages)
    encoder = read_encoder_settings(str(hub / composed(name).model.pretrained_asr)).parameters
    # norms, and what else is not split, are on each tensor rank: at most a thousandth
    assert (held - encoder) * tensor == pytest.approx(LLMS[llm][1], rel=1e-3)


@pytest.mark.parametrize("name", ("mtbi_large", *RUNS))
def test_almost_each_key_has_a_comment(name):
    """Keys of NeMo and Lightning that say all by their name have none."""
    keys = re.findall(r"^ *[a-z_]+: \S.*$", (CONF / f"{name}.yaml").read_text(), re.MULTILINE)
    assert sum("#" in line for line in keys) >= 0.6 * len(keys)
