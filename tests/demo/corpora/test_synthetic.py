# SPDX-License-Identifier: Apache-2.0
import itertools
import random
import shutil

import numpy as np
import pytest

from nemo_mtbi.demo.corpora import grammar, synthetic
from nemo_mtbi.demo.corpora.corpus import SAMPLE_RATE, load_corpus
from nemo_mtbi.demo.corpora.espeak import Espeak
from nemo_mtbi.demo.corpora.synthetic import VOICES, build_synthetic, split_of

pytest.importorskip("espeakng_loader")

SPLITS = ("train", "validation", "test")


def build(folder, **kwargs):
    arguments = {"num_utterances": 24, "seed": 3, "split": "train", "num_workers": 1, "progress": False, **kwargs}
    return build_synthetic(folder, **arguments)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_arguments_same_bytes_with_any_number_of_workers(tmp_path):
    folder = build(tmp_path)
    content = files_of(folder)
    speakers = {cut.supervisions[0].speaker for cut in load_corpus(folder)}
    assert any("f2" in speaker for speaker in speakers)  # a voice with breath: noise that espeak seeds by the clock
    assert len(content) == 26
    shutil.rmtree(folder)
    assert build(tmp_path, num_workers=2) == folder
    assert files_of(folder) == content


def test_second_call_builds_nothing(tmp_path):
    folder = build(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert build(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_every_argument_gives_another_corpus(tmp_path):
    variants = [
        {},
        {"seed": 4},
        {"split": "test"},
        {"num_utterances": 2},
        {"augment": None},
        {"with_references": True},
    ]
    assert len({build(tmp_path, **{"num_utterances": 3, **variant}) for variant in variants}) == len(variants)


def test_cuts_are_whole(tmp_path):
    cuts = list(load_corpus(build(tmp_path, with_references=True)))
    assert len({cut.supervisions[0].text for cut in cuts}) == len(cuts) == 24
    for cut in cuts:
        [supervision] = cut.supervisions
        words = supervision.alignment["word"]
        assert " ".join(item.symbol for item in words) == supervision.text
        assert 0.04 < words[0].start and words[-1].end < cut.duration - 0.04
        assert supervision.speaker in VOICES["train"]
        assert split_of(supervision.text) == "train"
        assert cut.references == grammar.references(supervision.text)
        assert cut.sampling_rate == SAMPLE_RATE


def test_references_only_where_asked(tmp_path):
    assert all(cut.custom is None for cut in load_corpus(build(tmp_path, num_utterances=2)))


def test_clean_speech_lies_within_its_word_times(tmp_path):
    for cut in load_corpus(build(tmp_path, augment=None)):
        samples = cut.load_audio()[0]
        words = cut.supervisions[0].alignment["word"]
        start, end = (round(time * SAMPLE_RATE) for time in (words[0].start, words[-1].end))
        # Resampling rings for a millisecond at a sudden start or end.
        assert np.abs(samples[: start - 32]).max() < 2e-3
        assert np.abs(samples[end + 32 :]).max() < 5e-3
        for word in words:
            inside = samples[round(word.start * SAMPLE_RATE) : round(word.end * SAMPLE_RATE)]
            assert np.abs(inside).max() > 0.02


def test_sentences_voices_and_variants_of_the_splits_are_disjoint():
    for first, second in itertools.combinations(SPLITS, 2):
        assert not set(VOICES[first]) & set(VOICES[second])
        variants = [{v.partition("+")[2] for v in VOICES[split]} for split in (first, second)]
        assert not variants[0] & variants[1]
        texts = [{job.words for job in synthetic._plan(300, 0, split, None, False)} for split in (first, second)]
        assert not texts[0] & texts[1]


def test_split_of_a_sentence_is_stable_and_in_proportion():
    assert [split_of(text) for text in ("six", "seven", "five")] == ["train", "validation", "test"]
    rng = random.Random(0)
    splits = [split_of(grammar.sample_sentence(rng).text) for _ in range(3000)]
    assert 0.76 < splits.count("train") / 3000 < 0.84
    assert 0.08 < splits.count("test") / 3000 < 0.12


def test_a_larger_corpus_starts_with_the_smaller_one():
    assert synthetic._plan(40, 1, "test", None, True)[:15] == synthetic._plan(15, 1, "test", None, True)


def test_every_voice_speaks_every_word_with_times():
    espeak, words = Espeak(), list(grammar.grammar_words())
    for voice in itertools.chain.from_iterable(VOICES.values()):
        random.Random(voice).shuffle(words)
        for i in range(0, len(words), 12):
            text = " ".join(words[i : i + 12])
            assert len(espeak.speak(text, voice).words) == len(text.split())


def test_exhausted_grammar_says_so(tmp_path, monkeypatch):
    texts = [text for text in ("three", "four", "five", "six", "seven") if split_of(text) == "train"]
    monkeypatch.setattr(grammar, "sample_sentence", lambda rng, form=None: grammar.Sentence((rng.choice(texts),), {}))
    with pytest.raises(ValueError, match=f"after {len(texts)} of them: lower num_utterances"):
        build(tmp_path, num_utterances=len(texts) + 1)


@pytest.mark.parametrize("arguments", [{"split": "dev"}, {"num_utterances": 0}])
def test_bad_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="choose one of train|at least 1"):
        build(tmp_path, **arguments)
