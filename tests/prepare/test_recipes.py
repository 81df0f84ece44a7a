# SPDX-License-Identifier: Apache-2.0
"""A miniature of LibriSpeech, and NeMo manifests, as cuts."""

import json

import numpy as np
import pytest
import soundfile

from nemo_mtbi.data.cut_files import write_cuts
from nemo_mtbi.prepare.recipes import cuts_of_manifests, cuts_of_recipe, open_cuts, recipe_names
from nemo_mtbi.targets.store import with_behaviors

UTTERANCES = {"84-121-0001": "GO ON", "84-121-0000": "STOP NOW PLEASE"}


def librispeech(folder, part="dev-clean", alignments=False):
    """The directory layout of LibriSpeech."""
    chapter = folder / part / "84" / "121"
    chapter.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in UTTERANCES:
        soundfile.write(chapter / f"{name}.flac", 0.1 * rng.uniform(-1, 1, 24000), 16000)
    (chapter / "84-121.trans.txt").write_text("".join(f"{name} {text}\n" for name, text in UTTERANCES.items()))
    if alignments:
        lines = []
        for name, text in UTTERANCES.items():
            words = text.split()
            edges = [0.1 + 0.3 * i for i in range(len(words) + 1)]
            symbols = ",".join(["", *words, ""])
            times = ",".join(f"{edge:.2f}" for edge in [*edges, 1.5])
            lines.append(f'{name} "{symbols}" "{times}"\n')
        (chapter / "84-121.alignment.txt").write_text("".join(lines))
    return folder


def test_the_layout_of_librispeech(tmp_path):
    (part, cuts), *rest = cuts_of_recipe("librispeech", librispeech(tmp_path, alignments=True)).items()
    cuts = list(cuts)
    assert not rest and part == "dev-clean"
    assert [cut.id for cut in cuts] == sorted(UTTERANCES)
    assert [cut.supervisions[0].text for cut in cuts] == [UTTERANCES[cut.id] for cut in cuts]
    words = [item for item in cuts[0].supervisions[0].alignment["word"] if item.symbol]
    assert [(item.symbol, item.start) for item in words] == [("STOP", 0.1), ("NOW", 0.4), ("PLEASE", 0.7)]
    assert cuts[0].load_audio().shape == (1, 24000)


def test_options_reach_the_recipe(tmp_path):
    (cuts,) = cuts_of_recipe("librispeech", librispeech(tmp_path), {"normalize_text": "lower"}).values()
    assert {cut.supervisions[0].text for cut in cuts} == {"go on", "stop now please"}


