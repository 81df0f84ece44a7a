# SPDX-License-Identifier: Apache-2.0
import gzip
import io
import os
import random
import shutil
import tarfile

import pytest
import torch
from nemo.collections.asr.models import ASRModel
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from safetensors.torch import load_file
from tar_tricks import GIANT, TRICKS, member, planted, repacked
from torch import nn

from nemo_mtbi.encoders.asr_archive import TensorArchive
from nemo_mtbi.io import nemo_tar as archives
from nemo_mtbi.io import tensor_file
from nemo_mtbi.io.atomic import replacing
from nemo_mtbi.io.digests import DamageError
from nemo_mtbi.io.nemo_tar import (
    DIGESTS,
    WEIGHTS,
    NemoFile,
    NemoWriter,
    read_members,
    read_yaml,
)
from nemo_mtbi.io.tensor_file import ArchiveError, Spec


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
    TensorArchive().write_weights(state, tmp_path / WEIGHTS)
    assert_equal_weights(TensorArchive.read_weights(tmp_path / WEIGHTS), {k: v.data for k, v in state.items()})


def test_a_damaged_file_is_named(archive, tmp_path):
    path = repacked(archive, tmp_path / "a.nemo", lambda files: files.update({WEIGHTS: files[WEIGHTS][:-100]}))
    with pytest.raises(ArchiveError, match=f"{WEIGHTS} is damaged: .*save the archive again"):
        restore(path)


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
    def plant(files):
        content = io.BytesIO()
        torch.save({"weight": Evil(tmp_path / "owned")}, content)
        files["model_weights.ckpt"] = content.getvalue()

    asr_model.save_to(str(tmp_path / "good.nemo"))
    path = repacked(tmp_path / "good.nemo", tmp_path / "evil.nemo", plant)
    with pytest.raises(ArchiveError, match="model_weights.ckpt holds more than tensors, and is not read"):
        restore(path)
    assert not (tmp_path / "owned").exists()


# Headers come first ------------------------------------------------------------


@pytest.fixture
def unpacked(monkeypatch):
    """What NeMo has unpacked, or set out to."""
    calls, unpack = [], SaveRestoreConnector._unpack_nemo_file
    monkeypatch.setattr(
        SaveRestoreConnector, "_unpack_nemo_file", staticmethod(lambda *a, **k: calls.append(a) or unpack(*a, **k))
    )
    return calls


@pytest.mark.parametrize("trick", TRICKS)
def test_nothing_of_a_harmful_archive_is_unpacked(archive, tmp_path, trick, unpacked):
    content, message = TRICKS[trick]
    path = planted(archive, tmp_path / "harmful.nemo", content)
    with pytest.raises(ArchiveError, match=message):
        restore(path)
    with pytest.raises(ArchiveError, match=message):
        NemoFile(path)
    assert not unpacked


def test_a_class_that_nemo_does_not_allow_is_not_imported(archive, tmp_path):
    """Neither by NeMo 3 nor by NeMo 2, which would import what stands there."""
    (tmp_path / "owned_module.py").write_text("raise SystemExit('imported')")

    def rename(files):
        config = files["model_config.yaml"]
        files["model_config.yaml"] = config.replace(b"nemo.collections.asr.models.ctc_bpe_models", b"owned_module")

    path = repacked(archive, tmp_path / "evil.nemo", rename)
    with pytest.raises(ArchiveError, match="it names the class owned_module.EncDecCTCModelBPE"):
        restore(path)


def test_packed_archives_of_old_are_read_and_bombs_are_not(archive, asr_model, tmp_path):
    (tmp_path / "old.nemo").write_bytes(gzip.compress(archive.read_bytes()))
    assert_equal_weights(restore(tmp_path / "old.nemo").state_dict(), asr_model.state_dict())
    bomb = member("./a", bytes(30 * 2**20)) + archive.read_bytes()
    (tmp_path / "bomb.nemo").write_bytes(gzip.compress(bomb))
    with pytest.raises(ArchiveError, match="a claims more bytes than there are"):
        restore(tmp_path / "bomb.nemo")


