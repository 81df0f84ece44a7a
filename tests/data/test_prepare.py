# SPDX-License-Identifier: Apache-2.0
"""A miniature of LibriSpeech, and NeMo manifests, as cuts."""

import json

import numpy as np
import pytest
import soundfile

from nemo_mtbi.data.prepare import cuts_of_manifests, cuts_of_recipe, open_cuts, recipe_names

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
    with pytest.raises(ValueError, match="is no folder"):
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
    with pytest.raises(ValueError, match="is not a file"):
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
    with pytest.raises(ValueError, match="line 1 of .*m.json is not JSON"):
        cuts_of_manifests([tmp_path / "m.json"])
