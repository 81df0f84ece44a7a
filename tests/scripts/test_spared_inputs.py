# SPDX-License-Identifier: Apache-2.0
"""No script replaces or deletes what it reads; each says so before any work."""

import gzip
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
from lhotse import AudioSource, CutSet, MonoCut, Recording, SupervisionSegment
from omegaconf import OmegaConf

import nemo_mtbi
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.targets.store import own_share

ROOT = Path(nemo_mtbi.__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuts(tmp_path, monkeypatch):
    """``cuts(name)``: a manifest of three cuts in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with CutSet.open_writer(name) as writer:
            for n in range(3):
                recording = Recording(f"c{n}", [AudioSource("file", [0], f"c{n}.flac")], 16000, 16000, 1.0)
                segment = SupervisionSegment(f"c{n}", f"c{n}", 0.0, 1.0, text="héllo")
                writer.write(MonoCut(f"c{n}", 0.0, 1.0, 0, supervisions=[segment], recording=recording))
        return name

    return make


def everything(folder="."):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def refuses(module, message, capsys, *arguments):
    """Whether a script ends with a message, and everything is as it was."""
    before = everything()
    assert module.main([str(argument) for argument in arguments]) == 1
    assert message in capsys.readouterr().err
    assert everything() == before


# ------------------------------------------------------------------------------------------------ targets


NAMES = ("cuts.jsonl.gz", "cuts-00000.jsonl.gz", "cuts-00042.jsonl.gz")


def generate(**keys):
    from nemo_mtbi.commands.targets import run

    return run({"pretrained_llm": "no-llm", **keys}, progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output", ["d", "linked"])
def test_targets_spare_their_cuts(cuts, name, output, overwrite):
    cuts(f"d/{name}")
    os.symlink("d", "linked")
    before = everything()
    with pytest.raises(ValueError, match=f"output_dir would replace {output}/{name}, which is an input .cuts_path"):
        generate(cuts_path=f"d/{name}", output_dir=output, overwrite=overwrite)
    assert everything() == before


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"input_cfg": "d/input_cfg.yaml"}, "replace d/input_cfg.yaml, which is an input .input_cfg"),
        ({"input_cfg": "blend.yaml"}, "replace d/cuts-00001.jsonl.gz, which is an input .input_cfg"),
        ({"input_cfg": [{"type": "lhotse", "cuts_path": "d/cuts.jsonl.gz"}]}, "which is an input .input_cfg"),
        ({"cuts_path": "d/cuts-0000{0..1}.jsonl.gz"}, "replace d/cuts-0000.*which is an input .cuts_path"),
        ({"cuts_path": "d/cuts-0000_OP_0..1_CL_.jsonl.gz"}, "replace d/cuts-0000.*which is an input .cuts_path"),
        ({"cuts_path": "other.jsonl.gz", "tasks": "d/targets.json"}, "which is an input .tasks"),
        ({"shar_path": "d"}, "which is an input .shar_path"),
    ],
)
def test_every_source_of_targets_is_spared(cuts, monkeypatch, keys, message):
    monkeypatch.setattr("nemo_mtbi.commands.targets.load_pool", lambda name: type("Pool", (), {"tasks": ()})())
    monkeypatch.setattr("nemo_mtbi.targets.plan.TargetPlan.tasks", lambda self, pool: [])
    for name in ("d/cuts.jsonl.gz", "d/cuts-00000.jsonl.gz", "d/cuts-00001.jsonl.gz", "other.jsonl.gz"):
        cuts(name)
    Path("d/input_cfg.yaml").write_text("- {type: lhotse, cuts_path: other.jsonl.gz}\n")
    Path("blend.yaml").write_text("- {type: lhotse, cuts_path: d/cuts-00001.jsonl.gz}\n")
    Path("d/targets.json").write_text("{}")
    before = everything()
    with pytest.raises(ValueError, match=message):
        generate(output_dir="d", overwrite=True, **keys)
    assert everything() == before


def test_targets_beside_their_cuts_are_legal(cuts):
    from nemo_mtbi.commands.targets import parse_generate_config, spare_inputs

    cuts("d/train.jsonl.gz")
    config = parse_generate_config({"cuts_path": "d/train.jsonl.gz", "output_dir": "d"})
    spare_inputs(config)
    for name in (*NAMES, "d/targets.json"):  # of a former run
        cuts(f"d/{name}") if name in NAMES else Path(name).write_text("{}")
    spare_inputs(config)


@pytest.fixture
def lines(cuts):
    rows = (
        {"cut_id": f"c{n}", "task": "a", "prompt": "p", "response": "x", "finish_reason": "stop"} for n in range(3)
    )

    def make(name):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return make


@pytest.mark.parametrize("name", [*NAMES, "targets.json"])
def test_imported_targets_spare_cuts_and_answers(cuts, lines, name, capsys):
    module = script("import_targets")
    source, answers = ("in.jsonl.gz", f"d/{name}") if name == "targets.json" else (f"d/{name}", "t.jsonl")
    options = ("--cuts", cuts(source), "--targets", lines(answers), "--llm", "x", "--out", "d", "--overwrite")
    refuses(module, f"--out would replace d/{name}, which is an input", capsys, *options)


def test_imported_targets_may_stand_beside_what_they_are_made_of(cuts, lines, capsys):
    module = script("import_targets")
    options = ["--cuts", cuts("d/in.jsonl.gz"), "--targets", lines("d/t.jsonl"), "--llm", "x", "--out", "d"]
    before = everything()
    assert module.main(options) == 0
    assert module.main([*options, "--overwrite"]) == 0, "what is replaced are former outputs"
    assert before.items() <= everything().items()
    with own_share("d"):
        refuses(module, "--out=d is being written by another run", capsys, *options, "--overwrite")


# ------------------------------------------------------------------------------------------------ corpora


@pytest.mark.parametrize("name", [*NAMES, "alignment.json", "settings.json", "sounds.safetensors"])
def test_alignment_spares_its_cuts_and_model(cuts, name, capsys):
    shutil.move(cuts("tmp.jsonl.gz"), name if name in NAMES else "c.jsonl.gz")
    source, asr = (name, "demo") if name in NAMES else ("c.jsonl.gz", name)
    if asr == name:
        Path(name).write_text("a model")
    options = ("--cuts", source, "--asr", asr, "--out", ".")
    refuses(script("align"), f"--out would replace {name}, which is an input", capsys, *options)


def write_manifest(name):
    row = json.dumps({"audio_filepath": "a.wav", "duration": 1.0, "text": "x"}) + "\n"
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(gzip.compress(row.encode()) if name.endswith(".gz") else row.encode())
    return name


@pytest.mark.parametrize("option", ["source", "--texts", "--times"])
def test_a_corpus_spares_its_sources(tmp_path, monkeypatch, option, capsys):
    monkeypatch.chdir(tmp_path)
    named = write_manifest("d/cuts.jsonl.gz")
    rest = [] if option == "source" else [option, named]
    source = named if option == "source" else write_manifest("m.json")
    message = f"--out would replace d/cuts.jsonl.gz, which is an input ({option}"
    refuses(script("prepare/corpus"), message, capsys, "manifest", source, *rest, "--out", "d")


def test_a_corpus_may_be_written_into_its_own_folder_again(tmp_path, monkeypatch, capsys):
    module = script("prepare/corpus")
    monkeypatch.chdir(tmp_path)
    write_manifest("corpus/train.jsonl.gz")
    arguments = module.parse_arguments(["any", "corpus", "--out", "corpus"])
    module.spare_sources(arguments, ["all"])
    with pytest.raises(ValueError, match="would replace corpus/train.jsonl.gz"):
        module.spare_sources(arguments, ["train"])
    Path("corpus/train.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a", "type": "MonoCut"}\n'))
    module.spare_sources(arguments, ["train"])


def test_export_takes_no_place_of_its_cuts(cuts, capsys):
    module = script("prepare/export")
    source = cuts("d/cuts.jsonl.gz")
    for out in (source, "d", "."):
        refuses(
            module,
            "--out" if out != "." else "is an input",
            capsys,
            "--cuts",
            source,
            "--out",
            out,
            "--format",
            "shar",
        )
    with exclusive("new/export"):
        refuses(module, "is not empty", capsys, "--cuts", source, "--out", "new", "--format", "shar")


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("source", ["qwen.partial", "qwen.partial/llm"])
@pytest.mark.parametrize("command", ["to-hf", "to-megatron"])
def test_conversion_spares_a_source_where_it_would_build(tmp_path, monkeypatch, source, command, llm_dir, capsys):
    from hf_models import hf_llm

    monkeypatch.chdir(tmp_path)
    if command == "to-hf":
        shutil.copytree(llm_dir, source)
        hf_llm(tmp_path / "theirs", "llama", "brackets")
        monkeypatch.setattr("nemo_mtbi.llm.convert.hf.architecture_of", lambda config: _architecture(source))
        options = ["--config", "theirs/config.json"]
    else:
        hf_llm(Path(source), "llama", "brackets")
        options = []
    message = "out would replace qwen.partial, which is an input (source"
    refuses(script("convert_hf"), message, capsys, command, source, "qwen", *options)


def _architecture(source):
    from nemo_mtbi.llm.directory import OwnDirectory

    return OwnDirectory(Path(source)).architecture


def test_conversion_does_not_clear_a_folder_that_it_did_not_make(tmp_path, monkeypatch, capsys):
    from hf_models import hf_llm

    monkeypatch.chdir(tmp_path)
    hf_llm(Path("theirs"), "llama", "brackets")
    Path("ours.partial").mkdir()
    Path("ours.partial/notes.txt").write_text("mine")
    refuses(script("convert_hf"), "not left by an interrupted run", capsys, "to-megatron", "theirs", "ours")


# ------------------------------------------------------------------------------------------------ evaluation, training


def evaluation(**keys):
    from nemo_mtbi.evaluation.results import spare_inputs
    from nemo_mtbi.evaluation.settings import EvalConfig, SetConfig, SystemConfig

    systems = {
        "m": SystemConfig(nemo=keys.pop("nemo", "m.nemo")),
        "t": SystemConfig(kind="text", llm=keys.pop("llm", None)),
    }
    sets = {"s": SetConfig(**{"cuts": "cuts.jsonl.gz", **keys})}
    spare_inputs(EvalConfig(output_dir="out", systems=systems, sets=sets), Path("out"))


@pytest.mark.parametrize(
    "keys",
    [
        {"cuts": "out/predictions.jsonl"},
        {"cuts": "out/answers/m.0/s/a.jsonl"},
        {"tasks": "out/throughput.json"},
        {"cuts": None, "format": "voicebench", "path": "out/results.json"},
        {"nemo": ["m.nemo", "out/report.html"]},
        {"llm": "out"},
        {"llm": "."},
    ],
)
def test_an_evaluation_spares_what_it_reads(tmp_path, monkeypatch, keys):
    monkeypatch.chdir(tmp_path)
    Path("out/answers/m.0/s").mkdir(parents=True)
    Path("out/answers/m.0/s/a.jsonl").touch()
    with pytest.raises(ValueError, match="output_dir would replace out/.*which is an input .s(ystem|et)s"):
        evaluation(**keys)


def test_an_evaluation_replaces_results_of_evaluations_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation()
    Path("out").mkdir()
    for name in ("results.json", "report.html", "predictions.jsonl"):
        (Path("out") / name).write_text('{"seed": 0, "train": {}, "behavior": {}, "systems": {}, "sets": {}}')
        with pytest.raises(ValueError, match=f"out/{name} is there and is not of an evaluation: give a folder"):
            evaluation()
        (Path("out") / name).unlink()
    (Path("out") / "results.json").write_text('{"systems": {}, "sets": {}}')
    (Path("out") / "report.html").touch()
    evaluation()


def training(**changes):
    from nemo_mtbi.commands.run_folder import spare_inputs

    base = {
        "name": "tiny",
        "model": {"pretrained_asr": "asr.nemo", "pretrained_llm": "demo", "train_ds": {}, "validation_ds": {}},
        "exp_manager": {"name": "tiny", "explicit_log_dir": "run"},
    }
    spare_inputs(OmegaConf.to_container(OmegaConf.merge(base, changes)))


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"model": {"pretrained_asr": "run/tiny.nemo"}}, "model.pretrained_asr"),
        ({"model": {"pretrained_llm": "."}}, "model.pretrained_llm"),
        ({"model": {"encoder": {"beside": {"path": "run/tiny.nemo"}}}}, "model.encoder.beside.path"),
        ({"init_from_nemo_model": "run/tiny.nemo"}, "init_from_nemo_model"),
        ({"init_from_nemo_model": {"a": {"path": "run/tiny.nemo"}}}, "init_from_nemo_model"),
        ({"init_from_nemo_model": "run/checkpoints/tiny.nemo"}, "init_from_nemo_model"),
        ({"model": {"train_ds": {"cuts_path": "run/results.json"}}}, "model.train_ds.cuts_path"),
        ({"benchmark": {"cuts": "run/results.json"}}, "benchmark.cuts"),
    ],
)
def test_a_training_spares_what_it_reads(tmp_path, monkeypatch, changes, key):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"folder of the run.* would replace run/.*which is an input .{key}"):
        training(**changes)
    training(name="other", exp_manager={"name": "other"})


@pytest.mark.parametrize(
    "manager, folder",
    [
        ({"exp_dir": "exp", "name": "n", "version": "v"}, "exp/n/v"),
        ({"exp_dir": "exp", "name": "n", "resume_if_exists": True}, "exp/n"),
        ({"resume_if_exists": True}, "nemo_experiments/tiny"),
    ],
)
def test_the_folder_of_a_run_is_the_one_that_nemo_takes(tmp_path, monkeypatch, manager, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"would replace {folder}/tiny.nemo"):
        training(init_from_nemo_model=f"{folder}/tiny.nemo", exp_manager={"explicit_log_dir": None, **manager})
    new = {"explicit_log_dir": None, "exp_dir": "exp", "name": "n"}  # gets a folder with the time in its name
    training(init_from_nemo_model="exp/n/tiny.nemo", exp_manager=new)


def test_a_run_that_goes_on_does_not_move_its_inputs_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/train.json").touch()
    changes = {"model": {"train_ds": {"input_cfg": [{"type": "nemo", "manifest_filepath": "run/train.json"}]}}}
    training(**changes)
    with pytest.raises(ValueError, match="would replace run/train.json, which is an input .model.train_ds.input_cfg"):
        training(**changes, exp_manager={"resume_if_exists": True})


def test_a_training_replaces_results_of_trainings_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/results.json").write_text('{"systems": {}, "sets": {}}')
    with pytest.raises(ValueError, match="run/results.json is there and is not of a training"):
        training()
    Path("run/results.json").write_text('{"seed": 0, "train": {}, "behavior": {}, "systems": {}, "sets": {}}')
    training()


def test_a_nemo_is_not_saved_over_the_parts_that_it_refers_to(model_section, tmp_path):
    from nemo_mtbi.models.mtbi_model import MTBIModel

    asr, llm = tmp_path / "asr.nemo", tmp_path / "llm"
    shutil.copy(model_section().pretrained_asr, asr)
    shutil.copytree(model_section().pretrained_llm, llm)
    section = model_section(pretrained_asr=str(asr), pretrained_llm=str(llm), train_ds=None, validation_ds=None)
    model, before = MTBIModel(section), everything(tmp_path)
    os.symlink(asr, tmp_path / "link.nemo")
    for path in (asr, tmp_path / "link.nemo", llm / "llm.yaml"):
        for full in (False, True):
            with pytest.raises(ValueError, match="save_path would replace .* an input .pretrained_"):
                model.save_to(str(path), full=full) if full else model.save_to(str(path))
    assert {**before} == {name: value for name, value in everything(tmp_path).items() if "link" not in name}
