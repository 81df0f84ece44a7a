# SPDX-License-Identifier: Apache-2.0
"""The gate before all data: hostile entries of every source are refused by name, bad ones are named or left out."""

import copy
import json
from pathlib import Path

import gate_sources as gate
import pytest

from nemo_mtbi.data.gate import open_manifest
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.evaluation.items import from_cuts, load_clip
from nemo_mtbi.io.sources import EVERYTHING, ForbiddenSourceError
from nemo_mtbi.prepare.export import export
from nemo_mtbi.prepare.recipes import cuts_of_manifests, open_cuts
from nemo_mtbi.targets.tasks import Task, TaskPool

make, read, written, conversation = gate.make, gate.read, gate.written, gate.conversation
in_layout, nemo_lines = gate.in_layout, gate.nemo_lines
PLAIN = gate.PLAIN
POOL = TaskPool("pool", (Task("repeat", "wer", False, ("say it",)),))


@pytest.fixture
def canary(corpus):
    return corpus.folder / "canary"


# What runs commands ------------------------------------------------------------


def hostile(cut, canary, kind="command"):
    command = f"touch {canary}; cat {cut.recording.sources[0].source}"
    bad = copy.deepcopy(cut.to_dict())
    bad["recording"]["sources"] = [
        {"type": kind, "channels": [0], "source": command if kind == "command" else f"pipe:{command}"}
    ]
    return bad


def as_cuts(corpus, cuts, canary):
    return {"cuts_path": written(corpus, [cuts[0].to_dict(), hostile(cuts[1], canary)])}


def as_piped_cuts(corpus, cuts, canary):
    return {"cuts_path": written(corpus, [cuts[0].to_dict(), hostile(cuts[1], canary, "url")])}


def as_mixed_cuts(corpus, cuts, canary):
    mixed = cuts[1].mix(cuts[2].with_id("noise"), snr=10).to_dict()
    mixed["tracks"][1]["cut"]["recording"] = hostile(cuts[2], canary)["recording"]
    return {"cuts_path": written(corpus, [cuts[0].to_dict(), {**mixed, "id": cuts[1].id}])}


def as_yaml(corpus, cuts, canary):
    return {"cuts_path": written(corpus, [], "cuts.yaml")} | _yaml(
        corpus, [cuts[0].to_dict(), hostile(cuts[1], canary)]
    )


def _yaml(corpus, lines):
    (corpus.folder / "cuts.yaml").write_text(json.dumps(lines))
    return {}


def as_nemo(corpus, cuts, canary, **extra):
    path = corpus.manifest(cuts, **extra)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines[1]["audio_filepath"] = f"pipe:touch {canary}; cat {lines[1]['audio_filepath']} # cut-001"
    return {"manifest_filepath": written(corpus, lines, "manifest.json")}


def as_nemo_with_rates(corpus, cuts, canary):
    return as_nemo(corpus, cuts, canary, sampling_rate=16000)


def as_address_of_nemo(corpus, cuts, canary):
    """NeMo makes a source of type url of it, which Lhotse opens as a pipe."""
    path = corpus.manifest(cuts, sampling_rate=16000)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines[1]["audio_filepath"] = f"pipe://cut-001/; touch {canary}"
    return {"manifest_filepath": written(corpus, lines, "manifest.json")}


def as_sphere_file(corpus, cuts, canary):
    path = corpus.manifest(cuts)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines[1]["audio_filepath"] = f"/cut-001;touch {canary};.sph"
    return {"manifest_filepath": written(corpus, lines, "manifest.json")}


def as_shar(corpus, cuts, canary):
    """A field whose lines hold whole recordings."""
    folder = corpus.folder / "shar"
    folder.mkdir()
    bare = [{**cut.to_dict(), "recording": hostile(cut, canary)["recording"]} for cut in cuts[:3]]
    written(corpus, bare, "shar/cuts.000000.jsonl.gz")
    return {"shar_path": str(folder)}


def as_conversation(corpus, cuts, canary):
    good = cuts[0].recording.sources[0].source
    lines = [conversation(0, good), conversation(1, f"/cut-001;touch {canary};.sph")]
    return in_layout(corpus, lines, "multimodal_conversation")


