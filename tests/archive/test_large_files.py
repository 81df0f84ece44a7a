# SPDX-License-Identifier: Apache-2.0
"""Large files of the frozen parts, of whose content fingerprints cover samples only, are compared whole."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_mtbi.archive import large_files
from nemo_mtbi.io import file_digests
from nemo_mtbi.io.file_digests import file_digest
from nemo_mtbi.llm.directory import open_text_llm
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.models.resuming import RUN
from nemo_mtbi.testing import tiny_text_llm


@pytest.fixture
def llm(tmp_path, monkeypatch):
    """A directory whose weights are sampled, and what flips a bit between two samples."""
    monkeypatch.setattr(file_digests, "HASHED_BYTES", 10_000)
    monkeypatch.setattr(file_digests, "_BLOCK", 64)
    monkeypatch.setattr(file_digests, "_SAMPLES", 16)
    return tiny_text_llm(tmp_path / "llm", tie_embeddings=False)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 16 * 9 + 1000] ^= 1
    path.write_bytes(content)


def build(model_section, llm):
    section = OmegaConf.merge(model_section(), {"train_ds": None, "validation_ds": None, "pretrained_llm": str(llm)})
    return MTBIModel(section)


def test_a_byte_between_samples_counts(model_section, llm, tmp_path):
    model = build(model_section, llm)
    weights = llm / "model.safetensors"
    assert model.frozen.file_digests == {"llm": [file_digest(weights)]}
    model.save_to(tmp_path / "small.nemo")
    model.save_to(tmp_path / "full.nemo", full=True)
    checkpoint = {"hyper_parameters": {"cfg": OmegaConf.to_container(model.cfg)}}
    model.on_save_checkpoint(checkpoint)
    assert MTBIModel.restore_from(tmp_path / "small.nemo", return_config=True).file_digests.llm
    assert "file_digests" not in MTBIModel.restore_from(tmp_path / "full.nemo", return_config=True)
    moved = shutil.copytree(llm, tmp_path / "moved")
    MTBIModel.restore_from(tmp_path / "small.nemo", override_config_path={"pretrained_llm": str(moved)})
    flip(weights)
    assert open_text_llm(llm).fingerprint == model.frozen.fingerprints["llm"]
    with pytest.raises(ValueError, match=f"model.pretrained_llm: {weights} has the hash .*: it is damaged or another"):
        MTBIModel.restore_from(tmp_path / "small.nemo")
    with pytest.raises(ValueError, match="other files of the LLM than lie in model.pretrained_llm=.*copy it again"):
        build(model_section, llm).on_load_checkpoint(checkpoint)
    assert RUN in checkpoint


def test_of_small_files_the_fingerprint_is_enough(model_section, tmp_path):
    model = build(model_section, tiny_text_llm(tmp_path / "llm", tie_embeddings=False))
    assert model.frozen.file_digests == {} and "file_digests" not in model.cfg


def test_where_megatron_keeps_its_tensors_is_compared_too(llm):
    (llm / "model.safetensors").unlink()
    (llm / "weights").mkdir()
    for name, size in ((".metadata", 10), ("__0_0.distcp", 20_000), ("__1_0.distcp", 10)):
        (llm / "weights" / name).write_bytes(b"x" * size)
    assert [path.name for path in open_text_llm(llm).sampled_files()] == ["__0_0.distcp", ".metadata"]


def share_job(folder):
    from nemo_mtbi.archive.large_files import hash_together
    from nemo_mtbi.config.parallel import ParallelConfig
    from nemo_mtbi.io import file_digests
    from nemo_mtbi.parallel import groups

    groups.initialize(ParallelConfig(2), 60)
    files = {"asr": [Path(folder, "a")], "llm": [Path(folder, "b"), Path(folder, "c")]}
    expected = {part: [file_digests.file_digest(path) for path in paths] for part, paths in files.items()}
    asked = []
    large_files.file_digest = lambda path: asked.append(path.name) or file_digests.file_digest(path)
    try:
        assert hash_together(files) == expected
        assert asked == (["a", "c"] if groups.tensor_parallel_rank() == 0 else ["b"])
        files["llm"].append(Path(folder, "missing"))
        with pytest.raises(ValueError, match="missing can't be read: No such file"):
            hash_together(files)
    finally:
        large_files.file_digest = file_digests.file_digest


def test_processes_of_a_replica_share_the_files(tmp_path, processes):
    for name in "abc":
        (tmp_path / name).write_text(name)
    processes(share_job, tmp_path, count=2)
