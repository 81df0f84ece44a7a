# SPDX-License-Identifier: Apache-2.0
"""One ``.nemo`` for every layout: written by several processes, read by one, and the other way round."""

import errno
import json
import resource
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_values import ALL, draw_adapters, draw_learned
from matrix import with_core

from nemo_mtbi.config.parallel import ParallelConfig

LAYOUTS = {  # name: layout and data-parallel size
    "tp2": (ParallelConfig(2), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_sp_dp2": (ParallelConfig(2, sequence_parallel=True), 2),
}
LEARNED = {"lora": None, "llm": {"freeze": [r"layers\.0\.", "final"]}}  # in the place of adapters
PROMPTS = ["say it", "count it", "first word"]


def answers(model):
    rng = np.random.default_rng(0)
    audio = [rng.uniform(-0.1, 0.1, samples).astype(np.float32) for samples in (16000, 24000, 9000)]
    return model.generate(audio, PROMPTS)


def build(folder, layout=None, **changes):
    """The model of a folder; its weights depend on the seed alone."""
    from lightning.pytorch import seed_everything
    from omegaconf import OmegaConf

    from nemo_mtbi.models.mtbi_model import MTBIModel

    section = {
        "pretrained_asr": f"{folder}/asr.nemo",
        "pretrained_llm": f"{folder}/llm",
        "connector": {"hidden_size": 24},
        "generation": {"max_new_tokens": 8},
        "lora": {"rank": 3, "target_modules": ALL, "speech_only": True},
        **asdict(layout or ParallelConfig()),
        "dist_timeout": 60.0,
        **changes,
    }
    seed_everything(3, verbose=False)
    model = MTBIModel(OmegaConf.create(section))
    (draw_adapters if section["lora"] else draw_learned)(model.speech_llm.chunks)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Encoder, LLM, and what a single process writes and answers."""
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

    folder = tmp_path_factory.mktemp("single")
    tiny_text_llm(folder / "llm", num_layers=4, seed=2, tie_embeddings=False, vocab_size=129)  # 2 processes pad it
    tiny_asr_nemo(folder / "asr.nemo")
    model = build(folder)
    model.save_to(folder / "small.nemo")
    model.save_to(folder / "full.nemo", full=True)
    said = answers(model)
    assert len(set(said)) == len(PROMPTS)
    (folder / "answers.json").write_text(json.dumps(said))
    model = build(folder, **LEARNED)
    model.save_to(folder / "learned.nemo")
    model.save_to(folder / "learned_full.nemo", full=True)
    assert answers(model) != said
    (folder / "learned.json").write_text(json.dumps(answers(model)))
    return folder


def count(name):
    layout, data_size = LAYOUTS[name]
    return layout.model_parallel_size * data_size


# There and back ------------------------------------------------------------


def write(folder, out, name):
    """Worker: builds the model under a layout and saves it; the path of the first process counts."""
    from nemo_mtbi.parallel import groups

    groups.initialize(LAYOUTS[name][0], 60)
    model, rank = build(folder, LAYOUTS[name][0]), torch.distributed.get_rank()
    for kind in ("small", "full"):
        model.save_to(f"{out}/{kind}{rank}.nemo", full=kind == "full")
    build(folder, LAYOUTS[name][0], **LEARNED).save_to(f"{out}/learned{rank}.nemo")


@pytest.mark.slow
@pytest.mark.parametrize("name", with_core(LAYOUTS, ["pp2_vp2", "tp2_sp_dp2"]))
def test_every_layout_writes_the_same_file(name, folder, tmp_path, processes):
    """Byte for byte that of a single process, which answers with equal text then."""
    from nemo_mtbi.models.mtbi_model import MTBIModel

    processes(write, folder, tmp_path, name, count=count(name), timeout=150)
    assert {path.name for path in tmp_path.iterdir()} == {"small0.nemo", "full0.nemo", "learned0.nemo"}
    for kind in ("small", "full", "learned"):
        assert (tmp_path / f"{kind}0.nemo").read_bytes() == (folder / f"{kind}.nemo").read_bytes()
    restored = MTBIModel.restore_from(tmp_path / "full0.nemo", map_location="cpu")
    assert answers(restored) == json.loads((folder / "answers.json").read_text())


def read(folder, name, how):
    """Worker: restores what a single process has written, and compares its answers."""
    from lightning.pytorch import Trainer

    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.strategy import MTBIStrategy

    layout, data_size = LAYOUTS[name]
    changes = {}
    if how == "layout in force":
        groups.initialize(layout, 60)
    elif how == "trainer":
        strategy = MTBIStrategy(layout, timeout=60)
        devices = layout.model_parallel_size * data_size
        trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, barebones=True)
        changes["trainer"] = trainer
    else:
        changes["override_config_path"] = {**asdict(layout), "dist_timeout": 60.0}
    kinds = {"full": "answers", "small": "answers", "learned": "learned", "learned_full": "learned"}
    for kind, said in kinds.items():
        expected = json.loads(Path(folder, f"{said}.json").read_text())
        model = MTBIModel.restore_from(f"{folder}/{kind}.nemo", map_location="cpu", **changes)
        assert groups.layout() == layout and groups.data_parallel_size() == data_size
        assert (model.speech_llm.connector is not None) == groups.is_first_stage()
        found = answers(model)
        assert not groups.is_first_stage() or found == expected, f"{kind} {found}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, how",
    with_core(
        [*((name, "layout in force") for name in LAYOUTS), ("tp2_pp2", "trainer"), ("tp2_pp2", "configuration")],
        [("tp2_sp_dp2", "layout in force"), ("pp2_vp2", "layout in force"), ("tp2_pp2", "trainer")],
    ),
)
def test_every_layout_reads_the_file_of_a_single_process(name, how, folder, processes):
    processes(read, folder, name, how, count=count(name), timeout=150)


def warm_start(folder):
    """Worker: the connector of a file, in a model with other weights."""
    from nemo_mtbi.parallel import groups

    layout = ParallelConfig(1, 2)
    groups.initialize(layout, 60)
    model, other = build(folder, layout), build(folder, layout)
    for value in other.state_dict().values():
        value.zero_()
    other.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": f"{folder}/small.nemo"})
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    wider = build(folder, layout, connector={"hidden_size": 32})
    message = fails(
        ValueError,
        lambda: wider.maybe_init_from_pretrained_checkpoint({"init_from_nemo_model": f"{folder}/small.nemo"}),
    )
    assert "does not fit model.connector" in message


def test_a_warm_start_at_two_stages(folder, processes):
    processes(warm_start, folder, count=2, timeout=100)


# When it fails ------------------------------------------------------------


def fails(kind, action):
    """The message of the error, which is the same in all processes."""
    from nemo_mtbi.parallel import groups

    try:
        action()
    except kind as error:
        messages = groups.gather_objects(str(error))
        assert len(set(messages)) == 1, messages
        return messages[0]
    raise AssertionError("nothing was raised")


def run_out(folder, out):
    """Worker: the first process may not write more than so many bytes, wherever that is in the file."""
    from nemo_mtbi.parallel import groups

    layout = ParallelConfig(2, 2)
    groups.initialize(layout, 60)
    model, path = build(folder, layout), Path(out, "model.nemo")
    model.save_to(path, full=True)
    whole = path.read_bytes()
    for share in (0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if groups.is_global_first():
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(whole)), old[1]))
        try:
            message = fails(RuntimeError, lambda: model.save_to(path, full=True))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert message.startswith(f"{path} can't be written: File too large; make room, or save to another"), message
        assert path.read_bytes() == whole
        assert [entry.name for entry in Path(out).iterdir()] == ["model.nemo"]
    model.save_to(path, full=True)  # and nothing is stuck
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_file_and_tells_all_processes(folder, tmp_path, processes):
    processes(run_out, folder, tmp_path, count=4, timeout=150)


def no_place(folder, out):
    """Worker: folders that can't be written to, and disks that break."""
    from nemo_mtbi.io import atomic as durable
    from nemo_mtbi.parallel import groups

    layout = ParallelConfig(1, 2)
    groups.initialize(layout, 60)
    model = build(folder, layout)
    with groups.first(groups.is_global_first()):
        Path(out, "directory.nemo").mkdir(exist_ok=True)
        Path(out, "file").touch()
    for target, cause in ((f"{out}/file/model.nemo", "Not a directory"), (f"{out}/directory.nemo", "Is a directory")):
        for full in (True, False):
            message = fails(RuntimeError, lambda target=target, full=full: model.save_to(target, full=full))
            assert f"{target} can't be written: " in message and "save to a folder where" in message, message
            assert cause in message or "File exists" in message

    def broken(code):
        def raising(*args, **kwargs):
            raise OSError(code, "injected")

        return raising

    for code, remedy in ((errno.EROFS, "where files may be made"), (errno.ENOSPC, "make room")):
        durable.open = broken(code)  # in front of the builtin
        try:
            message = fails(RuntimeError, lambda: model.save_to(f"{out}/model.nemo", full=True))
        finally:
            del durable.open
        assert "injected; " in message and remedy in message
    groups.gather_objects(None)
    assert sorted(entry.name for entry in Path(out).iterdir()) == ["directory.nemo", "file"]


def test_a_folder_that_takes_no_files(folder, tmp_path, processes):
    processes(no_place, folder, tmp_path, count=2, timeout=100)


def mistake(folder, out):
    """Worker: a mistake on the first process, in the midst of the LLM's weights, is not a hang on the others."""
    from nemo_mtbi.archive import save_restore as archive
    from nemo_mtbi.parallel import groups

    layout = ParallelConfig(1, 2)
    groups.initialize(layout, 60)
    model, gather = build(folder, layout), archive.gather_weights

    def wrong(chunks):
        for number, (name, value) in enumerate(gather(chunks)):
            yield name, value if number < 9 or value is None else value[:1]

    archive.gather_weights = wrong
    try:
        model.save_to(f"{out}/model.nemo", full=True)
    except RuntimeError as error:
        mine = "was not announced" if groups.is_global_first() else "the first process has failed, see its message"
        assert mine in str(error)
    else:
        raise AssertionError
    finally:
        archive.gather_weights = gather
    groups.gather_objects(None)
    assert not list(Path(out).iterdir())


def test_a_mistake_of_one_process_reaches_all(folder, tmp_path, processes):
    processes(mistake, folder, tmp_path, count=2, timeout=100)


def alone(folder, out):
    """Worker: only the first process saves; it learns in time that the other does not come."""
    from nemo_mtbi.parallel import groups

    layout = ParallelConfig(1, 2)
    groups.initialize(layout, 5)
    model = build(folder, layout, dist_timeout=5.0)
    started = time.monotonic()
    if not groups.is_global_first():
        time.sleep(12)
        return
    try:
        model.save_to(f"{out}/model.nemo")
    except RuntimeError:
        assert time.monotonic() - started < 10
    else:
        raise AssertionError


@pytest.mark.slow
def test_a_process_that_saves_alone_does_not_wait_for_ever(folder, tmp_path, processes):
    processes(alone, folder, tmp_path, count=2, timeout=100)
    assert not list(tmp_path.iterdir())


def misfit(folder, out):
    """Worker: what only the first stage would see is an error on all of them."""
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups

    groups.initialize(ParallelConfig(1, 2), 60)
    full = f"{folder}/full.nemo"
    wider = {"connector": {"hidden_size": 32}}
    assert "does not fit" in fails(ValueError, lambda: MTBIModel.restore_from(full, override_config_path=wider))
    for name in ("encoder", "asr"):
        path = f"{out}/{name}.nemo"
        message = fails(ValueError, lambda path=path: MTBIModel.restore_from(path))
        assert {"encoder": "weights do not fit its settings", "asr": "asr.nemo is not a readable NeMo ASR"}[
            name
        ] in message


def damaged(folder, out):
    """Worker: what only one process reads is damaged."""
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups

    groups.initialize(ParallelConfig(1, 2), 60)
    for name in ("connector", "last layer"):
        message = fails(ValueError, lambda name=name: MTBIModel.restore_from(f"{out}/{name}.nemo"))
        assert f"{name}.nemo is damaged and was not loaded" in message, message


def test_damage_that_one_stage_reads_is_told_to_all(folder, tmp_path, processes):
    import tarfile

    from nemo_mtbi.io.nemo_tar import NemoFile

    content = (folder / "full.nemo").read_bytes()
    with NemoFile(folder / "full.nemo") as file:
        layers = file.tensors("llm/model.safetensors")
        last = [name for name in layers.names() if name.startswith("decoder.layers.")][-1]
        layer = file._members["llm/model.safetensors"].start + layers._starts[last]
    with tarfile.open(folder / "full.nemo") as tar:
        connector = tar.getmember("./model_weights.safetensors").offset_data + 5000
    for name, position in {"connector": connector, "last layer": layer}.items():
        damage = bytearray(content)
        damage[position] ^= 1
        (tmp_path / f"{name}.nemo").write_bytes(damage)
    processes(damaged, folder, tmp_path, count=2, timeout=100)


def test_what_one_stage_finds_wrong_is_told_to_all(folder, tmp_path, processes):
    import hashlib

    from tar_tricks import repacked

    def other_encoder(files):
        files["encoder/encoder.yaml"] = files["encoder/encoder.yaml"].replace(b"d_model: 16", b"d_model: 24")

    def broken_asr(files):
        (tmp_path / "asr-asr.nemo").write_bytes(b"no archive")
        digest = hashlib.sha256(b"no archive").hexdigest()
        config = files["model_config.yaml"].decode().split("\n")
        config = [f"pretrained_asr: {tmp_path}/asr-asr.nemo" if "pretrained_asr" in line else line for line in config]
        config = [f"  asr: sha256:{digest}" if line.startswith("  asr: ") else line for line in config]
        files["model_config.yaml"] = "\n".join(config).encode()

    repacked(folder / "full.nemo", tmp_path / "encoder.nemo", other_encoder)
    repacked(folder / "small.nemo", tmp_path / "asr.nemo", broken_asr)
    processes(misfit, folder, tmp_path, count=2, timeout=100)
