# SPDX-License-Identifier: Apache-2.0
"""The scripts in ``examples/`` as a user runs them. Most runs share this process: NeMo's import is what costs."""

import ast
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from matrix import with_core
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HEAVY = ("nemo", "torch", "megatron", "lightning", "lhotse", "transformers", "numpy")


def environment(*path, **changes):
    search = os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **changes}


def command(name, *arguments):
    return [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]


def call(name, **keys):
    """Runs the script in this process, on its own YAML with other values."""
    cfg = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
    OmegaConf.set_struct(cfg, True)
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](OmegaConf.merge(cfg, keys))


# ------------------------------------------------------------------------------------------------ questions


@pytest.fixture(scope="module")
def without_nemo(tmp_path_factory):
    """An environment in which importing something heavy fails."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} must not be imported')\n")
    return environment(folder)


def children_seconds():
    """CPU time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_help_is_answered_before_nemo_is_imported(script, without_nemo, tmp_path):
    used = children_seconds()
    done = subprocess.run(
        command(script.stem, "--help"), env=without_nemo, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert children_seconds() - used < 5
    assert done.stdout.startswith(ast.get_docstring(ast.parse(script.read_text())))
    assert not os.listdir(tmp_path)
    lead = ("Each key is explained in ", "and in ")
    lines = [line for line in done.stdout.splitlines() if line.startswith(lead)]
    assert len(lines) == (2 if script.stem == "mtbi_train" else 1)
    for line in lines:
        keys = set(OmegaConf.load(line.split()[-1])) - {"defaults"}
        assert all(f"{key}:" in done.stdout for key in keys), "every key and its default is shown"


def test_the_block_works(without_nemo, tmp_path):
    done = subprocess.run(command("mtbi_transcribe"), env=without_nemo, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "must not be imported" in done.stderr


# ------------------------------------------------------------------------------------------------ targets


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from nemo_mtbi.testing import tiny_cuts

    return tiny_cuts(tmp_path_factory.mktemp("corpus"), 16, behaviors=False)


@pytest.fixture(scope="module")
def keys(llm_dir):
    """What every run of target generation here has in common."""
    generation = {"max_new_tokens": 6, "batch_tokens": 200}
    return {"pretrained_llm": str(llm_dir), "shard_size": 6, "generation": generation, "cuda": -1}


@pytest.fixture(scope="module")
def targets(corpus, keys, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("targets")
    call("mtbi_generate_targets", **keys, cuts_path=str(corpus), output_dir=str(folder))
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_yaml_of_target_generation_fits_its_schema():
    from nemo_mtbi.commands.targets import GenerateTargetsConfig

    given = OmegaConf.load(ROOT / "conf" / "mtbi_generate_targets.yaml")
    schema = OmegaConf.structured(GenerateTargetsConfig)
    assert set(given) == {entry.name for entry in fields(GenerateTargetsConfig)} - {"tarred_audio_filepaths"}
    for section in ("plan", "generation"):
        assert set(given[section]) == set(schema[section])


def lines_of(path):
    """Lines of a file that another process writes and removes."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("seed", with_core(range(4), [0]))
def test_targets_killed_at_a_random_moment(seed, keys, tmp_path, capsys):
    from nemo_mtbi.testing import tiny_cuts

    # seven shards, so that much is left to do when it is killed in one of the first three
    corpus, out = tiny_cuts(tmp_path / "corpus", 40, behaviors=False), tmp_path / "out"
    rng = random.Random(seed)
    shard, batches, pause = rng.randrange(3), rng.randrange(10), rng.uniform(0, 0.1)
    # pytest shows it where the test fails
    print(f"killed {pause:.3f} s after batch {batches} of shard {shard}")
    partial = out / f"cuts-{shard:05d}.partial.jsonl"
    arguments = [f"cuts_path={corpus}", f"output_dir={out}", f"pretrained_llm={keys['pretrained_llm']}", "cuda=-1"]
    arguments += ["shard_size=6", "generation.max_new_tokens=6", "generation.batch_tokens=200"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            command("mtbi_generate_targets", *arguments), env=environment(), cwd=tmp_path, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 240
        while lines_of(partial) <= batches and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        log.seek(0)
        assert process.wait() == -signal.SIGKILL, log.read()
    assert os.listdir(out) and not (out / "targets.json").exists(), "it was killed in the middle of its work"
    for folder in (out, tmp_path / "undisturbed"):
        call("mtbi_generate_targets", **keys, cuts_path=str(corpus), output_dir=str(folder))
        assert ("from a former run" in capsys.readouterr().out) == (folder == out)
    assert len(content(out)) == 9 and content(out) == content(tmp_path / "undisturbed")


def test_targets_of_two_ranks(corpus, keys, targets, tmp_path, capsys):
    for rank in (1, 0):
        own = {"rank": rank, "world_size": 2, "cuts_path": str(corpus), "output_dir": str(tmp_path)}
        call("mtbi_generate_targets", **keys, **own)
        out = capsys.readouterr().out
        assert ("not complete: " in out) == (rank == 1) and ("train on: " in out) == (rank == 0)
    assert content(tmp_path) == content(targets)


def test_what_the_run_says_is_what_it_wrote(corpus, keys, targets, capsys):
    from nemo_mtbi.llm.directory import open_text_llm

    call("mtbi_generate_targets", **keys, cuts_path=str(corpus), output_dir=str(targets))
    out = capsys.readouterr().out
    cuts = list(CutSet.from_file(targets / "cuts.jsonl.gz"))
    rows = sum(len(cut.behaviors) for cut in cuts)
    assert len(cuts) == 16 and f"16 cuts with {rows} rows in 3 shards" in out
    truncated = sum(row["truncated"] for cut in cuts for row in cut.behaviors)
    assert f"cut by the length limit: {truncated}" in out
    made_by = cuts[0].behaviors_from
    assert made_by["llm"] == open_text_llm(keys["pretrained_llm"]).fingerprint
    assert f"LLM {made_by['llm']}" in out and f"chat format {made_by['chat']}" in out
    assert f"train on: model.train_ds.cuts_path={targets / 'cuts.jsonl.gz'}" in out.splitlines()[-1]
    assert [cut.id for cut in cuts] == [cut.id for cut in CutSet.from_file(corpus)]
    assert cuts[0].load_audio().size


def test_other_settings_need_overwrite(corpus, keys, targets, tmp_path):
    same = {"cuts_path": str(corpus), "output_dir": str(tmp_path), **keys}
    call("mtbi_generate_targets", **same, plan={"tasks_per_cut": 1})
    with pytest.raises(RuntimeError, match="overwrite=true"):
        call("mtbi_generate_targets", **same)
    call("mtbi_generate_targets", **same, overwrite=True)
    assert content(tmp_path) == content(targets)


def test_a_relative_nemo_manifest_and_a_blend(corpus, keys, targets, tmp_path, monkeypatch):
    """Paths are found from any folder afterwards, and a blend is mixed alike in each run."""
    monkeypatch.chdir(corpus.parent)
    lines = [
        {"audio_filepath": f"audio/{cut.id}.flac", "duration": cut.duration, "text": cut.supervisions[0].text, "x": 1}
        for cut in CutSet.from_file(corpus)
    ]
    Path("all.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, part in (("a", lines[:10]), ("b", lines[10:])):
        Path(f"{name}.json").write_text("".join(json.dumps(line) + "\n" for line in part))
    blend = [{"type": "nemo", "manifest_filepath": f"{name}.json"} for name in "ab"]
    call("mtbi_generate_targets", **keys, manifest_filepath="all.json", output_dir=str(tmp_path / "all"))
    for run in range(2):
        call("mtbi_generate_targets", **keys, input_cfg=blend, output_dir=str(tmp_path / f"blend{run}"))
    monkeypatch.chdir(tmp_path)
    cuts = list(CutSet.from_file(tmp_path / "all" / "cuts.jsonl.gz"))
    expected = {cut.id: cut.behaviors for cut in CutSet.from_file(targets / "cuts.jsonl.gz")}
    assert {cut.id: cut.behaviors for cut in cuts} == expected
    assert cuts[0].load_audio().size and cuts[0].custom["x"] == 1
    assert content(tmp_path / "blend0") == content(tmp_path / "blend1")
    mixed = {cut.id: cut.behaviors for cut in CutSet.from_file(tmp_path / "blend0" / "cuts.jsonl.gz")}
    assert mixed == expected


def test_shar_shards_are_kept_and_read_beside_their_audio(corpus, keys, targets, tmp_path):
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

    (tmp_path / "shar").mkdir()
    CutSet.from_file(corpus).to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=7)
    call("mtbi_generate_targets", **keys, shar_path=str(tmp_path / "shar"), output_dir=str(tmp_path / "out"))
    source = {"input_cfg": str(tmp_path / "out" / "input_cfg.yaml"), "force_finite": True, "shard_seed": 0}
    cuts, _ = read_cutset_from_config(source)
    expected = {cut.id: cut.behaviors for cut in CutSet.from_file(targets / "cuts.jsonl.gz")}
    audio = {cut.id: cut.load_audio() for cut in CutSet.from_file(corpus)}
    found = list(cuts)
    assert {cut.id: cut.behaviors for cut in found} == expected
    assert all(np.allclose(cut.load_audio(), audio[cut.id], atol=1e-4) for cut in found)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cuts_path": None}, "exactly one source of .*cuts_path.*; set are: none"),
        ({"manifest_filepath": "m.json"}, "exactly one source of .*; set are: cuts_path, manifest_filepath"),
        ({"cuts_path": "no-such.jsonl.gz"}, "there is no 'no-such.jsonl.gz'"),
        ({"output_dir": "???"}, "output_dir is missing"),
        ({"plan": {"split": "some"}}, "plan.split is 'some'; it must be one of train, heldout, all"),
        ({"tasks": "no-such.yaml"}, "no-such.yaml"),
        ({"pretrained_llm": "no-such-llm"}, "no-such-llm does not exist"),
        ({"on_missing_text": "ignore"}, "on_missing_text is 'ignore'; it must be raise or skip"),
        ({"rank": 2, "world_size": 1}, "rank 2 is not below world_size 1"),
        ({"world_size": 2}, "rank and world_size belong together"),
    ],
)
def test_illegal_target_configurations(corpus, keys, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(
            "mtbi_generate_targets",
            **{**keys, "cuts_path": str(corpus), "output_dir": str(tmp_path / "out"), **changes},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plan": {"sed": 1}}, "unknown key plan.sed: did you mean 'seed'"),
        ({"plan": 3}, "plan must hold keys and values, got 3"),
        ({"zzz": 1}, "unknown key zzz: known keys: output_dir, pretrained_llm, chat"),
        (
            {"tarred_audio_filepaths": "x.tar", "manifest_filepath": "m.json"},
            "tarred_audio_filepaths is not supported",
        ),
        ({"shar_path": "x", "on_missing_text": "skip"}, "leave it at raise"),
    ],
)
def test_refused_keys_of_target_generation(changes, message):
    from nemo_mtbi.commands.targets import parse_generate_config

    source = {} if {"manifest_filepath", "shar_path"} & set(changes) else {"cuts_path": "x"}
    with pytest.raises(ValueError, match=message):
        parse_generate_config({"output_dir": "out", **source, **changes})


# ------------------------------------------------------------------------------------------------ transcription


@pytest.fixture(scope="module")
def model(llm_dir, tmp_path_factory):
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.testing import tiny_asr_nemo

    asr = tiny_asr_nemo(tmp_path_factory.mktemp("encoder") / "asr.nemo")
    section = {
        "pretrained_asr": str(asr),
        "pretrained_llm": str(llm_dir),
        "connector": {"hidden_size": 24},
        "generation": {"max_new_tokens": 6},
    }
    return MTBIModel(OmegaConf.create(section)).eval()


@pytest.fixture(scope="module")
def nemo_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.nemo"
    model.save_to(str(path))
    return path


@pytest.fixture
def recordings(tmp_path):
    """Three files; one is 8 kHz and stereo."""
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape, rate in (("a", 16000, 16000), ("b", (9000, 2), 8000), ("more/c", 20000, 16000)):
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.3, 0.3, shape), rate)
    return folder


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def expected(model, names, prompts):
    lines = [(str(name), prompt) for name in names for prompt in prompts]
    answers = model.generate(audio=[name for name, _ in lines], prompts=[prompt for _, prompt in lines])
    return [
        {"audio_filepath": name, "prompt": prompt, "pred_text": answer}
        for (name, prompt), answer in zip(lines, answers, strict=True)
    ]


def test_transcribe_from_the_command_line(nemo_file, model, recordings, tmp_path):
    names = [recordings / "a.wav", recordings / "b.wav"]
    arguments = [f"model_path={nemo_file}", f"audio=[{names[0]},{names[1]}]", "prompt='say it, all of it'", "cuda=-1"]
    done = subprocess.run(
        command("mtbi_transcribe", *arguments, "output_filename=new/out.jsonl"),
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "answers: new/out.jsonl"
    assert "2 answers about 2 audios" in done.stdout and "say it, all of it" in done.stdout
    assert read(tmp_path / "new" / "out.jsonl") == expected(model, names, ["say it, all of it"])


def test_transcribe_a_folder_with_a_file_of_prompts(nemo_file, model, recordings, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("say it\ncount the words\n")
    (recordings / "bad.wav").write_text("no audio")
    keys = {"model_path": str(nemo_file), "audio_dir": str(recordings), "on_bad_audio": "skip", "cuda": -1}
    call("mtbi_transcribe", **keys, prompts_file=str(tmp_path / "prompts.txt"))
    out, output = capsys.readouterr().out, tmp_path / "recordings_tiny.jsonl"
    assert f"answers: {output}" in out and "left out: 1 audios (1 unreadable)" in out
    names = [recordings / name for name in ("a.wav", "b.wav", "more/c.wav")]
    assert read(output) == expected(model, names, ["say it", "count the words"])

    # what is there already stays
    output.write_text("kept")
    call("mtbi_transcribe", **keys, prompt="say it", overwrite_transcripts=False)
    assert output.read_text() == "kept" and "there already" in capsys.readouterr().out


def test_transcribe_a_manifest(nemo_file, model, recordings, tmp_path):
    lines = [
        {"audio_filepath": "recordings/a.wav", "duration": 1.0, "text": "x", "prompt": "say it"},
        {"audio_filepath": str(recordings / "b.wav"), "speaker": 7},
    ]
    manifest = tmp_path / "test.json"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    call("mtbi_transcribe", model_path=str(nemo_file), dataset_manifest=str(manifest), prompt="", cuda=-1)
    first, second = read(tmp_path / "test_tiny.jsonl")
    names = [recordings / "a.wav", recordings / "b.wav"]
    answers = model.generate(audio=names, prompts=["say it", ""])
    assert first == {**lines[0], "pred_text": answers[0]}
    assert second == {**lines[1], "prompt": "", "pred_text": answers[1]}


def test_transcribe_spares_the_encoder_that_its_model_refers_to(nemo_file, model, recordings):
    encoder = Path(model.config.pretrained_asr)
    before, keys = encoder.read_bytes(), {"model_path": str(nemo_file), "audio_dir": str(recordings), "prompt": ""}
    with pytest.raises(ValueError, match="output_filename would replace .*an input .pretrained_asr of .*tiny.nemo"):
        call("mtbi_transcribe", **keys, output_filename=str(encoder), cuda=-1)
    assert encoder.read_bytes() == before


def test_transcribe_needs_one_source_and_a_model(nemo_file, recordings, tmp_path):
    with pytest.raises(ValueError, match="exactly one of audio, audio_dir, dataset_manifest; set are: none"):
        call("mtbi_transcribe", model_path=str(nemo_file), prompt="say it")
    audio = [str(recordings / "a.wav")]
    with pytest.raises(ValueError, match="model_path is missing"):
        call("mtbi_transcribe", audio=audio, prompt="say it")
    (tmp_path / "no.nemo").write_text("no model")
    with pytest.raises(ValueError, match=r"no\.nemo can't be restored"):
        call("mtbi_transcribe", audio=audio, prompt="say it", model_path=str(tmp_path / "no.nemo"), cuda=-1)