def as_share_gpt(corpus, cuts, canary):
    turns = [{"from": "human", "value": "<sound> say it"}, {"from": "gpt", "value": "red boat"}]
    lines = [{"id": "cut-001", "sound": f"pipe://host/; touch {canary}", "conversations": turns}]
    return in_layout(corpus, lines, "share_gpt", audio_placeholders="<sound>")


def as_lhotse_conversation(corpus, cuts, canary):
    entry = {"type": "lhotse_as_conversation", **as_cuts(corpus, cuts, canary), "token_equivalent_duration": 0.08}
    return {"input_cfg": [{**entry, "audio_locator_tag": "<audio>"}]}


def as_speech_to_speech(corpus, cuts, canary):
    """This reader of NeMo loads audio before it gives a cut."""
    line = cuts[1].to_dict()
    target = hostile(cuts[1], canary)["recording"]
    target["channel_ids"] = target["sources"][0]["channels"] = [0, 1]  # one of them is read, decoded
    line["custom"] |= {"target_audio": target}
    line["custom"] |= {"context_audio": cuts[1].recording.to_dict()}
    entry = {"type": "lhotse_magpietts_data_as_continuation", "cuts_path": written(corpus, [line])}
    return {"input_cfg": [entry]}


HOSTILE = [as_cuts, as_piped_cuts, as_mixed_cuts, as_yaml, as_nemo, as_nemo_with_rates, as_address_of_nemo]
HOSTILE += [as_sphere_file, as_shar, as_conversation, as_share_gpt, as_lhotse_conversation, as_speech_to_speech]


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("source", HOSTILE)
def test_no_source_runs_commands(corpus, chat, frames, canary, source, policy):
    """Under `skip`, too: a hostile entry is no bad one."""
    config = source(corpus, corpus.cuts(3), canary)
    with pytest.raises(ForbiddenSourceError, match=r"(cut-00\d|cuts.jsonl).*(allow_commands: true|rename)"):
        read(config, make(chat, frames, policy))
    assert not canary.exists()


@pytest.mark.parametrize("source", [as_cuts, as_piped_cuts, as_mixed_cuts])
def test_commands_run_where_the_user_allows_them(corpus, chat, frames, canary, source):
    config = source(corpus, corpus.cuts(3), canary)
    ids, _ = read({**config, "allow_commands": True}, make(chat, frames))
    assert set(ids) == {"cut-000", "cut-001"} and canary.exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("cuts_path", "pipe:cat cuts.jsonl"),
        ("manifest_filepath", ["pipe:cat a.json"]),
        ("tarred_audio_filepaths", "pipe:cat audio_{{0..3}}.tar"),
        ("shar_path", {"cuts": ["pipe:cat cuts"]}),
        ("noise_path", "pipe:cat noise.jsonl"),
        ("rir_path", "pipe:cat rir.jsonl"),
        ("input_cfg", "pipe:cat input.yaml"),
        ("input_cfg", [{"type": "nemo", "manifest_filepath": "pipe:cat a.json"}]),
        ("input_cfg", [{"type": "group", "input_cfg": [{"type": "lhotse", "cuts_path": "pipe:cat a"}]}]),
        ("input_cfg", [{"type": "nemo", "extra_fields": [{"type": "text_iter", "name": "q", "path": "pipe:cat a"}]}]),
    ],
)
def test_a_command_in_the_configuration_needs_permission(corpus, chat, frames, key, value):
    config = {"cuts_path": corpus.jsonl(corpus.cuts(1)), key: value}
    with pytest.raises(ForbiddenSourceError, match=f"{key}.* would run a command.*allow_commands: true"):
        read(config, make(chat, frames))


def test_sources_that_a_file_names_need_permission(corpus, chat, frames):
    path = corpus.folder / "input.yaml"
    path.write_text(json.dumps([{"type": "lhotse", "cuts_path": "pipe:cat a"}]))
    with pytest.raises(ForbiddenSourceError, match=r"input.yaml\)\[0\].cuts_path"):
        read({"input_cfg": str(path)}, make(chat, frames))