def test_an_archive_is_not_unpacked_where_there_is_no_room(archive, monkeypatch, unpacked):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="set TMPDIR to a larger folder"):
        restore(archive)
    assert not unpacked


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_cut_off_archives_are_refused(archive, tmp_path, part):
    content = archive.read_bytes()
    (tmp_path / "cut.nemo").write_bytes(content[: int(part * len(content.rstrip(b"\0")))])
    with pytest.raises(ArchiveError):
        restore(tmp_path / "cut.nemo")


def test_flipped_bits_give_members_within_the_file_or_an_error(archive):
    content, rng, refused = archive.read_bytes(), random.Random(0), 0
    spots = [spot for spot in range(0, len(content), 512) if content[spot : spot + 2] == b"./"]
    for _ in range(3000):
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.choice(spots) + rng.randrange(512)] ^= 1 << rng.randrange(8)
        try:
            for found in read_members(io.BytesIO(flipped), len(flipped)).values():
                assert 0 <= found.start <= found.start + found.size <= len(flipped)
        except ArchiveError:
            refused += 1
    assert refused > 1000


def test_members_that_claim_more_than_the_limit_are_refused_without_being_read():
    file = io.BytesIO(member("./a", bytes(2000)) + member("./b", bytes(2000)) + bytes(1024))
    assert {name: found.size for name, found in read_members(file, 10_000).items()} == {"a": 2000, "b": 2000}
    file.seek(0)
    with pytest.raises(ArchiveError, match="b claims more bytes than there are"):
        read_members(file, 3999, whole=False)
    file = io.BytesIO(member("./a", size=GIANT))
    with pytest.raises(ArchiveError):
        read_members(file, 2 * GIANT)


def test_the_number_of_files_is_bounded(monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 3)
    with pytest.raises(ArchiveError, match="it holds more than 3 files"):
        read_members(io.BytesIO(b"".join(member(f"./{n}") for n in range(9)) + bytes(1024)), 10_000)


# Text ------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        (b"a: &x [1, 2]\nb: *x", "text refers to parts of itself"),
        (b"a: ${oc.env:HOME}", "text refers to values outside of it"),
        (b"a: [1,", "text is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "text is not YAML"),
        (b"\xff\xfe", "text is not YAML"),
        (b"[" * 250_000, "text is nested too deep"),
        (b"a: " + b"{b: " * 250_000, "text is nested too deep"),
        (b"\n".join(b" " * depth + b"a:" for depth in range(500)), "text is nested too deep"),
        (b"a: 1\na: 2", "text is not YAML"),
        (b"[1, 2]", "text holds no keys and values"),
    ],
)
def test_yaml_that_is_more_than_values_is_refused(text, message):
    with pytest.raises(ArchiveError, match=message):
        read_yaml(text, "text")


def test_yaml_of_values_is_read():
    assert read_yaml(b"a: 1e-5\nb: {c: [x, null, true]}", "text") == {"a": 1e-5, "b": {"c": ["x", None, True]}}


# Files of our own ------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """An archive and the directory it was unpacked to."""
    with replacing(tmp_path / "small.nemo") as file:
        archive = NemoWriter(file)
        archive.add("a/text", b"hello")
        archive.add("empty", b"")
        archive.end()
    with tarfile.open(tmp_path / "small.nemo") as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    return tmp_path


@pytest.mark.parametrize("name", ["small.nemo", "folder"])
def test_an_archive_and_its_directory_are_read_alike(small, name):
    with NemoFile(small / name) as file:
        assert "a/text" in file and "empty" in file and "a" not in file
        assert (file.read("a/text"), file.read("empty")) == (b"hello", b"")
        with pytest.raises(ArchiveError, match="^other is missing$"):
            file.read("other")
        with pytest.raises(ArchiveError, match="^a/text has 5 bytes, more than it can need$"):
            file.read("a/text", limit=4)
    assert file.unknown(["a/text", DIGESTS]) == (["empty"] if name == "small.nemo" else [])