def test_a_recipe_without_lhotse(tmp_path):
    assert "librispeech" in recipe_names() and "gigaspeech" in recipe_names()
    with pytest.raises(ValueError, match="no recipe 'librispeach'; it has .*librispeech"):
        cuts_of_recipe("librispeach", tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        cuts_of_recipe("librispeech", tmp_path / "missing")
    with pytest.raises(ValueError, match="recipe librispeech refuses"):
        cuts_of_recipe("librispeech", tmp_path, {"colour": "blue"})
    with pytest.raises(ValueError, match="Could not find any of librispeech"):
        cuts_of_recipe("librispeech", tmp_path)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    lines = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "a.wav", np.zeros(16000), 16000)
        lines.append({"audio_filepath": f"{folder}/a.wav", "duration": 1.0, "text": folder, "sampling_rate": 16000})
    (tmp_path / "m.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [cut.id for cut in cuts_of_manifests([tmp_path / "m.json"])] == ["a", "two-a"]
    with pytest.raises(ValueError, match="is in the manifests twice"):
        cuts_of_manifests([tmp_path / "m.json"] * 2)


def test_cuts_are_opened_and_counted(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a manifest"):
        open_cuts(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no cuts"):
        open_cuts(tmp_path / "empty.jsonl")


def test_manifests_of_nemo(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    lines = [
        {"audio_filepath": "a.wav", "duration": 1.0, "text": "go on"},
        {"audio_filepath": "a.wav", "duration": 0.5, "offset": 0.25, "text": "stop"},
    ]
    (tmp_path / "m.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = cuts_of_manifests([tmp_path / "m.json"])
    assert (first.supervisions[0].text, first.duration) == ("go on", 1.0)
    assert (second.start, second.duration) == (0.25, 0.5)
    assert [cut.id for cut in (first, second)] == ["a", "a_0.250"] == [c.supervisions[0].id for c in (first, second)]
    assert first.recording.sources[0].source == str(tmp_path / "a.wav")
    (tmp_path / "m.json").write_text("no json")
    with pytest.raises(ValueError, match="m.json is not JSON"):
        cuts_of_manifests([tmp_path / "m.json"])
    (tmp_path / "m.json").write_text(json.dumps({**lines[0], "audio_filepath": "missing.wav"}))
    with pytest.raises(ValueError, match="the data source cannot be read at line 1 of .*m.json .missing.wav") as error:
        cuts_of_manifests([tmp_path / "m.json"])
    assert "\n" not in str(error.value)


def test_what_an_entry_says_about_its_audio_stays(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    about = {"lang": "de", "speaker": 17, "gender": "F", "source": "radio", "scores": {"mos": 3.5}, "speaker_id": "x"}
    entry = {"audio_filepath": "a.wav", "duration": 1.0, "text": "où\u2028ça", "answer": "ja", **about}
    content = json.dumps(entry, ensure_ascii=False).encode()
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n")
    (cut,) = cuts_of_manifests([tmp_path / "m.json"])
    (said,) = cut.supervisions
    assert (said.text, said.language, said.speaker, said.gender) == ("où\u2028ça", "de", "17", "F")
    assert cut.custom == {"source": "radio", "scores": {"mos": 3.5}, "speaker_id": "x", "answer": "ja"}
    write_cuts(tmp_path / "cuts.jsonl.gz", [cut])
    (again,), total = open_cuts(tmp_path / "cuts.jsonl.gz")
    assert again == cut and total == 1
    (other,) = cuts_of_manifests([tmp_path / "m.json"], text_field="answer", lang_field="source")
    assert (other.supervisions[0].text, other.supervisions[0].language) == ("ja", "radio")
    assert other.custom["text"] == "où\u2028ça" and other.custom["lang"] == "de"


@pytest.mark.parametrize("rate", [{}, {"sampling_rate": 16000}])
def test_stereo_files_keep_their_channels_and_take_targets(tmp_path, rate):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (16000, 2))
    soundfile.write(tmp_path / "a.wav", sound, 16000)
    entries = [
        {"audio_filepath": "a.wav", "duration": 0.5, "offset": start, "text": "a", **rate} for start in (0, 0.5)
    ]
    (tmp_path / "m.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for start, cut in zip((0, 8000), cuts_of_manifests([tmp_path / "m.json"]), strict=True):
        found = with_behaviors(cut, [{"task": "say"}], {"llm": "x"})
        assert np.abs(found.load_audio() - sound[start : start + 8000].T).max() < 1e-3
        assert found.custom["behaviors"] == [{"task": "say"}]


@pytest.mark.parametrize("channels", [1, 2])
def test_pieces_with_a_rate_are_as_long_as_their_entries_say(tmp_path, channels):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (64000, channels))
    soundfile.write(tmp_path / "a-000000-000100.wav", sound, 16000)
    entry = {"audio_filepath": "a-000000-000100.wav", "text": "a", "sampling_rate": 16000}
    pieces = [(0, 1.0), (0.5, 0.5), (1.0, 2.0), (3.0, 0.25), (3.5, 0.55)]  # NeMo alone: 1, 0, 1, -2 and -2 seconds
    lines = [json.dumps({**entry, "offset": start, "duration": seconds}) for start, seconds in pieces]
    (tmp_path / "m.json").write_text("\n".join(lines))
    for (start, seconds), cut in zip(pieces, cuts_of_manifests([tmp_path / "m.json"]), strict=True):
        seconds = min(seconds, 4.0 - start)  # an entry may be a little longer than its file
        assert (cut.start, cut.duration) == (start, seconds)
        assert cut.supervisions[0].duration == pytest.approx(seconds, abs=0.1)
        expected = sound[int(start * 16000) : int((start + seconds) * 16000)].T
        assert np.abs(cut.load_audio() - expected).max() < 1e-3 and cut.recording.duration == 4.0
    for rate in (16000, None):
        (tmp_path / "m.json").write_text(json.dumps({**entry, "offset": 3, "duration": 2, "sampling_rate": rate}))
        with pytest.raises(ValueError, match="ends 1.00 s after the offset 3.* promises 2.00 s: correct offset"):
            cuts_of_manifests([tmp_path / "m.json"])