def test_addresses_need_permission(corpus, chat, frames):
    with pytest.raises(ForbiddenSourceError, match="cuts_path=s3://bucket/a.* allow_remote: true"):
        read({"cuts_path": "s3://bucket/a.jsonl"}, make(chat, frames))
    line = corpus.cut(0).to_dict()
    line["recording"]["sources"][0] |= {"type": "url", "source": "http://127.0.0.1:9/a.wav"}
    config = {"cuts_path": written(corpus, [line])}
    with pytest.raises(ForbiddenSourceError, match="cut-000 would be read from the network"):
        read(config, make(chat, frames))
    _, skipped = read({**config, "allow_remote": True}, make(chat, frames, "skip"), most=1)
    assert skipped == {"unreadable": 1}  # there is no such server


def test_noise_is_looked_at(corpus, chat, frames, canary):
    noise = written(corpus, [hostile(corpus.cut(7), canary)], "noise.jsonl")
    config = {"cuts_path": corpus.jsonl(corpus.cuts(2)), "noise_path": noise, "noise_mix_prob": 1.0}
    with pytest.raises(ForbiddenSourceError, match="cut .* would run a command"):
        read(config, make(chat, frames))
    assert not canary.exists()


def test_worker_processes_refuse_commands(corpus, chat, frames, canary):
    config = {**as_cuts(corpus, corpus.cuts(2), canary), "force_iterable_dataset": True, "num_workers": 1}
    with pytest.raises(ForbiddenSourceError, match="cut-001 would run a command"):
        read(config, make(chat, frames))
    assert not canary.exists()


def test_validation_refuses_commands(corpus, chat, frames, canary):
    config = {**PLAIN, "batch_size": 1, **as_cuts(corpus, corpus.cuts(2), canary)}
    with pytest.raises(ForbiddenSourceError, match="cut-001"):
        list(build_dataloader(config, make(chat, frames), train=False))
    assert not canary.exists()


def test_evaluation_export_and_alignment_refuse_commands(corpus, frames, canary):
    path = as_cuts(corpus, corpus.cuts(2), canary)["cuts_path"]
    for refuse in (
        lambda: from_cuts("set", path, POOL),
        lambda: from_cuts("set", path, POOL, leave_out=True),
        lambda: open_cuts(path),
        lambda: export(open_manifest(path, EVERYTHING), corpus.folder / "out", "shar", 2, "skip"),
    ):
        with pytest.raises(ForbiddenSourceError, match="cut-001 would run a command"):
            refuse()
    assert not canary.exists()
    clip = from_cuts("set", path, POOL, policy=EVERYTHING).clips[1]
    assert len(load_clip(clip, frames)) and canary.exists()


def test_arrays_that_an_export_would_load_are_refused(corpus):
    cut = corpus.cut(0).to_dict()
    cut["custom"]["vector"] = {
        "storage_type": "numpy_files",
        "storage_path": "pipe:x",
        "storage_key": "",
        "shape": [1],
    }
    with pytest.raises(ForbiddenSourceError, match="cut-000 would run a command"):
        export(open_manifest(written(corpus, [cut]), EVERYTHING), corpus.folder / "out", "shar", 2)


def test_manifests_of_a_corpus_refuse_commands(corpus, canary):
    path = as_address_of_nemo(corpus, corpus.cuts(3), canary)["manifest_filepath"]
    with pytest.raises(ForbiddenSourceError, match="cut-001.*would run a command"):
        cuts_of_manifests([path])


@pytest.mark.parametrize("source", [as_cuts, as_nemo, as_address_of_nemo, as_sphere_file, as_shar])
def test_the_source_of_targets_runs_no_commands(corpus, canary, source):
    from nemo_mtbi.commands.targets import GenerateTargetsConfig, open_source

    config = source(corpus, corpus.cuts(3), canary)
    with pytest.raises(ForbiddenSourceError, match=r"cut-00\d.*(allow_commands: true|rename)"):
        list(open_source(GenerateTargetsConfig(output_dir="out", **config)))
    assert not canary.exists()
