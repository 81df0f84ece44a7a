# SPDX-License-Identifier: Apache-2.0
"""Directories of Hugging Face that others have made: nothing in them runs, and sizes are compared before memory."""

import json
import os
import shutil
import time

import pytest
import torch
from hf_models import hf_encoder, hf_llm
from safetensors.torch import load_file, save_file

from nemo_mtbi.encoders.hf import load_hf_encoder
from nemo_mtbi.llm.convert.hf import weight_files
from nemo_mtbi.llm.directory import HFDirectory
from nemo_mtbi.speech_llm.pretrained import load_text_llm


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for name in ("whisper", "wavlm"):
        hf_encoder(folder / name, name)
    hf_llm(folder / "llm")
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return lambda name: shutil.copytree(good / name, tmp_path / name)


def edit(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def size_in_memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["whisper", "wavlm"])
def test_code_in_the_directory_does_not_run(copy, name, tmp_path):
    path = copy(name)
    (path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\nclass A: pass\n")
    wanted = load_hf_encoder(path).state_dict()
    edit(path / "config.json", auto_map={"AutoConfig": "evil.A", "AutoModel": "evil.A"}, _attn_implementation="evil/a")
    edit(path / "config.json", attn_implementation="evil/kernel", architectures=["evil.A"])
    edit(path / "preprocessor_config.json", auto_map={"AutoFeatureExtractor": "evil.A"}, feature_extractor_type="A")
    found = load_hf_encoder(path).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["whisper", "wavlm"])
def test_pickles_are_not_read(copy, name, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = copy(name)
    torch.save({"a": Evil()}, path / "pytorch_model.bin")
    assert load_hf_encoder(path) is not None  # safetensors are there
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model.safetensors .*pickle.*save_pretrained"):
        load_hf_encoder(path)
    assert not (tmp_path / "owned").exists()


SIZES = [
    ("whisper", {"d_model": 2**20}),
    ("whisper", {"encoder_layers": 10**9}),
    ("whisper", {"encoder_ffn_dim": 2**30}),
    ("whisper", {"max_source_positions": 2**30}),
    ("whisper", {"encoder_attention_heads": 0}),
    ("whisper", {"d_model": -16}),
    ("whisper", {"d_model": 2**70}),
    ("whisper", {"quantization_config": {"quant_method": "evil"}}),
    ("wavlm", {"hidden_size": 2**20}),
    ("wavlm", {"num_hidden_layers": 10**9}),
    ("wavlm", {"num_hidden_layers": "three"}),
    ("wavlm", {"conv_stride": [0] * 7}),
    ("wavlm", {"conv_kernel": [10] * 1000}),
    ("wavlm", {"conv_dim": [2**29] * 7}),
    ("wavlm", {"num_conv_pos_embeddings": 2**30}),
    ("wavlm", {"model_type": ["wavlm"]}),
]


@pytest.mark.parametrize("name, values", SIZES)
def test_sizes_of_encoders_are_compared_with_the_weights(copy, name, values):
    path, before, start = copy(name), size_in_memory(), time.process_time()
    edit(path / "config.json", **values)
    with pytest.raises(ValueError, match=f"(the encoder in .*{name} can't be read|model_type is)"):
        load_hf_encoder(path)
    assert size_in_memory() - before < 2**28 and time.process_time() - start < 10


@pytest.mark.parametrize(
    "values",
    [{"feature_size": 10**9}, {"n_fft": 2**40}, {"chunk_length": 10**9}, {"hop_length": 0}, {"sampling_rate": "x"}],
)
def test_sizes_of_front_ends_are_bounded(copy, values):
    path = copy("whisper")
    edit(path / "preprocessor_config.json", **values)
    with pytest.raises(ValueError, match="can't be read: preprocessor_config.json has"):
        load_hf_encoder(path)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**20},
        {"intermediate_size": 2**30},
        {"vocab_size": 2**30},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": "two"},
        {"num_hidden_layers": True},
        {"head_dim": -1},
        {"hidden_size": 2**70},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "llama3", "factor": "a", "low_freq_factor": 1, "high_freq_factor": 2}},
        {"rms_norm_eps": None},
        {"model_type": {"a": 1}},
    ],
)
def test_sizes_of_llms_are_compared_with_the_weights(copy, values):
    path, before, start = copy("llm"), size_in_memory(), time.process_time()
    edit(path / "config.json", **values)
    with pytest.raises(ValueError):
        load_text_llm(path)
    assert size_in_memory() - before < 2**28 and time.process_time() - start < 10


def test_an_llm_of_ours_is_compared_with_its_weights_first(llm_dir, tmp_path):
    path, before = shutil.copytree(llm_dir, tmp_path / "own"), size_in_memory()
    text = (path / "llm.yaml").read_text()
    for size, value in (("num_layers", 10**9), ("hidden_size", 2**20), ("num_layers", -1), ("vocab_size", "many")):
        lines = [f"  {size}: {value}" if line.startswith(f"  {size}:") else line for line in text.split("\n")]
        (path / "llm.yaml").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=f"do not fit its llm.yaml|{size}"):
            load_text_llm(path)
    assert size_in_memory() - before < 2**28
    (path / "llm.yaml").write_text("a: " + "[" * 1000)
    with pytest.raises(ValueError, match="llm.yaml can't be read: llm.yaml is nested too deep"):
        load_text_llm(path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", 3, None, ["x"]])
def test_an_index_names_files_beside_it(copy, name):
    for kind in ("llm", "whisper"):
        path = copy(kind)
        os.rename(path / "model.safetensors", path.parent / "outside.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="index.json can't be read .*(which is not a file beside it|unhashable)"):
            weight_files(path)
        with pytest.raises(ValueError, match="index.json can't be read"):
            load_hf_encoder(path) if kind == "whisper" else HFDirectory(path).missing()


def test_links_of_the_hub_are_followed(copy, tmp_path):
    """Its cache links each file to a blob outside of the directory."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for kind in ("llm", "whisper"):
        path = copy(kind)
        for number, file in enumerate(path.iterdir()):
            os.rename(file, blobs / f"{kind}{number}")
            file.symlink_to(os.path.relpath(blobs / f"{kind}{number}", path))
    assert load_hf_encoder(tmp_path / "whisper") is not None
    assert load_text_llm(tmp_path / "llm").chat.end == "<|im_end|>"


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_deep_json_is_a_named_refusal(copy, file):
    path = copy("whisper")
    (path / file).write_text('{"a": ' + "[" * 200_000)
    with pytest.raises(ValueError, match="can't be read"):
        load_hf_encoder(path)
    if file != "preprocessor_config.json":
        path = copy("llm")
        (path / file).write_text('{"a": ' + "[" * 200_000)
        with pytest.raises(ValueError, match="can't be read"):
            load_text_llm(path)


def test_the_decoder_of_whisper_is_not_built(copy):
    path = copy("whisper")
    wanted = load_hf_encoder(path).state_dict()
    weights = {k: v for k, v in load_file(path / "model.safetensors").items() if k.startswith("encoder.")}
    save_file({f"model.{name}": value for name, value in weights.items()}, path / "model.safetensors")
    edit(path / "config.json", decoder_layers=10**6, vocab_size=2**30)
    found = load_hf_encoder(path).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
