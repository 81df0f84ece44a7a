# SPDX-License-Identifier: Apache-2.0
"""A corpus spoken by espeak-ng, whose word times are known: boundaries, what is left out, parts, resuming."""

from collections import Counter

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MultiCut, Recording
from lhotse.utils import fastcopy

from nemo_mtbi.data.behaviors import word_times
from nemo_mtbi.demo.corpora.corpus import load_corpus
from nemo_mtbi.demo.corpora.synthetic import build_synthetic
from nemo_mtbi.prepare.alignment import corpus as module
from nemo_mtbi.prepare.alignment.corpus import AlignConfig, AlignmentReport, CorpusAligner, align_corpus
from nemo_mtbi.prepare.alignment.ctc import CTCModel
from nemo_mtbi.targets.store import join_shards

CONFIG = AlignConfig(batch_seconds=60.0, shard_size=16)


@pytest.fixture(scope="module")
def ctc():
    return CTCModel.load("demo")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Sentences and voices on which the encoder was not trained, in noise and reverberation."""
    folder = build_synthetic(
        tmp_path_factory.mktemp("spoken"), num_utterances=48, seed=5, split="test", num_workers=1, progress=False
    )
    return list(load_corpus(folder))


@pytest.fixture(scope="module")
def aligned(spoken, ctc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    report = align_corpus(CutSet.from_cuts(spoken), folder, ctc, CONFIG, source="test")
    return report, folder, {cut.id: cut for cut in CutSet.from_file(join_shards(folder))}


@pytest.fixture(scope="module")
def aligner(spoken, ctc, aligned):
    found = CorpusAligner(ctc, CONFIG)
    found.sounds = module.SoundModel.load(aligned[1] / module.SOUNDS_FILE)
    return found


def with_text(cut, text):
    return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], text=text, alignment=None)])


def test_boundaries_are_those_of_the_synthesizer(aligned, spoken):
    report, _, cuts = aligned
    said = report.as_dict()["against_the_former"]
    assert said["words"] > 300 and said["median_boundary_ms"] <= 40
    own = [
        abs(new.start - old.start)
        for cut in spoken
        for new, old in zip(
            (cuts[cut.id].supervisions[0].alignment or {}).get("word", ()),
            cut.supervisions[0].alignment["word"],
            strict=False,
        )
    ]
    assert said["median_start_ms"] == pytest.approx(1000 * np.median(own), abs=1)


def test_almost_all_is_aligned_and_all_is_counted(aligned, spoken):
    report, _, cuts = aligned
    counts = report.counts
    assert list(cuts) == [cut.id for cut in spoken] and counts["cuts"] == 48
    assert sum(counts[key] for key in ("aligned", "low_score", "too_short")) == 48 and counts["aligned"] >= 45
    with_times = [cut for cut in cuts.values() if word_times(cut)]
    assert len(with_times) == counts["aligned"]
    assert sum(len(word_times(cut)) for cut in with_times) == counts["words"]


def test_another_transcript_is_noticed(aligner, spoken):
    """The sentence of the next utterance: not one of them keeps word times that mean nothing."""
    texts = [cut.supervisions[0].text for cut in spoken[:16]]
    wrong = [with_text(cut, text) for cut, text in zip(spoken[:16], [*texts[1:], texts[0]], strict=True)]
    found, said = aligner.shard(wrong)
    assert said["counts"].get("aligned", 0) == 0
    assert not any(cut.supervisions[0].alignment for cut in found)


def test_what_cannot_be_aligned_is_counted_by_reason(aligner, spoken):
    cut = spoken[0]
    texts = ["", " – ", "12 apples", "日本", " ".join(["elephant"] * 60), cut.supervisions[0].text]
    found, said = aligner.shard([with_text(cut, text).with_id(f"c{i}") for i, text in enumerate(texts)])
    assert said["counts"] == Counter(
        cuts=6, no_text=2, unknown_word=2, too_short=1, aligned=1, words=len(cut.supervisions[0].text.split())
    )
    assert [bool(cut.supervisions[0].alignment) for cut in found] == [False] * 5 + [True]


def test_case_punctuation_and_dashes_stay_in_the_transcript(aligner, spoken):
    cut = spoken[1]
    plain = cut.supervisions[0].text.split()
    written = with_text(cut, " ".join([plain[0].title(), "–", *plain[1:-1], plain[-1] + "."]))
    ((found,), _), ((bare,), _) = aligner.shard([written]), aligner.shard([with_text(cut, " ".join(plain))])
    words, before = found.supervisions[0].alignment["word"], bare.supervisions[0].alignment["word"]
    assert [word.symbol for word in words] == written.supervisions[0].text.split()
    assert [(w.start, w.duration) for w in words if w.symbol != "–"] == [(w.start, w.duration) for w in before]
    assert (words[1].start, words[1].duration, words[1].score) == (before[0].end, 0.0, 1.0)
    assert len(word_times(found)) == len(words)


def test_times_are_those_of_the_recording(aligner, spoken, tmp_path):
    """Two utterances in one recording, the second one a cut of its own and a supervision of the whole."""
    first, second = spoken[2], spoken[3]
    joined = first.append(second).save_audio(tmp_path / "joined.flac")
    offset = first.duration
    part = with_text(second, second.supervisions[0].text)
    recording = joined.recording
    cut = fastcopy(part, id="part", start=offset, recording=recording)
    whole = fastcopy(
        joined.drop_supervisions(),
        id="whole",
        supervisions=[
            fastcopy(with_text(first, first.supervisions[0].text).supervisions[0], id="a", recording_id=recording.id),
            fastcopy(part.supervisions[0], id="b", start=offset, recording_id=recording.id),
        ],
    )
    (alone, of_cut, of_whole), said = aligner.shard([part.with_id("alone"), cut, whole])
    assert said["counts"]["aligned"] == 4
    plain = [item.start for item in alone.supervisions[0].alignment["word"]]
    for moved in (of_cut.supervisions[0], of_whole.supervisions[1]):
        assert [item.start - offset for item in moved.alignment["word"]] == pytest.approx(plain, abs=0.02)
    for cut in (alone, of_cut):
        assert word_times(cut)[0].start_s == pytest.approx(plain[0], abs=0.02)
    assert len(word_times(of_whole)) == len(of_whole.supervisions[0].text.split()) + len(plain)


def test_stereo_is_aligned_as_its_average(aligner, spoken, tmp_path):
    mono = spoken[4]
    samples = mono.load_audio()[0]
    soundfile.write(tmp_path / "stereo.wav", np.stack([1.5 * samples, 0.5 * samples], 1), 16000, subtype="FLOAT")
    both = Recording.from_file(tmp_path / "stereo.wav").to_cut()
    both = fastcopy(both, supervisions=[fastcopy(mono.supervisions[0], channel=[0, 1], alignment=None)])
    assert isinstance(both, MultiCut)
    (one, other), said = aligner.shard([mono, both])
    assert said["counts"]["aligned"] == 2
    assert one.supervisions[0].alignment["word"] == other.supervisions[0].alignment["word"]


def test_bad_audio_stops_or_is_counted(aligner, ctc, spoken, tmp_path):
    broken = tmp_path / "broken.flac"
    broken.write_bytes(b"no audio")
    recording = fastcopy(spoken[0].recording, sources=[fastcopy(spoken[0].recording.sources[0], source=str(broken))])
    cut = fastcopy(spoken[0], recording=recording)
    with pytest.raises(ValueError, match="on_bad_audio=skip"):
        aligner.shard([cut])
    lenient = CorpusAligner(ctc, AlignConfig(on_bad_audio="skip"))
    lenient.sounds = aligner.sounds
    (found,), said = lenient.shard([cut])
    assert said["counts"] == {"bad_audio": 1, "cuts": 1} and not found.supervisions[0].alignment


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(spoken, ctc, aligned, tmp_path, monkeypatch):
    report, folder, _ = aligned
    write, written = module.write_shard, []

    def dies(path, cuts):
        if len(written) == 1:
            raise Killed
        written.append(path.name)
        write(path, cuts)

    def run():
        return align_corpus(CutSet.from_cuts(spoken), tmp_path, ctc, CONFIG, source="test")

    monkeypatch.setattr(module, "write_shard", dies)
    with pytest.raises(Killed):
        run()
    monkeypatch.setattr(module, "write_shard", lambda path, cuts: written.append(path.name) or write(path, cuts))
    monkeypatch.setattr(CorpusAligner, "learn", None)  # the sounds are there
    assert run().as_dict() == report.as_dict()
    assert written == [f"cuts-{number:05d}.jsonl.gz" for number in range(3)]  # none of them twice
    files = sorted(path.name for path in folder.iterdir() if path.name != "cuts.jsonl.gz")
    assert files == sorted(path.name for path in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_a_folder_of_other_alignments_is_refused(spoken, ctc, aligned):
    with pytest.raises(ValueError, match="made with other min_score, source"):
        align_corpus(CutSet.from_cuts(spoken), aligned[1], ctc, AlignConfig(0.5, 500, 0, 60.0, 16), source="other")
    lenient = AlignConfig(batch_seconds=30.0, shard_size=16, on_bad_audio="skip")  # what a message advises
    assert align_corpus(CutSet.from_cuts(spoken), aligned[1], ctc, lenient, source="test").counts == aligned[0].counts


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"min_score": 1.5}, "min_score is 1.5"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"batch_seconds": -1.0}, "batch_seconds is -1"),
        ({"on_bad_audio": "no"}, "on_bad_audio"),
    ],
)
def test_settings_that_mean_nothing(keys, message):
    with pytest.raises(ValueError, match=message):
        AlignConfig(**keys)


def test_an_empty_report():
    assert AlignmentReport().as_dict() == {"counts": {}}
