# SPDX-License-Identifier: Apache-2.0
"""Files that commit aa61722 has written, see ``write_old_files.py``: each is read, and gives what it gave then."""

import gzip
import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lhotse import CutSet
from omegaconf import OmegaConf
from safetensors.torch import load

from nemo_mtbi.commands import evaluate
from nemo_mtbi.commands import targets as targets_command
from nemo_mtbi.commands.train import train
from nemo_mtbi.config.model import FORMAT_VERSION, parse_model_config
from nemo_mtbi.data.behaviors import BEHAVIORS, CHAT_FORMAT, PROVENANCE
from nemo_mtbi.demo import recipe
from nemo_mtbi.demo.corpora import corpus
from nemo_mtbi.evaluation.load import Loader
from nemo_mtbi.evaluation.settings import parse_eval_config
from nemo_mtbi.models.mtbi_model import MTBIModel
from nemo_mtbi.parallel import groups
from nemo_mtbi.targets.generate import _ShardMaker
from nemo_mtbi.targets.store import read_targets

DATA = Path(__file__).parent / "data"
THEN = json.loads((DATA / "aa61722.json").read_text())
SETTINGS = THEN["settings"]
RECOMPUTED = 1e-6  # relative; another processor may round the last digit otherwise


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: a copy of all files."""
    with tarfile.open(DATA / "aa61722.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".gz") and path.is_file():
            content = path.read_bytes()
            text = gzip.decompress(content) if path.suffix == ".gz" else content
            text = text.replace(b"@FOLDER@", str(tmp_path).encode())
            path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(value):
    """Return the hash of a tensor's dtype, shape and content."""
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content).hexdigest()


def digests(values):
    return {name: digest(value) for name, value in dict(values).items()}


def samples():
    return [cut.load_audio()[0] for cut in CutSet.from_file("cuts/cuts.jsonl.gz")]


def refuse(*args, **kwargs):
    pytest.fail("what is on disk was made again")


# Archives ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["small", "full"])
def test_an_archive_of_format_2(kind, folder):
    if kind == "full":
        shutil.rmtree("parts")
    model = MTBIModel.restore_from(f"{kind}.nemo", map_location="cpu")
    assert digests(model.state_dict()) == THEN["archives"]["weights"]
    assert digests([*model.named_parameters(), *model.named_buffers()]) == THEN["archives"]["all"]
    assert model.generate(samples(), ["say it"] * 6) == THEN["archives"]["answers"]
    model.save_to("again.nemo")
    again = MTBIModel.restore_from("again.nemo", map_location="cpu")
    assert again.cfg.format_version == FORMAT_VERSION
    assert digests([*again.named_parameters(), *again.named_buffers()]) == THEN["archives"]["all"]


# Checkpoints ------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS["runs"])
def test_a_run_goes_on_from_a_checkpoint(name, monkeypatch):
    """It takes the steps that the run of then would have taken if nobody had stopped it."""
    expected, start, step = THEN["runs"][name], MTBIModel.on_train_start, MTBIModel.training_step
    begun, losses = [], []

    def begin(self):
        start(self)
        begun.append((self.trainer.global_step, digests(self.state_dict())))

    def record(self, batch, index):
        loss = step(self, batch, index)
        losses.append(float(loss))
        return loss

    monkeypatch.setattr(MTBIModel, "on_train_start", begin)
    monkeypatch.setattr(MTBIModel, "training_step", record)
    cfg = OmegaConf.merge(SETTINGS["run"], {"name": name, "model": SETTINGS["runs"][name]})
    cfg.exp_manager.name = name
    nemo = train(cfg)
    stopped = SETTINGS["stopped_after"]
    assert begun == [(stopped, expected["stopped"])]
    assert losses == pytest.approx(expected["losses"][stopped:], rel=RECOMPUTED)
    with tarfile.open(nemo) as tar:
        held = load(tar.extractfile("./model_weights.safetensors").read())
    assert held.keys() == expected["weights"].keys()
    if losses == expected["losses"][stopped:]:  # this processor rounds as that of then
        assert digests(held) == expected["weights"]


# Targets ------------------------------------------------------------


def behaviors(folder):
    """The rows of each cut, without the token ids that nobody wrote down then."""
    return {
        cut.id: [{key: value for key, value in row.items() if key != "ids"} for row in cut.custom[BEHAVIORS]]
        for cut in read_targets(folder)
    }


def lines(path):
    """The cuts of a manifest, without what the origin of behaviors says more today."""
    found = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    for cut in found:
        cut.get("custom", {}).get(PROVENANCE, {}).pop(CHAT_FORMAT, None)
    return found


