# SPDX-License-Identifier: Apache-2.0
"""Times of aligners on the words of transcripts, and the files that hold them."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse.supervision import AlignmentItem
from lhotse.utils import fastcopy

from nemo_mtbi.prepare.word_alignments import bare, fit_words, read_texts, read_times, with_texts, with_times

WORDS = ["Hello", "–", "don't", "stop", "NOW!"]
ITEMS = [
    AlignmentItem("", 0.0, 0.2),
    AlignmentItem("HELLO", 0.2, 0.3),
    AlignmentItem("<eps>", 0.5, 0.1),
    AlignmentItem("DON'T", 0.6, 0.2, 0.9),
    AlignmentItem("sp", 0.8, 0.1),
    AlignmentItem("stop,", 0.9, 0.1),
    AlignmentItem("now", 1.0, 0.5),
]


def test_times_move_to_the_words_of_the_transcript():
    found = fit_words(WORDS, ITEMS)
    assert [item.symbol for item in found] == WORDS
    assert [(item.start, item.duration) for item in found] == [
        (0.2, 0.3), (0.5, 0.0), (0.6, 0.2), (0.9, 0.1), (1.0, 0.5)
    ]  # fmt: skip
    assert found[2].score == 0.9


@pytest.mark.parametrize("words", [WORDS[:-1], [*WORDS, "again"], WORDS[::-1], ["Hello", "do", "not", "stop", "now"]])
def test_other_words_do_not_fit(words):
    assert fit_words(words, ITEMS) is None


@given(st.lists(st.text(alphabet="aB'é-. ß", min_size=1, max_size=5).filter(str.strip), max_size=6))
def test_words_fit_themselves_in_any_case(words):
    words = [word for text in words for word in text.split()]
    items = [AlignmentItem(word.upper(), float(i), 1.0) for i, word in enumerate(words) if bare(word)]
    found = fit_words(words, items)
    assert [item.symbol for item in found] == words
    assert [item.start for item in found if item.duration] == [item.start for item in items]
    assert all(a.start <= b.start for a, b in zip(found, found[1:], strict=False))


def test_ctm(tmp_path):
    path = tmp_path / "words.ctm"
    path.write_text(";; comment\nb 1 0.50 0.25 two 0.7\nb 1 0.10 0.30 one\n\na A 1 2 word\n")
    assert read_times(path) == {
        "b": [AlignmentItem("one", 0.1, 0.3), AlignmentItem("two", 0.5, 0.25, 0.7)],
        "a": [AlignmentItem("word", 1.0, 2.0)],
    }
    path.write_text("b 1 start 0.25 two\n")
    with pytest.raises(ValueError, match="line 1 is not a line of a CTM"):
        read_times(path)


def test_alignments_of_librispeech(tmp_path):
    folder = tmp_path / "dev-clean" / "84" / "121"
    folder.mkdir(parents=True)
    (folder / "84-121.alignment.txt").write_text('84-121-0000 ",GO,,ON," "0.3,0.5,0.6,1.0,1.2"\n')
    (items,) = read_times(tmp_path).values()
    assert [(item.symbol, item.start, item.end) for item in fit_words(["Go", "on."], items)] == [
        ("Go", 0.3, 0.5), ("on.", 0.6, 1.0)
    ]  # fmt: skip


def textgrid(path, tier="words"):
    from praatio import textgrid as praat

    grid = praat.Textgrid()
    grid.addTier(praat.IntervalTier(tier, [(0.0, 0.2, ""), (0.2, 0.5, "go"), (0.5, 1.0, "on")], 0.0, 1.2))
    grid.addTier(praat.IntervalTier("phones", [(0.2, 0.3, "G"), (0.3, 0.5, "OW")], 0.0, 1.2))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(str(path), format="long_textgrid", includeBlankSpaces=True)


@pytest.mark.parametrize("tier", ["words", "speaker - words"])
def test_textgrids_of_the_montreal_forced_aligner(tmp_path, tier):
    textgrid(tmp_path / "84" / "84-121-0000.TextGrid", tier)
    found = read_times(tmp_path)
    assert [(i.symbol, i.start, i.end) for i in found["84-121-0000"]] == [("go", 0.2, 0.5), ("on", 0.5, 1.0)]


def test_a_textgrid_without_words(tmp_path):
    textgrid(tmp_path / "u.TextGrid", "syllables")
    with pytest.raises(ValueError, match="one must be named words"):
        read_times(tmp_path)


def test_a_folder_without_alignments(tmp_path):
    with pytest.raises(ValueError, match="neither a CTM file nor a folder with"):
        read_times(tmp_path)


def test_texts_of_each_kind(tmp_path):
    path = tmp_path / "texts"
    path.write_text(
        json.dumps({"audio_filepath": "a/84-121-0000.flac", "text": "Go on."})
        + "\n"
        + json.dumps({"id": "u2", "text": "Stop!"})
        + "\nu3 Now, then.\n"
    )
    assert read_texts([path]) == {"84-121-0000": "Go on.", "u2": "Stop!", "u3": "Now, then."}
    path.write_text("u3 one\nu3 two\n")
    with pytest.raises(ValueError, match="line 2: a second text of u3"):
        read_texts([path])
    path.write_text("lonely\n")
    with pytest.raises(ValueError, match="line 1 has no id and text"):
        read_texts([path])


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_texts_of_every_editor(tmp_path, character):
    text, path = f"one{character}two", tmp_path / "texts"
    for line in (json.dumps({"id": "a", "text": text}, ensure_ascii=False), f"a {text}"):
        path.write_bytes(MARK + f"{line}\r\n\r\nb Stop.\r\n".encode())
        assert read_texts([path]) == {"a": text, "b": "Stop."}


@pytest.mark.parametrize(
    "line",
    ['{"id": 3, "text": "a"}', '{"id": "a", "text": 5}', '{"text": "a"}', '{"audio_filepath": 1, "text": "a"}', "{"],
)
def test_texts_of_a_wrong_type(tmp_path, line):
    (tmp_path / "texts").write_text(f"u1 one\n{line}\n")
    with pytest.raises(ValueError, match="texts, line 2"):
        read_texts([tmp_path / "texts"])


def test_files_without_a_word_are_no_transcripts_and_no_times(tmp_path):
    (tmp_path / "empty").write_bytes(MARK + b"\r\n")
    with pytest.raises(ValueError, match="empty without a single text"):
        read_texts([tmp_path / "empty"])
    with pytest.raises(ValueError, match="empty holds no word times"):
        read_times(tmp_path / "empty")
    assert read_texts([]) == {}


def test_times_of_every_editor(tmp_path):
    ctm = tmp_path / "words.ctm"
    ctm.write_bytes(MARK + "a 1 0.1 0.3 10\u00a0000\r\na\t1 0.5 0.3  one\u2028two 0.5\r\n".encode())
    assert [(item.symbol, item.score) for item in read_times(ctm)["a"]] == [
        ("10\u00a0000", None),
        ("one\u2028two", 0.5),
    ]
    ctm.write_bytes("a 1 0.1 0.3 où\n".encode("latin-1"))
    with pytest.raises(ValueError, match="words.ctm is not UTF-8"):
        read_times(ctm)
    said = tmp_path / "84-121.alignment.txt"
    said.write_bytes(MARK + b'84-121-0000 ",GO," "0.3,0.5,0.6"\r\n\r\n')
    assert list(read_times(tmp_path)) == ["84-121-0000"]
    said.write_text('84-121-0000 ",GO,"\n')
    with pytest.raises(ValueError, match="line 1 is not a line of LibriSpeech-Alignments"):
        read_times(tmp_path)


def test_textgrids_of_every_editor(tmp_path):
    path = tmp_path / "u.TextGrid"
    textgrid(path)
    for content in (MARK + path.read_bytes(), path.read_text().replace("\n", "\r\n").encode("utf-16")):
        path.write_bytes(content)
        assert [item.symbol for item in read_times(tmp_path)["u"]] == ["go", "on"]
    for content in (b"", b"no grid\n", "où".encode("latin-1")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="u.TextGrid can't be read as a TextGrid"):
            read_times(tmp_path)


# Cuts ------------------------------------------------------------


def test_times_by_utterance_and_by_recording(corpus):
    cut = corpus.cut(0, seconds=2.0, text="Go on.", align=False)
    items = [AlignmentItem("GO", 1.1, 0.2), AlignmentItem("ON", 1.4, 0.3)]
    earlier = AlignmentItem("AND", 0.2, 0.3)
    part = cut.truncate(offset=1.0, preserve_id=True)  # its words are those of the second half of the recording
    part.supervisions = [fastcopy(cut.supervisions[0], start=0.0, duration=1.0)]
    for times in ({cut.id: items}, {cut.recording_id: [earlier, *items]}):
        counts = Counter()
        (found,) = with_times([part], times, counts)
        assert [(i.symbol, i.start) for i in found.supervisions[0].alignment["word"]] == [("Go", 1.1), ("on.", 1.4)]
        assert counts == {"with word times": 1}


def test_what_does_not_fit_is_counted(corpus):
    cuts = [corpus.cut(i, text=text, align=False) for i, text in enumerate(["go", "on", "no times"])]
    times = {cuts[0].id: [AlignmentItem("go", 0, 0.1)], cuts[1].id: [AlignmentItem("off", 0, 0.1)]}
    counts = Counter()
    found = list(with_times(cuts, times, counts))
    assert [bool(cut.supervisions[0].alignment) for cut in found] == [True, False, False]
    assert counts == {"with word times": 1, "word times of another transcript": 1, "without word times": 1}


def test_own_times_of_another_kind_stay(corpus):
    cut = corpus.cut(0, text="Go on.")
    kept = {"phone": [AlignmentItem("G", 0.0, 0.1)], **cut.supervisions[0].alignment}
    cut = fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], alignment=kept)])
    (found,) = with_times([cut], None, Counter())
    assert found.supervisions[0].alignment == kept


def test_other_texts(corpus):
    cuts = [corpus.cut(i, text="GO ON") for i in range(2)]
    counts = Counter()
    (found,) = with_times(with_texts(cuts, {cuts[0].id: "Go on."}, counts), None, counts)
    assert found.supervisions[0].text == "Go on."
    assert [item.symbol for item in found.supervisions[0].alignment["word"]] == ["Go", "on."]
    assert counts == {"left out, without a text": 1, "with word times": 1}
