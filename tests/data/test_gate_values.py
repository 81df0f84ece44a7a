# SPDX-License-Identifier: Apache-2.0
"""Entries whose values are not what they should be: named in an error, or left out and counted."""

import gzip
import json
import math
import tarfile
from collections import Counter
from pathlib import Path

import gate_sources as gate
import loader_sources as sources
import pytest
import target_fakes as fakes
from lhotse import CutSet
from lhotse.utils import fastcopy

from nemo_mtbi.data.entries import BadEntryError
from nemo_mtbi.data.gate import open_manifest
from nemo_mtbi.evaluation.items import from_cuts
from nemo_mtbi.io.sources import FILES
from nemo_mtbi.targets.tasks import Task, TaskPool

make, read, written, conversation = gate.make, gate.read, gate.written, gate.conversation
in_layout, nemo_lines = gate.in_layout, gate.nemo_lines


POOL = TaskPool("pool", (Task("repeat", "wer", False, ("say it",)),))

# Values that are not what they should be ------------------------------------------------------------

NEMO = [
    ({"text": 5}, "wrong_type", "text must be a string, not 5"),
    ({"text": ["red"]}, "wrong_type", "text must be a string"),
    ({"text": "\ud800"}, "bad_text", "surrogate"),
    ({"lang": 5}, "wrong_type", "lang must be a string"),
    ({"duration": "x"}, "wrong_type", "duration must be seconds, not 'x'"),
    ({"duration": None}, "wrong_type", "duration must be seconds"),
    ({"duration": True}, "wrong_type", "duration must be seconds"),
    ({"duration": [1.0]}, "wrong_type", "duration must be seconds"),
    ({"duration": math.nan}, "bad_times", "duration is nan seconds"),
    ({"duration": math.inf}, "bad_times", "duration is inf seconds"),
    ({"duration": 1e300}, "bad_times", "duration is 1e"),
    ({"duration": -1.0}, "bad_times", "duration is -1.0"),
    ({"offset": "0"}, "wrong_type", "offset must be seconds"),
    ({"offset": math.nan}, "bad_times", "offset is nan"),
    ({"offset": -2.0}, "bad_times", "offset is -2.0"),
    ({"offset": {}}, "wrong_type", "offset must be seconds"),
    ({"sampling_rate": "16000"}, "wrong_type", "sampling_rate must be a whole number"),
    ({"sampling_rate": math.nan}, "wrong_type", "sampling_rate"),
    ({"sampling_rate": 0}, "bad_times", "sampling_rate is 0"),
    ({"sampling_rate": [16000]}, "wrong_type", "sampling_rate"),
    ({"audio_filepath": 5}, "wrong_type", "audio_filepath must be a string"),
    ({"audio_filepath": None}, "wrong_type", "audio_filepath must be a string"),
    ({"audio_filepath": "a" * 300 + ".wav"}, "bad_name", "304 bytes, which is too long"),
    ({"audio_filepath": "a/" * 3000}, "bad_name", "too long"),
    ({"audio_filepath": "a\0.wav"}, "bad_name", "not the name of a file"),
    ({"alignment": [1]}, "wrong_type", "alignment must be a mapping"),
    ({"alignment": {"word": [["red", "0", 1.0]]}}, "wrong_type", "a start of alignment.word"),
    ({"behaviors": [5]}, "wrong_type", "an entry of behaviors"),
    ({"behaviors_from": "me"}, "wrong_type", "behaviors_from must be a mapping"),
]


@pytest.mark.parametrize("change, reason, message", NEMO)
def test_bad_values_of_a_nemo_manifest(corpus, chat, frames, change, reason, message):
    config = nemo_lines(corpus, change)
    with pytest.raises(BadEntryError, match=f"line 2 of .*{message}.*set on_bad_audio: skip") as caught:
        read(config, make(chat, frames), most=1)
    assert "cut-001" in str(caught.value) or "audio_filepath" in change
    ids, skipped = read(config, make(chat, frames, "skip"), most=1)
    assert ids == ["cut-000", "cut-002"] and skipped == {reason: 1}