def manifests(folder):
    return {path: lines(path) for path in sorted(Path(folder).rglob("cuts*.gz"))}


def test_targets_are_read():
    stored = {cut["id"]: cut["custom"][BEHAVIORS] for cut in lines(Path("targets/cuts.jsonl.gz"))}
    assert behaviors("targets") == stored and sum(map(len, stored.values())) == 18


def test_targets_are_not_made_again(monkeypatch):
    monkeypatch.setattr(_ShardMaker, "_ask", refuse)
    before = manifests("targets")
    report = targets_command.run(OmegaConf.create({**SETTINGS["targets"], "output_dir": "targets"}))
    assert report.counts["reused_shards"] == 2 and report.counts["rows"] == 18
    assert len(before) == 3 and manifests("targets") == before


def test_targets_that_were_being_made_are_gone_on_with():
    report = targets_command.run(OmegaConf.create({**SETTINGS["targets"], "output_dir": "killed"}))
    assert (report.counts["reused_shards"], report.counts["reused_batches"]) == (1, 1)
    assert behaviors("killed") == behaviors("targets")


# Caches ------------------------------------------------------------


def test_frames_of_the_encoder_are_not_made_again():
    model = MTBIModel(OmegaConf.create({**SETTINGS["model"], "encoder_cache": "frames"})).eval()
    audio = [torch.from_numpy(one) for one in samples()[:2]]
    lengths = torch.tensor([len(one) for one in audio])
    cache = model.speech_llm.encoder_cache
    padded = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)
    frames, counts = cache.encode(model.speech_llm.encoder, padded, lengths)
    assert (cache.hits, cache.misses, cache.damaged) == (2, 0, 0)
    assert {"frames": digest(frames), "counts": counts.tolist()} == THEN["frames"]


def missing(old, new, place=""):
    """What of a JSON value is not there any more, or is another."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [found for key in old for found in missing(old[key], new.get(key, "missing"), f"{place}/{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [found for index, (one, other) in pairs for found in missing(one, other, f"{place}/{index}")]
    return [] if old == new else [f"{place}: {old!r} is {new!r}"]


def test_answers_of_an_evaluation_are_not_given_again(monkeypatch):
    monkeypatch.setattr(Loader, "load", refuse)
    config = parse_eval_config(OmegaConf.create(SETTINGS["evaluation"]))
    evaluate.run(config)
    old = json.loads(gzip.decompress(Path("results.json.gz").read_bytes()))
    assert missing(old, json.loads(Path("evaluation/results.json").read_text())) == []
    old, new = gzip.decompress(Path("predictions.jsonl.gz").read_bytes()), Path("evaluation/predictions.jsonl")
    old, new = ([json.loads(line) for line in content.splitlines()] for content in (old, new.read_bytes()))
    assert len(old) == 54 and missing(old, new) == []


def test_the_cache_of_a_recipe_is_found(folder, monkeypatch):
    monkeypatch.setattr(_ShardMaker, "_ask", refuse)
    before = manifests("cache")
    made = {path.name for path in Path("cache").iterdir()}
    groups.initialize()
    prepared = recipe.prepare(recipe.parse_data_config(SETTINGS["recipe"]), parse_model_config(SETTINGS["model"]))
    paths = {name: Path(getattr(prepared, name)).absolute().relative_to(folder) for name in THEN["recipe"]}
    assert {name: str(path) for name, path in paths.items()} == THEN["recipe"]
    assert {path.name for path in Path("cache").iterdir() if path.suffix != ".lock"} == made
    assert len(before) == 5 and manifests("cache") == before


def test_the_cache_of_the_embedded_default_has_its_names(monkeypatch):
    with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "conf"), version_base=None):
        cfg = compose("mtbi_demo")
    monkeypatch.setattr(corpus, "_finished_root", lambda folder: folder)
    monkeypatch.setattr(recipe, "load_corpus", lambda folder: [])
    monkeypatch.setattr(recipe, "generate_targets", lambda cuts, out_dir, **more: [Path(out_dir) / "cuts"])
    monkeypatch.setattr(recipe, "reference_targets", lambda cuts, out_dir, **more: Path(out_dir) / "cuts")
    groups.initialize()
    found, model = {}, parse_model_config(cfg.model)
    for name, changes in SETTINGS["recipes"].items():
        made = recipe.prepare(recipe.parse_data_config({**cfg.data, "cache_dir": "names", **changes}), model)
        found[name] = [path.parent.name for path in (made.train, made.validation, made.test)]
    assert found == THEN["names"]
