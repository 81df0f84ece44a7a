# SPDX-License-Identifier: Apache-2.0
"""Crafted and damaged ``.nemo`` files: each is one clear error, nothing is unpacked, called or allocated."""

import json
import os
import resource
import tarfile

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load, save
from tar_tricks import BLOCK, GIANT, TRICKS, member, planted, repacked

from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.safetensors"
ENCODER, ENCODER_WEIGHTS = "encoder/encoder.yaml", "encoder/encoder.safetensors"
LLM, LLM_WEIGHTS, TOKENIZER = "llm/llm.yaml", "llm/model.safetensors", "llm/tokenizer.model"
NONE_OF_OURS = "crafted.nemo can't be restored: it is not a .nemo of an MTBI model "


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with ``small.nemo`` and ``full.nemo``."""
    folder = tmp_path_factory.mktemp("saved")
    section = {
        "pretrained_asr": str(tiny_asr_nemo(folder / "asr.nemo")),
        "pretrained_llm": str(tiny_text_llm(folder / "llm")),
        "connector": {"hidden_size": 24},
    }
    model = MTBIModel(OmegaConf.create(section))
    model.save_to(folder / "small.nemo")
    model.save_to(folder / "full.nemo", full=True)
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_unpacked(monkeypatch):
    monkeypatch.setattr(tarfile.TarFile, "extract", None)
    monkeypatch.setattr(tarfile.TarFile, "extractall", None)


@pytest.fixture
def refused(saved, tmp_path):
    """``refused(change, message)``: the full archive is refused after ``change`` has altered its files."""

    def check(change, message, kind="full"):
        path = repacked(saved / f"{kind}.nemo", tmp_path / "crafted.nemo", change)
        with pytest.raises(ValueError, match=message):
            MTBIModel.restore_from(path)
        folder = tmp_path / "folder"  # unpacked, it is not better
        with tarfile.open(path) as tar:
            for item in tar:
                target = folder / item.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(item).read())
        with pytest.raises(ValueError, match=message.replace("crafted.nemo", "folder")):
            MTBIModel.restore_from(folder)

    return check


def settings(name, change):
    """A change of a YAML in the archive."""

    def edit(files):
        values = yaml.safe_load(files[name])
        change(values)
        files[name] = yaml.safe_dump(values, sort_keys=False).encode()

    return edit


def tensors(name, change):
    """A change of the tensors in a file of the archive."""

    def edit(files):
        values = load(files[name])
        change(values)
        files[name] = save({key: value.contiguous() for key, value in values.items()})

    return edit


# The archive ------------------------------------------------------------


@pytest.mark.parametrize("trick", TRICKS)
def test_harmful_members(saved, tmp_path, trick):
    content, message = TRICKS[trick]
    path = planted(saved / "small.nemo", tmp_path / "crafted.nemo", content)
    with pytest.raises(ValueError, match=NONE_OF_OURS + r"\(.*" + message):
        MTBIModel.restore_from(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["crafted.nemo"]


@pytest.mark.parametrize("name", ["model_weights.ckpt", "llm/evil.py", "b/model_config.yaml"])
def test_files_that_no_model_has(saved, tmp_path, name):
    path = planted(saved / "full.nemo", tmp_path / "crafted.nemo", member(f"./{name}", b"\x80\x04."))
    with pytest.raises(ValueError, match=NONE_OF_OURS + rf"\(it holds {name}\)"):
        MTBIModel.restore_from(path)


def test_a_pickle_in_the_place_of_weights(refused, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"a": Evil()}, tmp_path / "evil.ckpt")
    content = (tmp_path / "evil.ckpt").read_bytes()
    for name in (WEIGHTS, ENCODER_WEIGHTS, LLM_WEIGHTS):
        refused(lambda files, name=name: files.update({name: content}), NONE_OF_OURS + rf"\({name} is damaged")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, ENCODER, ENCODER_WEIGHTS, LLM, LLM_WEIGHTS, TOKENIZER])
def test_files_that_are_missing(refused, name):
    refused(lambda files: files.pop(name), NONE_OF_OURS + rf"\((it lacks {name}[^)]*|{name} is missing)\)")


def test_archives_that_are_cut_off(saved, tmp_path):
    content = (saved / "full.nemo").read_bytes()
    for part in range(20):
        (tmp_path / "crafted.nemo").write_bytes(content[: len(content) * part // 20])
        with pytest.raises(ValueError, match=NONE_OF_OURS):
            MTBIModel.restore_from(tmp_path / "crafted.nemo")


@pytest.mark.parametrize("name", [WEIGHTS, ENCODER_WEIGHTS, LLM_WEIGHTS])
def test_a_file_with_ten_gigabytes_of_holes(saved, tmp_path, name):
    """It claims nothing that is not there: it lies on the disk as holes, and reading it would fill the memory."""
    shape = [GIANT // 4]
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, GIANT]}}).encode()
    content = len(header).to_bytes(8, "little") + header
    with tarfile.open(saved / "full.nemo") as tar:
        files = {item.name: tar.extractfile(item).read() for item in tar}
    del files["./digests.json"]  # as before format 3: sizes would be compared first
    files[f"./{CONFIG}"] = files[f"./{CONFIG}"].replace(b"format_version: 3", b"format_version: 2")
    path = tmp_path / "crafted.nemo"
    with open(path, "wb") as file:
        for other, value in files.items():
            if other != f"./{name}":
                file.write(member(other, value))
        info = tarfile.TarInfo(f"./{name}")
        info.size = len(content) + GIANT
        file.write(info.tobuf(tarfile.GNU_FORMAT) + content)
        file.truncate(-(-(file.tell() + GIANT) // BLOCK) * BLOCK + 2 * BLOCK)
    assert path.stat().st_size > GIANT > 1000 * path.stat().st_blocks
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="missing or unknown: a is unknown|do not fit|describes .* more than"):
        MTBIModel.restore_from(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


# The configuration ------------------------------------------------------------


def put(**values):
    return lambda settings: settings.update(values)


CONFIGS = {
    "foreign class": (put(target="subprocess.Popen"), "it holds a subprocess.Popen, no MTBI model"),
    "no class": (lambda conf: conf.pop("target"), "it holds a None, no MTBI model"),
    "class of NeMo": (put(target="nemo.core.classes.ModelPT"), "it holds a nemo.core.classes.ModelPT, no MTBI"),
    "unknown key": (put(unheard_of=1), "unknown key model.unheard_of"),
    "unknown key within": (lambda conf: conf["connector"].update(a=1), "unknown key model.connector.a"),
    "wrong type": (put(connector=3), "model.connector must hold keys and values"),
    "of the future": (put(format_version=99), "has format_version 99, .* up to 3: install a newer nemo_mtbi"),
    "of no version": (lambda conf: conf.pop("format_version"), NONE_OF_OURS + r"\(its format_version is None"),
    "version 0": (put(format_version=0), NONE_OF_OURS + r"\(its format_version is 0"),
    "version in words": (put(format_version="two"), NONE_OF_OURS + r"\(its format_version is 'two'"),
    "true version": (put(format_version=True), NONE_OF_OURS + r"\(its format_version is True"),
    "no fingerprints": (lambda conf: conf.pop("fingerprints"), NONE_OF_OURS + r"\(it has no fingerprints"),
    "one fingerprint": (lambda conf: conf["fingerprints"].pop("asr"), NONE_OF_OURS + r"\(it has no fingerprints"),
    "large connector": (lambda conf: conf["connector"].update(hidden_size=10**9), "does not fit model.connector"),
    "endless connector": (lambda conf: conf["connector"].update(hidden_size=10**18), "model.connector can't be built"),
    "no encoder": (put(pretrained_asr=None), "pretrained_asr"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations(refused, kind):
    change, message = CONFIGS[kind]
    refused(settings(CONFIG, change), message)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"pretrained_asr: ${oc.env:HOME}\n", "model_config.yaml refers to values outside"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "model_config.yaml refers to parts of itself"),
        (b"#" * 2**20, "model_config.yaml has .* bytes, more than it can need"),
    ],
)
def test_texts(refused, text, message):
    refused(lambda files: files.update({CONFIG: text + files[CONFIG]}), NONE_OF_OURS + r"\(" + message)


def test_a_reference_that_is_not_in_the_archive(saved, tmp_path):
    """A small archive that claims to be full."""
    change = settings(CONFIG, put(pretrained_llm="nemo:llm"))
    path = repacked(saved / "small.nemo", tmp_path / "crafted.nemo", change)
    with pytest.raises(ValueError, match=NONE_OF_OURS + rf"\(it lacks {LLM_WEIGHTS}"):
        MTBIModel.restore_from(path)


# Weights ------------------------------------------------------------


def reshape(values):
    name = next(iter(values))
    values[name] = torch.zeros(3, 5)


def rename(values):
    values["other"] = values.pop(next(iter(values)))


def add(values):
    values["other"] = torch.zeros(2)


@pytest.mark.parametrize("change", [reshape, rename, add, dict.clear])
@pytest.mark.parametrize(
    "name, message",
    [
        (WEIGHTS, "crafted.nemo does not fit model.connector; missing or unknown: "),
        (ENCODER_WEIGHTS, NONE_OF_OURS + r"\((the encoder's weights do not fit its settings: |.*layers, more than)"),
        (LLM_WEIGHTS, "the LLM's weights do not fit its llm.yaml|llm.yaml describes .*(weights, but|layers, more)"),
    ],
)
def test_weights_of_other_names_and_shapes(refused, name, message, change):
    refused(tensors(name, change), message)


def within(section, **values):
    return lambda settings: settings[section].update(values)


PARTS = {
    "llm of other sizes": (LLM, within("architecture", num_layers=3), "llm.yaml describes .* weights, but"),
    "giant llm": (LLM, within("architecture", hidden_size=10**7), "llm.yaml describes .* weights, but"),
    "endless llm": (LLM, within("architecture", num_layers=10**9), "describes 1000000000 layers, more than"),
    "negative llm": (LLM, within("architecture", num_layers=-2, vocab_size=-128), "llm.yaml has sizes below 1"),
    "llm in words": (LLM, within("architecture", num_layers="many"), "architecture.num_layers"),
    "llm of other keys": (LLM, within("architecture", rope_stretching=8), "unknown key .*rope_stretching"),
    "llm without chat": (LLM, lambda settings: settings.pop("chat"), "lacks a key"),
    "llm of the future": (LLM, put(format_version=2), "has format_version 2; this version reads 1"),
    "giant encoder": (ENCODER, within("encoder", d_model=10**6), "weights do not fit its settings"),
    "endless encoder": (ENCODER, within("encoder", n_layers=10**9), "describes 1000000000 layers, more than"),
    "deeper encoder": (ENCODER, within("encoder", n_layers=3), "weights do not fit its settings"),
    "front end of other size": (ENCODER, within("preprocessor", n_fft=2**20), "weights do not fit its settings"),
    "unknown key": (ENCODER, within("encoder", unheard_of=1), "encoder.yaml does not describe an encoder"),
    "other sections": (ENCODER, put(decoder={}), "must hold preprocessor, encoder and sample_rate, and no more"),
    "no rate": (ENCODER, put(sample_rate="16k"), "must hold preprocessor, encoder and sample_rate"),
    "no section": (ENCODER, put(encoder=None), "its encoder is nothing, which is not a module of nemo"),
}
CLASSES = (
    "os.system",
    "nemo.core.classes.ModelPT",
    "nemo.collections.asr.models.EncDecCTCModel.restore_from",
    "nemo.collections.asr.modules.conformer_encoder.torch.load",
    "nemo.collections.asr.modules.conformer_encoder.OmegaConf",
    "nemo.collections.asr.modules.conformer_encoder.math",
    "nemo.collections.asr.modules.nothing.Nothing",
)


@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_do_not_fit(refused, kind):
    name, change, message = PARTS[kind]
    refused(settings(name, change), message)


@pytest.mark.parametrize("target", CLASSES)
def test_only_modules_for_speech_are_built(refused, target):
    message = NONE_OF_OURS + rf"\(its encoder is {target}, which (is not a module of|this NeMo does not have)"
    refused(settings(ENCODER, within("encoder", _target_=target)), message)


@pytest.mark.parametrize(
    "values",
    [
        {"att_context_size": {"_target_": "os.system", "command": "true"}},
        {"att_context_size": [{"a": [{"target": "os.system"}]}]},
        {"_args_": [1]},
        {"_partial_": True},
    ],
)
def test_no_code_is_called_from_within_settings(refused, values):
    refused(settings(ENCODER, within("encoder", **values)), NONE_OF_OURS + r"\(its encoder has \w+, which could call")


def test_a_tokenizer_of_another_llm(refused, tmp_path):
    def grow(files):
        files[TOKENIZER] = b"\0" * (2**26 + 1)

    refused(grow, NONE_OF_OURS + rf"\({TOKENIZER} has .* bytes, more than it can need")


def test_the_good_archive_is_good(saved):
    """That all of this is not refused for another reason."""
    assert MTBIModel.restore_from(saved / "full.nemo").speech_llm.connector is not None