@pytest.mark.parametrize("line, reason", [({"text": "x"}, "missing_key"), (5, "wrong_type"), (None, "wrong_type")])
def test_lines_that_are_no_entries(corpus, chat, frames, line, reason):
    lines = [json.loads(text) for text in Path(corpus.manifest(corpus.cuts(3))).read_text().splitlines()]
    config = {"manifest_filepath": written(corpus, [lines[0], line, lines[2]], "manifest.json")}
    with pytest.raises(BadEntryError, match="line 2 of"):
        read(config, make(chat, frames))
    assert read(config, make(chat, frames, "skip")) == (["cut-000", "cut-002"], {reason: 1})


def test_missing_audio_of_a_manifest_without_rates_is_left_out(corpus, chat, frames):
    config = {"manifest_filepath": corpus.manifest(corpus.cuts(3))}
    (corpus.folder / "cut-001.wav").unlink()
    assert read(config, make(chat, frames, "skip")) == (["cut-000", "cut-002"], {"unreadable": 1})


@pytest.mark.parametrize("change", [{"text": 5}, {"duration": "x"}, {"offset": math.nan}])
def test_bad_values_of_a_tarred_manifest(corpus, chat, frames, change):
    config = sources.tarred(corpus, corpus.cuts(3))
    lines = [json.loads(line) for line in Path(config["manifest_filepath"]).read_text().splitlines()]
    lines[1] |= change
    written(corpus, lines, "manifest_0.json")
    ids, skipped = read({**config, "batch_size": 2}, make(chat, frames, "skip"), most=1)
    assert ids == ["cut-000.wav", "cut-002.wav"] or {"cut-000", "cut-002"} == {name.split(".")[0] for name in ids}
    assert sum(skipped.values()) == 1
    with pytest.raises(BadEntryError, match="line 2 of .*cut-001"):
        read(config, make(chat, frames), most=1)


CUTS = [
    (lambda c: c.update(duration="x"), "wrong_type"),
    (lambda c: c.update(duration=math.nan), "bad_times"),
    (lambda c: c.update(start=-math.inf), "bad_times"),
    (lambda c: c.update(start=None), "wrong_type"),
    (lambda c: c.update(channel="0"), "wrong_type"),
    (lambda c: c.update(recording=None), "wrong_type"),
    (lambda c: c.update(recording=5), "wrong_type"),
    (lambda c: c.update(supervisions=None), "wrong_type"),
    (lambda c: c.update(custom=5), "wrong_type"),
    (lambda c: c["supervisions"][0].update(text=5), "wrong_type"),
    (lambda c: c["supervisions"][0].update(text="\udfff"), "bad_text"),
    (lambda c: c["supervisions"][0].update(start="0"), "wrong_type"),
    (lambda c: c["supervisions"][0].update(custom={"cer": "low"}), "wrong_type"),
    (lambda c: c["supervisions"][0].update(alignment={"word": [[1, 2]]}), "wrong_type"),
    (lambda c: c["recording"].update(duration=math.inf), "bad_times"),
    (lambda c: c["recording"].update(sampling_rate="16000"), "wrong_type"),
    (lambda c: c["recording"].update(num_samples=1.5), "wrong_type"),
    (lambda c: c["recording"].update(sources=[{"type": "file", "channels": None, "source": "a"}]), "wrong_type"),
    (lambda c: c["recording"]["sources"][0].update(source="a" * 5000), "bad_name"),
    (lambda c: c["recording"]["sources"][0].update(source=5), "wrong_type"),
]