def test_a_directory_may_not_lead_outside(small):
    (small / "secret").write_text("secret")
    (small / "folder" / "empty").unlink()
    (small / "folder" / "empty").symlink_to(small / "secret")
    (small / "folder" / "b").symlink_to(small / "folder" / "a")
    with NemoFile(small / "folder") as file:
        for name in ("empty", "b/text"):
            with pytest.raises(ArchiveError, match="is a symbolic link"):
                file.read(name)
        assert file.read("a/text") == b"hello"


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ArchiveError, match="it does not exist"):
        NemoFile(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArchiveError, match="it is not a file"):
        NemoFile(tmp_path / "pipe")


# Digests ------------------------------------------------------------


@pytest.fixture
def tensors(tmp_path, monkeypatch):
    """An archive of tensors whose blocks have 64 bytes, and the tensors."""
    monkeypatch.setattr(archives, "DIGEST_BLOCK", 64)
    monkeypatch.setattr(tensor_file, "DIGEST_BLOCK", 64)
    values = {"a": torch.arange(60.0).view(12, 5), "b": torch.arange(7.0), "c": torch.arange(9).half()}
    specs = {name: Spec(value.dtype, tuple(value.shape)) for name, value in values.items()}
    with replacing(tmp_path / "tensors.nemo") as file:
        archive = NemoWriter(file)
        archive.add("text", b"words")
        archive.add_tensors(WEIGHTS, specs, values.items())
        archive.end()
    return tmp_path / "tensors.nemo", values


def read_all(path):
    with NemoFile(path) as file:
        stored = file.tensors(WEIGHTS)
        return file.read("text"), {name: stored.tensor(name) for name in stored.names()}


def test_no_flipped_byte_is_read(tensors, tmp_path):
    path, values = tensors
    content = path.read_bytes()
    harmless = 0
    for position in range(0, len(content) - 1024, 3):
        damaged = bytearray(content)
        damaged[position] ^= 16
        (tmp_path / "damaged.nemo").write_bytes(damaged)
        try:
            text, found = read_all(tmp_path / "damaged.nemo")
        except (ArchiveError, DamageError):
            continue
        assert text == b"words" and all(torch.equal(found[name], values[name]) for name in values)
        harmless += 1
    assert harmless < len(content) / 3 / 2  # what fills blocks of the tar, and white space of the digests


def test_a_process_reads_and_checks_its_share_alone(tensors, tmp_path):
    path, values = tensors
    with NemoFile(path) as file:
        start = file._members[WEIGHTS].start
        stored = file.tensors(WEIGHTS)
        first = start + stored._starts["a"]  # of 240 bytes, 20 for a row
    content = bytearray(path.read_bytes())
    content[first + 11 * 20] ^= 1  # the last row
    (tmp_path / "damaged.nemo").write_bytes(content)
    with NemoFile(tmp_path / "damaged.nemo") as file:
        stored = file.tensors(WEIGHTS)
        assert torch.equal(stored.rows("a", 0, 2, 6), values["a"][2:6])
        with pytest.raises(DamageError, match=f"{WEIGHTS} is not as it was written: .*, where a lies"):
            stored.rows("a", 0, 6, 12)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "digests.json can't be read"),
        (b"[]", "digests.json can't be read"),
        (b'{"block": 7, "members": {}}', "block is 7"),
        (b'{"block": 1048576, "members": {"text": {"size": 5, "sha256": 3}}}', "digests.json can't be read"),
        (b'{"block": 1048576, "members": {}}', "digests.json has nothing of text"),
        (b'{"block": 1048576, "members": {"text": {"size": 5, "sha256": []}}}', "digests of 0 blocks"),
        (b'{"block": 1048576, "members": {"text": {"size": 6, "sha256": ["a"]}}}', "5 bytes, but 6 were written"),
        (b'{"block": 1048576, "members": {"text": {"size": 5, "sha256": ["A"]}}}', "text is not as it was written"),
    ],
)
def test_digests_that_are_none(tmp_path, content, message):
    path = tmp_path / "crafted.nemo"
    path.write_bytes(member("./text", b"words") + member("./digests.json", content) + bytes(1024))
    with pytest.raises(DamageError, match=message):
        with NemoFile(path) as file:
            file.read("text")
