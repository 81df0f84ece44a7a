# SPDX-License-Identifier: Apache-2.0
"""The ``.nemo`` of an MTBI model in one process: what it holds, where it can be restored, what is refused."""

import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import OmegaConf
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tar_tricks import repacked, same

from nemo_mtbi.archive import save_restore as archives
from nemo_mtbi.archive.save_restore import MTBIArchive
from nemo_mtbi.config.parallel import ParallelConfig
from nemo_mtbi.llm.directory import open_text_llm
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.speech_llm.trainable import CONNECTOR
from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

PROMPTS = ["say it", "count it"]
PAST = Path(__file__).parent / "data"
SMALL = {"model_config.yaml", "model_weights.safetensors", "llm/llm.yaml", "llm/tokenizer.model", "digests.json"}
FULL = SMALL | {"llm/model.safetensors", "encoder/encoder.yaml", "encoder/encoder.safetensors"}


def utterances():
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.1, 0.1, samples).astype(np.float32) for samples in (16000, 24000)]


def answers(model):
    return model.generate(utterances(), PROMPTS)


def weights(model):
    """Parameters and buffers, those that ``state_dict`` leaves out too."""
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def build(section, **changes):
    """A model without data."""
    section = OmegaConf.merge(section, {"train_ds": None, "validation_ds": None}, changes)
    seed_everything(3, verbose=False)
    return MTBIModel(section)


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """The section of a model whose encoder and LLM lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("parts")
    return OmegaConf.create(
        {
            "pretrained_asr": str(tiny_asr_nemo(folder / "asr.nemo")),
            "pretrained_llm": str(tiny_text_llm(folder / "llm", tie_embeddings=False)),
            "connector": {"hidden_size": 24},
            "generation": {"max_new_tokens": 8},
            "optim": {"name": "adamw", "lr": 1e-2},
        }
    )


@pytest.fixture(scope="module")
def model(section):
    """Read only."""
    return build(section)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder with ``small.nemo`` and ``full.nemo`` of the model."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_to(folder / "small.nemo")
    model.save_to(str(folder / "full.nemo"), full=True)
    return folder


@pytest.fixture
def away(section):
    """Takes encoder and LLM away for the duration of a test."""
    folder = Path(section.pretrained_llm).parent
    hidden = folder.rename(folder.with_name("hidden"))
    yield hidden
    hidden.rename(folder)


def names(path):
    with tarfile.open(path) as tar:
        return {member.name.removeprefix("./") for member in tar}


# What it holds ------------------------------------------------------------


def test_a_small_archive_refers_to_the_frozen_parts(saved, section):
    assert names(saved / "small.nemo") == SMALL
    stored = MTBIModel.restore_from(saved / "small.nemo", return_config=True)
    assert stored.pretrained_llm == section.pretrained_llm
    assert stored.fingerprints.llm == open_text_llm(section.pretrained_llm).fingerprint


def test_a_full_archive_holds_the_very_llm(saved, section, tmp_path):
    assert names(saved / "full.nemo") == FULL
    with tarfile.open(saved / "full.nemo") as tar:
        tar.extractall(tmp_path, filter="data")
    for path in Path(section.pretrained_llm).iterdir():  # in 16 bits, as it was, though it computes in 32
        assert (tmp_path / "llm" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["small.nemo", "full.nemo"])
def test_nothing_but_the_references_tells_of_the_machine(saved, name, section, model_section, tmp_path):
    content = (saved / name).read_bytes()
    for path in (section.pretrained_asr, section.pretrained_llm):
        assert content.count(path.encode()) == (1 if name == "small.nemo" else 0)
        content = content.replace(path.encode(), b"")
    assert content.count(b"pretrained_asr: \n" if name == "small.nemo" else b"pretrained_asr: nemo:encoder\n") == 1
    for trace in (str(tmp_path.parent), str(Path.home()), os.getcwd(), os.uname().nodename, "root"):
        assert trace.encode() not in content
    trained = build(section)
    trained.setup_training_data(model_section().train_ds)  # NeMo notes where the data are
    trained.save_to(tmp_path / "trained.nemo")
    assert (tmp_path / "trained.nemo").read_bytes() == (saved / "small.nemo").read_bytes()


def test_an_archive_holds_no_pickle(saved):
    with tarfile.open(saved / "full.nemo") as tar:
        for member in tar:
            content = tar.extractfile(member).read()
            assert not content.startswith((b"PK", b"\x80")), member.name
            if member.name.endswith(".safetensors"):
                assert load_tensors(content)


def test_equal_models_give_equal_files(saved, tmp_path):
    for name in ("small.nemo", "full.nemo"):
        MTBIModel.restore_from(saved / name).save_to(tmp_path / name)  # small stays small, full stays full
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


# Where it can be restored ------------------------------------------------------------


def test_a_full_archive_needs_no_other_file(saved, model, away, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    restored = MTBIModel.restore_from(saved / "full.nemo", map_location="cpu")
    assert same(weights(restored), weights(model))
    assert answers(restored) == answers(model)
    assert restored.frozen.fingerprints == model.frozen.fingerprints
    assert restored.expected_targets == model.expected_targets  # it still knows whose answers it may be trained on
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["small", "full"])
def test_an_unpacked_directory_is_as_good(saved, model, kind, tmp_path):
    with tarfile.open(saved / f"{kind}.nemo") as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    expected = weights(model)
    assert same(weights(MTBIModel.restore_from(tmp_path / "folder")), expected)
    connector = SaveRestoreConnector()  # NeMo's way to say so
    connector.model_extracted_dir = str(tmp_path / "folder")
    restored = MTBIModel.restore_from("unpacked.nemo", save_restore_connector=connector)
    assert same(weights(restored), expected)
    assert isinstance(restored._save_restore_connector, MTBIArchive)


def test_a_foreign_connector_is_refused(saved):
    class Foreign(SaveRestoreConnector):
        pass

    with pytest.raises(ValueError, match="save_restore_connector is a Foreign: leave it out"):
        MTBIModel.restore_from(saved / "small.nemo", save_restore_connector=Foreign())


def test_the_frozen_parts_in_bfloat16_come_back_bit_for_bit(section, tmp_path):
    half = build(section, frozen_dtype="bfloat16")
    half.save_to(tmp_path / "half.nemo", full=True)
    restored = MTBIModel.restore_from(tmp_path / "half.nemo")
    assert restored.speech_llm.decoder.config.params_dtype == torch.bfloat16
    assert same(weights(restored), weights(half))


@pytest.mark.parametrize("where", ["working directory", "beside the archive"])
def test_relative_references_are_found(section, saved, tmp_path, monkeypatch, where):
    folder, elsewhere = tmp_path / "shipped", tmp_path / "elsewhere"
    tiny_asr_nemo(folder / "parts" / "asr.nemo")
    tiny_text_llm(folder / "parts" / "llm", tie_embeddings=False)
    elsewhere.mkdir()
    monkeypatch.chdir(folder)
    model = build(section, pretrained_asr="parts/asr.nemo", pretrained_llm="parts/llm")
    path = (elsewhere if where == "working directory" else folder) / "model.nemo"
    model.save_to(path)
    moved = folder.rename(tmp_path / "moved")
    path = path if path.exists() else moved / "model.nemo"
    monkeypatch.chdir(moved if where == "working directory" else elsewhere)
    restored = MTBIModel.restore_from(path)
    assert same(weights(restored), weights(model))
    assert restored.cfg.pretrained_llm == "parts/llm"  # and not where it was found on this machine


def test_the_shipped_demo_is_found_by_its_name(section, tmp_path, monkeypatch):
    model = build(section, pretrained_asr="demo", pretrained_llm="demo", connector={"hidden_size": 8})
    model.save_to(tmp_path / "demo.nemo")
    assert (tmp_path / "demo.nemo").stat().st_size < 100_000
    monkeypatch.chdir(tmp_path)
    assert same(weights(MTBIModel.restore_from("demo.nemo")), weights(model))


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_a_past_format_is_read(section, tmp_path, version):
    """Written by the last version of each format, for a tiny encoder and LLM like those of this test."""
    path = PAST / f"format{version}.nemo"
    fingerprints = archives.NemoFile(path).settings("model_config.yaml")["fingerprints"]
    prints = build(section).frozen.fingerprints

    def refer(files):  # another torch may draw other weights for them
        config = files["model_config.yaml"].decode()
        assert f"format_version: {version}\n" in config and "digests.json" not in files
        for part in ("asr", "llm"):
            config = config.replace(fingerprints[part], prints[part])
        config = config.replace("pretrained_asr: asr.nemo", f"pretrained_asr: {section.pretrained_asr}")
        files["model_config.yaml"] = config.replace(": llm\n", f": {section.pretrained_llm}\n").encode()

    model = MTBIModel.restore_from(repacked(path, tmp_path / "old.nemo", refer))
    with tarfile.open(path) as tar:
        stored = load_tensors(tar.extractfile("./model_weights.safetensors").read())
    assert same(dict(model.state_dict()), stored)
    model.save_to(tmp_path / "new.nemo")
    assert archives.NemoFile(tmp_path / "new.nemo").settings("model_config.yaml")["format_version"] == 3
    assert same(weights(MTBIModel.restore_from(tmp_path / "new.nemo")), weights(model))


def test_a_full_file_of_format_2_is_read(saved, model, tmp_path):
    def older(files):
        del files["digests.json"]
        files["model_config.yaml"] = files["model_config.yaml"].replace(b"format_version: 3", b"format_version: 2")

    restored = MTBIModel.restore_from(repacked(saved / "full.nemo", tmp_path / "old.nemo", older))
    assert same(weights(restored), weights(model))


# Damage ------------------------------------------------------------


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("kind, members", [("small", SMALL - {"llm/tokenizer.model"}), ("full", FULL)])
def test_a_flipped_bit_is_not_loaded(saved, kind, members, unpacked, tmp_path):
    """The tokenizer in a small file is there for who unpacks it: the LLM has its own."""
    for name in sorted(members):
        with tarfile.open(saved / f"{kind}.nemo") as tar:
            member = tar.getmember(f"./{name}")
        content = bytearray((saved / f"{kind}.nemo").read_bytes())
        content[member.offset_data + member.size * 3 // 4] ^= 4
        path = tmp_path / f"{name.replace('/', '_')}.nemo"
        path.write_bytes(content)
        if unpacked:
            with tarfile.open(path) as tar:
                tar.extractall(path := path.with_suffix(""), filter="data")
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(path))} is damaged and was not loaded: ({name}|digests)"
        ):
            MTBIModel.restore_from(path)


def test_a_file_whose_digests_were_taken_away_is_refused(saved, tmp_path):
    path = repacked(saved / "full.nemo", tmp_path / "bare.nemo", lambda files: files.pop("digests.json"))
    with pytest.raises(ValueError, match="it lacks digests.json"):
        MTBIModel.restore_from(path)


def test_files_that_have_changed_their_places_are_refused(saved, tmp_path):
    def swap(files):
        one, other = "encoder/encoder.safetensors", "llm/model.safetensors"
        files[one], files[other] = files[other], files[one]

    path = repacked(saved / "full.nemo", tmp_path / "swapped.nemo", swap, digests=False)
    with pytest.raises(ValueError, match="swapped.nemo is damaged and was not loaded: .* bytes, but .* were written"):
        MTBIModel.restore_from(path)


def test_weights_go_where_they_are_sent(saved):
    restored = MTBIModel.restore_from(str(saved / "full.nemo"), None, torch.device("cpu"), True)
    assert {value.device.type for value in weights(restored).values()} == {"cpu"}


# Other parts, other settings ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "full"])
@pytest.mark.parametrize("how", ["mapping", "file", "whole configuration"])
def test_parts_that_have_moved_are_named_anew(saved, away, model, kind, how, tmp_path, section):
    with pytest.raises(ValueError, match="does not exist.*override_config_path={'pretrained_asr': its path}"):
        MTBIModel.restore_from(saved / "small.nemo")
    changes = {"pretrained_asr": str(away / "asr.nemo"), "pretrained_llm": str(away / "llm")}
    if how == "file":
        OmegaConf.save(OmegaConf.create(changes), tmp_path / "changes.yaml")
        changes = tmp_path / "changes.yaml"
    elif how == "whole configuration":
        changes = OmegaConf.create({"seed": 1, "root": str(away), "model": OmegaConf.merge(section, changes)})
        changes.model.pretrained_llm = "${root}/llm"
    restored = MTBIModel.restore_from(saved / f"{kind}.nemo", override_config_path=changes)
    assert restored.cfg.pretrained_llm == str(away / "llm")
    assert same(weights(restored), weights(model))
    restored.save_to(tmp_path / "again.nemo")
    assert names(tmp_path / "again.nemo") == SMALL


def test_settings_are_overridden_and_the_rest_stays(saved):
    changes = {"generation": {"max_new_tokens": 3}, "optim": None}
    stored = MTBIModel.restore_from(saved / "full.nemo", override_config_path=changes, return_config=True)
    assert (stored.generation.max_new_tokens, stored.optim, stored.connector.hidden_size) == (3, None, 24)
    restored = MTBIModel.restore_from(saved / "full.nemo", override_config_path=changes)
    assert restored.config.generation.max_new_tokens == 3


@pytest.mark.parametrize("kind", ["small", "full"])
@pytest.mark.parametrize("part", ["asr", "llm"])
def test_another_part_is_refused_with_both_hashes_and_paths(saved, section, tmp_path, part, kind):
    make = {"asr": tiny_asr_nemo, "llm": tiny_text_llm}[part]
    other = make(tmp_path / "asr.nemo" if part == "asr" else tmp_path / "llm", seed=1)
    stored = MTBIModel.restore_from(saved / f"{kind}.nemo", return_config=True)
    with pytest.raises(ValueError) as error:
        MTBIModel.restore_from(saved / f"{kind}.nemo", override_config_path={f"pretrained_{part}": str(other)})
    found = build(section, **{f"pretrained_{part}": str(other)}).frozen.fingerprints[part]
    assert found != stored.fingerprints[part]
    for told in (str(other), found, stored.fingerprints[part], stored[f"pretrained_{part}"]):
        assert told in str(error.value)
    build(section).save_to(tmp_path / "fine.nemo")  # nothing is left behind in NeMo's global state


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"fingerprints": {"asr": "sha256:0", "llm": "sha256:1"}},
            "has the fingerprints .* trained with .*leave them",
        ),
        ({"unheard_of": 1}, "unknown key model.unheard_of"),
        ({"connector": {"hidden_size": 25}}, "small.nemo does not fit model.connector.* is .*24.* instead of .*25"),
        ({"connector": {"kind": "stack"}}, "does not fit model.connector; missing or unknown: speech_llm.connector.c"),
        ({"connector": {"hidden_size": 10**12}}, "model.connector can't be built"),
        ({"pretrained_llm": "nemo:llm"}, "model.pretrained_llm=nemo:llm means a part inside a .nemo"),
        ({"pretrained_llm": "/dev/zero"}, "/dev/zero must be a directory"),
        ({"pretrained_asr": "/dev/zero"}, "/dev/zero must be a file"),
        ({"tensor_model_parallel_size": 2}, "one process serves one layout"),
        ([1, 2], "holds no keys and values"),
        ("nowhere.yaml", "override_config_path=nowhere.yaml can't be read"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        MTBIModel.restore_from(saved / "small.nemo", override_config_path=changes)


def test_the_layout_in_force_may_be_asked_for(saved):
    layout = vars(ParallelConfig())
    model = MTBIModel.restore_from(saved / "full.nemo", override_config_path={**layout, "dist_timeout": 60.0})
    assert not set(layout) & set(model.cfg)


def test_a_part_inside_an_archive_is_not_found_without_it(section):
    with pytest.raises(ValueError, match="model.pretrained_asr=nemo:encoder means a part inside a .nemo"):
        build(section, pretrained_asr="nemo:encoder")


def test_what_came_out_of_a_full_archive_does_not_become_small(saved, tmp_path):
    model = MTBIModel.restore_from(saved / "full.nemo")
    with pytest.raises(ValueError, match="save it with full=True, or restore it with override_config_path"):
        model.save_to(tmp_path / "small.nemo", full=False)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_there_are_left_as_they_are_if_that_is_wanted(saved, model, tmp_path, monkeypatch):
    def drop(files):
        stored = load_tensors(files["model_weights.safetensors"])
        stored.pop(CONNECTOR.prefix + "norm.bias")
        stored["other"] = torch.zeros(2)
        files["model_weights.safetensors"] = save_tensors(stored)

    warnings = []
    monkeypatch.setattr(archives.logging, "warning", warnings.append)
    path = repacked(saved / "full.nemo", tmp_path / "part.nemo", drop)
    with pytest.raises(
        ValueError, match="missing or unknown: other is unknown; speech_llm.connector.norm.bias is miss"
    ):
        MTBIModel.restore_from(path)
    restored = MTBIModel.restore_from(path, strict=False)
    assert same(weights(restored), weights(model))  # a new norm is that of the model, which was not trained
    assert [f"not used: other, {CONNECTOR.prefix}norm.bias" in text for text in warnings] == [True]