@pytest.mark.parametrize("change, reason", CUTS)
@pytest.mark.parametrize("mixed", [False, True])
def test_bad_values_of_cuts(corpus, chat, frames, change, reason, mixed):
    cuts = corpus.cuts(3)
    bad = cuts[1].to_dict()
    change(bad)
    if mixed:
        bad = {"type": "MixedCut", "id": "cut-001", "tracks": [{"cut": bad, "type": bad.pop("type"), "offset": 0.0}]}
    config = {"cuts_path": written(corpus, [cuts[0].to_dict(), bad, cuts[2].to_dict()])}
    with pytest.raises(BadEntryError, match=r"line 2 of .*\(cut-001\): "):
        read(config, make(chat, frames), most=1)
    assert read(config, make(chat, frames, "skip"), most=1) == (["cut-000", "cut-002"], {reason: 1})
    found = from_cuts("set", config["cuts_path"], POOL, leave_out=True)
    assert [clip.id for clip in found.clips] == ["cut-000", "cut-002"]
    assert found.left_out == {f"of entries that can't be used ({reason})": 1}
    with pytest.raises(BadEntryError, match=r"\(cut-001\).*set on_bad_audio: abstain"):
        from_cuts("set", config["cuts_path"], POOL)


def test_bad_values_of_a_shar_do_not_shift_its_audio(corpus, chat, frames):
    config = sources.shar(corpus, corpus.cuts(3))
    path = corpus.folder / "shar" / "cuts.000000.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    lines[1]["supervisions"][0]["text"] = 5
    written(corpus, lines, "shar/cuts.000000.jsonl.gz")
    ids, skipped = read({**config, "batch_size": 2}, make(chat, frames, "skip"), most=1)
    assert ids == ["cut-000", "cut-002"] and skipped["wrong_type"] >= 1


def test_a_cut_without_recording_is_counted(corpus, chat, frames):
    cuts = [*corpus.cuts(2), fastcopy(corpus.cut(5), recording=None)]
    config = {"cuts_path": corpus.jsonl(cuts)}
    assert read(config, make(chat, frames, "skip")) == (["cut-000", "cut-001"], {"no_audio": 1})
    with pytest.raises(ValueError, match="cut-005 has no recording"):
        read(config, make(chat, frames))


# Conversations ------------------------------------------------------------


@pytest.fixture
def several(chat):
    return fastcopy(chat, more=("<user>", "{audio}", "|", "{prompt}"))


CONVERSATIONS = [
    (lambda c, folder: c["conversations"][1].update(value=str(folder / "nowhere.wav")), "unreadable"),
    (lambda c, folder: c["conversations"][1].update(value=str(folder / "bad.wav")), "unreadable"),
    (lambda c, folder: c["conversations"][1].update(offset=100.0), "bad_times"),
    (lambda c, folder: c["conversations"][1].update(value="a" * 999), "bad_name"),
    (lambda c, folder: c["conversations"][1].update(value=5), "wrong_type"),
    (lambda c, folder: c["conversations"][1].update(duration="x"), "wrong_type"),
    (lambda c, folder: c["conversations"][1].update(duration=math.nan), "bad_times"),
    (lambda c, folder: c["conversations"][1].update(offset=None), "wrong_type"),
    (lambda c, folder: c["conversations"][0].update(value=["say it"]), "wrong_type"),
    (lambda c, folder: c["conversations"][2].update(value=None), "wrong_type"),
    (lambda c, folder: c["conversations"][2].update({"from": 5}), "wrong_type"),
    (lambda c, folder: c.update(conversations={}), "wrong_type"),
    (lambda c, folder: c.pop("id"), "missing_key"),
]


@pytest.mark.parametrize("change, reason", CONVERSATIONS)
def test_bad_conversations(corpus, several, frames, change, reason):
    good = [cut.recording.sources[0].source for cut in corpus.cuts(3)]
    (corpus.folder / "bad.wav").write_text("no audio")
    lines = [conversation(number, audio) for number, audio in enumerate(good)]
    change(lines[1], corpus.folder)
    config = in_layout(corpus, lines, "multimodal_conversation")
    ids, skipped = read(config, make(several, frames, "skip"), most=1)
    assert ids == ["c0", "c2"] and skipped == {reason: 1}
    with pytest.raises(ValueError, match="(line 2 of|cut c1).*set on_bad_audio: skip to leave it out"):
        read(config, make(several, frames))


