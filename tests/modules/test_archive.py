# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import tarfile

import pytest
import torch
from nemo.collections.asr.models import ASRModel
from safetensors.torch import load_file
from torch import nn

from nemo_mtbi.modules.archive import WEIGHTS, TensorArchive


def save(model, path, dtype=None):
    before = model._save_restore_connector
    model._save_restore_connector = TensorArchive(dtype)
    try:
        model.save_to(str(path))
    finally:
        model._save_restore_connector = before
    return path


def restore(path):
    return ASRModel.restore_from(str(path), map_location="cpu", save_restore_connector=TensorArchive())


def repack(path, folder, change):
    """Unpacks an archive, lets ``change(folder)`` alter it, and packs it again."""
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    change(folder)
    with tarfile.open(path, "w:") as tar:
        tar.add(folder, arcname="./")
    return path


@pytest.fixture(scope="module")
def archive(asr_model, tmp_path_factory):
    return save(asr_model, tmp_path_factory.mktemp("archive") / "model.nemo")


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_weights_come_back_as_they_were(archive, asr_model):
    model = restore(archive)
    assert_equal_weights(model.state_dict(), asr_model.state_dict())
    assert model.tokenizer.text_to_ids("red cat") == asr_model.tokenizer.text_to_ids("red cat")


def test_the_archive_holds_no_pickle(archive, tmp_path):
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model_config.yaml", WEIGHTS} <= names
    for path in tmp_path.iterdir():
        assert path.suffix in (".yaml", ".safetensors", ".model", ".txt", ".vocab"), path.name
        assert not path.read_bytes().startswith((b"PK", b"\x80"))  # torch.save, pickle


def test_half_precision_rounds_floats_and_leaves_integers(asr_model, tmp_path):
    half = save(asr_model, tmp_path / "half.nemo", torch.float16)
    with tarfile.open(half) as tar:
        tar.extract(next(m for m in tar.getmembers() if m.name.endswith(WEIGHTS)), tmp_path, filter="data")
    stored = load_file(tmp_path / WEIGHTS)
    kinds = {value.dtype for value in asr_model.state_dict().values()}
    assert torch.int64 in kinds  # the counters of the batch norms
    for name, value in asr_model.state_dict().items():
        assert stored[name].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
    for name, value in restore(half).state_dict().items():
        own = asr_model.state_dict()[name]
        assert value.dtype == own.dtype
        assert torch.equal(value, own.half().to(own.dtype) if own.is_floating_point() else own)


def test_shared_and_transposed_weights_are_written(tmp_path):
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    state = {"a": weight, "b": weight, "t": weight.t(), "part": weight[:, 1:]}
    TensorArchive()._save_state_dict_to_disk(state, tmp_path / WEIGHTS)
    assert_equal_weights(
        TensorArchive._load_state_dict_from_disk(tmp_path / WEIGHTS), {k: v.data for k, v in state.items()}
    )


def test_a_damaged_file_is_named(archive, tmp_path):
    def cut(folder):
        weights = folder / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-100])

    damaged = tmp_path / "damaged.nemo"
    damaged.write_bytes(archive.read_bytes())
    with pytest.raises(RuntimeError, match=f"{WEIGHTS} is damaged: .*save the archive again"):
        restore(repack(damaged, tmp_path / "parts", cut))


def test_archives_that_nemo_wrote_are_read(asr_model, tmp_path):
    asr_model.save_to(str(tmp_path / "nemo.nemo"))
    with tarfile.open(tmp_path / "nemo.nemo") as tar:
        assert any(name.endswith("model_weights.ckpt") for name in tar.getnames())
    assert_equal_weights(restore(tmp_path / "nemo.nemo").state_dict(), asr_model.state_dict())


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_an_archive_is_not_run(asr_model, tmp_path):
    def plant(folder):
        torch.save({"weight": Evil(tmp_path / "owned")}, folder / "model_weights.ckpt")

    asr_model.save_to(str(tmp_path / "evil.nemo"))
    path = repack(tmp_path / "evil.nemo", tmp_path / "parts", plant)
    with pytest.raises(pickle.UnpicklingError):
        restore(path)
    assert not (tmp_path / "owned").exists()