def test_bad_conversations_of_share_gpt(corpus, several, frames):
    good = [cut.recording.sources[0].source for cut in corpus.cuts(3)]
    turns = [{"from": "human", "value": "<sound> say it"}, {"from": "gpt", "value": "red boat"}]
    lines = [{"id": f"c{number}", "sound": audio, "conversations": turns} for number, audio in enumerate(good)]
    lines[1]["sound"] = str(corpus.folder / "nowhere.wav")
    config = in_layout(corpus, lines, "share_gpt", audio_placeholders="<sound>")
    assert read(config, make(several, frames, "skip"), most=1) == (["c0", "c2"], {"unreadable": 1})


def test_tarred_conversations_stay_beside_their_audio(corpus, several, frames):
    good = [cut.recording.sources[0].source for cut in corpus.cuts(3)]
    (corpus.folder / "bad.wav").write_text("no audio")
    with tarfile.open(corpus.folder / "audio.tar", "w") as tar:
        for audio in (*good, corpus.folder / "bad.wav"):
            tar.add(audio, Path(audio).name)
    lines = [conversation(number, Path(audio).name) for number, audio in enumerate(good)]
    lines[1]["conversations"][2]["value"] = 5
    lines.append(conversation(3, "bad.wav"))
    tar = {"tarred_audio_filepaths": str(corpus.folder / "audio.tar")}
    config = in_layout(corpus, lines, "multimodal_conversation", **tar)
    assert read(config, make(several, frames, "skip"), most=1) == (
        ["c0", "c2"],
        {"wrong_type": 1, "unreadable": 1},
    )


# Targets ------------------------------------------------------------


def test_targets_leave_out_entries_of_a_wrong_type_and_count_them(corpus, tmp_path):
    cuts = list(fakes.make_cuts(6))
    cuts[1].supervisions[0].text, cuts[2].duration, cuts[3].supervisions[0].text = 5, math.nan, None
    with pytest.raises(ValueError, match="cut c1: text must be a string, not 5.*set on_missing_text=skip"):
        fakes.generate(tmp_path / "raise", cuts=CutSet.from_cuts(cuts))
    counts = Counter()
    paths = fakes.generate(tmp_path / "skip", cuts=CutSet.from_cuts(cuts), on_missing_text="skip", counts=counts)
    assert [cut.id for path in paths for cut in CutSet.from_file(path)] == ["c0", "c4", "c5"]
    assert counts["skipped_bad_wrong_type"] == counts["skipped_bad_bad_times"] == counts["skipped_no_text"] == 1


def test_the_source_of_targets_leaves_out_bad_entries(corpus):
    from nemo_mtbi.commands.targets import GenerateTargetsConfig, open_source

    config = nemo_lines(corpus, {"text": 5})
    with pytest.raises(BadEntryError, match="line 2 of .*cut-001.*set on_missing_text=skip"):
        list(open_source(GenerateTargetsConfig(output_dir="out", **config)))
    found = open_source(GenerateTargetsConfig(output_dir="out", on_missing_text="skip", **config))
    assert [cut.id for cut in found] == ["cut-000", "cut-002"] and found.left_out == {"wrong_type": 1}


# The readers as they were ------------------------------------------------------------


def test_a_byte_order_mark_before_a_manifest(corpus, chat, frames):
    path = Path(corpus.manifest(corpus.cuts(2)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read({"manifest_filepath": str(path)}, make(chat, frames)) == (["cut-000", "cut-001"], {})


def test_what_is_left_out_is_counted_in_each_iteration(corpus):
    lines = [cut.to_dict() for cut in corpus.cuts(3)]
    lines[0]["start"] = "0"
    cuts = open_manifest(written(corpus, lines), FILES, skip=True)
    for _ in range(2):
        assert [cut.id for cut in cuts] == ["cut-001", "cut-002"] and cuts.left_out == {"wrong_type": 1}


def test_a_manifest_without_usable_cuts_is_refused(corpus):
    with pytest.raises(ValueError, match="holds no cuts: it is empty"):
        open_manifest(written(corpus, []), FILES)
    (line,) = (cut.to_dict() for cut in corpus.cuts(1))
    with pytest.raises(ValueError, match="holds no usable cuts: 1 left out as wrong_type"):
        open_manifest(written(corpus, [{**line, "start": "0"}]), FILES, skip=True)
