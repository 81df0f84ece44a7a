# SPDX-License-Identifier: Apache-2.0
"""The figures of a report by hand, the file that keeps them, and what the terminal shows."""

import io
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nemo_mtbi.evaluation.report import (
    Answer,
    examples_markdown,
    pick_examples,
    render,
    summarize,
    write_results,
)

TRAIN = {"seconds": 12.5, "steps": 300, "peak_rss_gib": 1.25}
GROUPS = ["seen", "heldout_wordings", "heldout_tasks"]


def answer(task="who", group="seen", scoring="exact", reference="cat", text="cat", speech="cat", **other):
    fields = {"cut_id": "u1", "prompt": "who is it?", "transcript": "the cat sat"}
    return Answer(
        task=task, group=group, scoring=scoring, reference=reference, text=text, speech=speech, **(fields | other)
    )


def transcription(transcript, speech, **other):
    other = {"reference": transcript, "text": transcript} | other
    return answer("transcribe", scoring="wer", transcript=transcript, speech=speech, **other)


@pytest.fixture
def rows():
    return [
        transcription("the cat sat", "the cat sat", cut_id="u1"),
        transcription("the dog ran home", "the dog ran", cut_id="u2"),
        answer(cut_id="u1"),
        answer(cut_id="u2", reference="dog", text="dog", speech="cat"),
        answer(cut_id="u3", reference="dog", text="cat", speech="dog"),
        answer(cut_id="u4", reference="dog", text="cow", speech="cow"),
        answer(cut_id="u1", group="heldout_wordings", prompt="name them"),
        answer("spell", "heldout_tasks", reference="c a t", text="c a t", speech="c a"),
    ]


def printed(summary, answers, **options):
    console = Console(file=io.StringIO(), width=100)
    render(summary, answers, console, **options)
    return console.file.getvalue()


def test_figures_by_hand(rows):
    summary = summarize(rows)
    assert summary["transcription"] == {"wer": 1 / 7, "n": 2}
    seen = summary["behavior"]["seen"]
    assert seen["n"] == seen["n_scored"] == 6
    assert seen["text"] == pytest.approx(4 / 6)  # both transcripts, u1, u2
    assert seen["speech"] == pytest.approx(3 / 6)  # one transcript, u1, u3
    assert seen["ratio"] == pytest.approx(3 / 4)
    assert seen["agreement"] == pytest.approx(3 / 6)  # one transcript, u1, u4 (equal, though both wrong)
    assert seen["text_score"] == pytest.approx(4 / 6)
    assert seen["speech_score"] == pytest.approx((1 + 3 / 4 + 1 + 1) / 6)  # the second transcript: 1 of 4 words lost
    assert seen["token_f1"] == pytest.approx((1 + 6 / 7 + 1 + 1) / 6)
    assert summary["behavior"]["heldout_wordings"]["agreement"] == 1.0
    heldout = summary["behavior"]["heldout_tasks"]
    assert (heldout["text"], heldout["speech"], heldout["agreement"], heldout["ratio"]) == (1.0, 0.0, 0.0, 0.0)
    assert heldout["token_f1"] == pytest.approx(4 / 5)


def test_figures_of_tasks(rows):
    tasks = summarize(rows)["tasks"]
    assert list(tasks) == ["spell", "transcribe", "who"]
    who = tasks["who"]
    assert (who["scoring"], who["heldout"], who["n"]) == ("exact", False, 5)
    assert (who["text"], who["speech"], who["agreement"]) == (3 / 5, 3 / 5, 3 / 5)
    assert list(who["groups"]) == ["seen", "heldout_wordings"]
    assert (who["groups"]["seen"]["n"], who["groups"]["seen"]["text"]) == (4, 2 / 4)
    assert tasks["spell"]["heldout"] is True


def test_rows_without_reference_count_for_agreement_alone():
    figures = summarize([answer(reference=None), answer(reference=None, speech="cow"), answer()])["behavior"]["seen"]
    assert (figures["n"], figures["n_scored"], figures["text"], figures["speech"]) == (3, 1, 1.0, 1.0)
    assert figures["agreement"] == 2 / 3
    none = summarize([answer(reference=None)])["behavior"]["seen"]
    assert (none["text"], none["speech"], none["ratio"], none["agreement"]) == (None, None, None, 1.0)


def test_groups_without_rows_are_there_without_figures():
    behavior = summarize([answer()])["behavior"]
    assert list(behavior) == GROUPS
    assert behavior["heldout_tasks"]["n"] == 0 and behavior["heldout_tasks"]["agreement"] is None


def test_no_ratio_to_a_text_score_of_0():
    figures = summarize([answer(text="cow", speech="cat")])["behavior"]["seen"]
    assert (figures["text"], figures["speech"], figures["ratio"]) == (0.0, 1.0, None)


def test_transcription_wer_takes_seen_transcriptions_only():
    rows = [
        transcription("a b", "a b", reference=None),
        transcription("a b", "x y", group="heldout_wordings"),
        answer("translate", scoring="wer", transcript="a b", reference="uno dos", text="uno dos", speech="uno dos"),
    ]
    assert summarize(rows)["transcription"] == {"wer": 0.0, "n": 1}
    assert summarize(rows[1:])["transcription"] == {"wer": None, "n": 0}


def test_transcription_scored_by_characters_is_reported_so():
    said = dict.fromkeys(("transcript", "reference", "text"), "今天很好")
    rows = [answer("say", scoring="cer", speech="今天真好", **said)]
    summary = summarize(rows)
    assert summary["transcription"] == {"wer": 0.25, "cer": 0.25, "n": 1}
    assert summary["tasks"]["say"]["speech_score"] == 0.75
    assert "CER 25.0%, WER 25.0%, 1 utterances" in printed(summary, rows)


def test_agreement_folds_whitespace_and_nothing_else():
    assert answer(text="a b", speech=" a  b\n").agrees
    assert not answer(text="a b", speech="A b").agrees


def test_bad_rows_are_errors():
    with pytest.raises(ValueError, match="no answers to report"):
        summarize([])
    with pytest.raises(ValueError, match="unknown group 'unseen' of task 'who': use one of seen, "):
        answer(group="unseen")
    with pytest.raises(ValueError, match="unknown scoring kind 'bleu' of task 'who'"):
        answer(scoring="bleu")
    with pytest.raises(ValueError, match="task 'who' is scored by exact and f1"):
        summarize([answer(), answer(scoring="f1")])
    with pytest.raises(ValueError, match="task 'who' is both trained and held out"):
        summarize([answer(), answer(group="heldout_tasks")])


PLAIN = st.sampled_from(["", "cat", "dog", "the cat", "Cat."])
ROWS = st.lists(
    st.builds(
        lambda group, scoring, reference, text, speech: answer(
            f"{group == 'heldout_tasks'} {scoring}", group, scoring, reference, text, speech
        ),
        st.sampled_from(GROUPS),
        st.sampled_from(["wer", "cer", "exact", "label", "f1", "upper"]),
        st.none() | PLAIN,
        PLAIN,
        PLAIN,
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(ROWS)
def test_bounds_and_counts(answers):
    summary = summarize(answers)
    figures = [*summary["behavior"].values(), *summary["tasks"].values()]
    for f in figures:
        for name in ("text", "speech", "text_score", "speech_score", "agreement", "token_f1"):
            assert f[name] is None or 0.0 <= f[name] <= 1.0
        if f["n_scored"]:
            assert f["text"] <= f["text_score"] and f["speech"] <= f["speech_score"]
    assert sum(f["n"] for f in summary["behavior"].values()) == len(answers)
    assert sum(f["n"] for f in summary["tasks"].values()) == len(answers)


@settings(deadline=None)
@given(ROWS)
def test_speech_that_does_as_text_loses_nothing(answers):
    summary = summarize([replace(a, speech=a.text) for a in answers])
    for f in [*summary["behavior"].values(), *summary["tasks"].values()]:
        assert f["text"] == f["speech"]
        assert f["ratio"] in (None, 1.0)
        assert f["agreement"] == f["token_f1"] == (1.0 if f["n"] else None)


def test_results_round_trip_and_schema(rows, tmp_path):
    summary = summarize(rows)
    path = write_results(
        tmp_path / "new" / "results.json",
        summary=summary,
        seed=3,
        train=TRAIN,
        nemo_path=tmp_path / "model.nemo",
        extra={"version": "0.1"},
    )
    results = json.loads(path.read_text(encoding="utf-8"))
    assert set(results) == {"seed", "train", "transcription", "behavior", "tasks", "nemo", "version"}
    assert (results["seed"], results["train"], results["version"]) == (3, TRAIN, "0.1")
    assert results["nemo"] == str(tmp_path / "model.nemo")
    assert results["transcription"]["wer"] == pytest.approx(1 / 7, abs=1e-6)
    assert set(results["behavior"]) == set(GROUPS)
    for group in GROUPS:
        assert {"text", "speech", "agreement", "n"} <= set(results["behavior"][group])
        for name, value in summary["behavior"][group].items():
            assert results["behavior"][group][name] == pytest.approx(value, abs=1e-6)
    assert set(results["tasks"]) == {"spell", "transcribe", "who"}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]  # no partial file is left


def test_results_are_stable_whatever_the_order_of_the_rows(rows, tmp_path):
    def written(name, answers):
        path = write_results(tmp_path / name, summary=summarize(answers), seed=0, train=TRAIN, nemo_path=None)
        return path.read_bytes()

    first = written("a.json", rows)
    for seed in range(5):
        assert written("b.json", random.Random(seed).sample(rows, len(rows))) == first


def test_results_that_would_lie_are_refused(rows, tmp_path):
    path, summary = tmp_path / "results.json", summarize(rows)
    with pytest.raises(ValueError, match="train lacks steps, peak_rss_gib"):
        write_results(path, summary=summary, seed=0, train={"seconds": 1.0}, nemo_path=None)
    with pytest.raises(ValueError, match="extra may not hold seed"):
        write_results(path, summary=summary, seed=0, train=TRAIN, nemo_path=None, extra={"seed": 1})
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        write_results(path, summary=summary, seed=0, train=TRAIN | {"seconds": float("nan")}, nemo_path=None)
    assert not path.exists()


def test_tables_hold_the_figures(rows):
    lines = printed(summarize(rows), rows).splitlines()
    assert max(map(len, lines)) <= 100

    def cells(start):
        (line,) = [line for line in lines if line.strip("│ ").startswith(start)]
        return line.strip("│ ").replace("│", " ").split()

    assert cells("seen prompts") == ["seen", "prompts", "66.7%", "50.0%", "0.750", "50.0%", "64.3%", "6"]
    assert cells("held-out wordings")[2:] == ["100.0%", "100.0%", "1.000", "100.0%", "100.0%", "1"]
    assert cells("held-out tasks  ")[2:] == ["100.0%", "0.0%", "0.000", "0.0%", "80.0%", "1"]
    assert cells("transcription of speech") == "transcription of speech: WER 14.3%, 2 utterances".split()
    assert cells("who ") == ["who", "exact", "60.0%", "60.0%", "1.000", "60.0%", "5"]
    assert cells("spell ") == ["spell", "exact", "100.0%", "0.0%", "0.000", "0.0%", "1"]
    assert any("differ in 4 of all 8 rows" in line for line in lines)


def test_missing_figures_are_shown_as_missing():
    rows = [answer(reference=None)]
    text = printed(summarize(rows), rows)
    (line,) = [line for line in text.splitlines() if "held-out tasks" in line]
    assert line.replace("│", " ").split() == ["held-out", "tasks", "-", "-", "-", "-", "-", "0"]
    assert "WER" not in text


def test_examples_show_any_answer_as_it_is():
    row = answer(prompt="", text="[red]a[/red]", speech="\x1b[2Jboo\n- line two " + "long " * 100)
    text = printed(summarize([row]), [row])
    assert "[red]a[/red]" in text and "≠" in text and "asked: (empty)" in text
    assert "\x1b" not in text
    assert "[...]" in text
    assert max(map(len, text.splitlines())) <= 100


def test_default_console_prints_to_standard_output(rows, capsys):
    render(summarize(rows), rows, examples=0)
    out = capsys.readouterr().out
    assert "held-out wordings" in out and "Examples" not in out


def test_picked_examples_mix_disagreements_groups_and_tasks():
    rows = [
        answer(f"{group}{t}", group, cut_id=f"u{c}", speech="cow" if c == 0 else "cat")
        for group in GROUPS
        for t in range(3)
        for c in range(5)
    ]
    picked = pick_examples(rows, 6)
    assert [a.agrees for a in picked] == [False] * 3 + [True] * 3
    assert sorted(a.group for a in picked) == sorted(GROUPS * 2)
    assert len({a.task for a in picked}) == 6
    assert pick_examples(rows[::-1], 6) == picked


@pytest.mark.parametrize(("differing", "equal"), [(0, 9), (9, 0), (1, 9), (9, 1), (1, 1), (0, 0)])
def test_picked_examples_fill_up(differing, equal):
    rows = [answer(cut_id=f"d{i}", speech="cow") for i in range(differing)]
    rows += [answer(cut_id=f"e{i}") for i in range(equal)]
    picked = pick_examples(rows, 4)
    assert len(picked) == len({a.cut_id for a in picked}) == min(4, differing + equal)
    assert sum(not a.agrees for a in picked) == min(differing, max(2, 4 - equal))


@pytest.mark.parametrize("field", ["transcript", "prompt", "text", "speech", "task"])
def test_no_text_commands_the_terminal_or_the_board(field):
    rows = [answer(**{field: "x\x1b]0;title\x07\x9b2J\x1f\u202ey"})]
    for shown in (printed(summarize(rows), rows), examples_markdown(rows)):
        assert not {"\x1b", "\x07", "\x9b", "\x1f", "\u202e"} & set(shown) and ("x" in shown and "y" in shown)


def test_markdown_keeps_its_table_whatever_the_answers():
    row = answer(text="a | b", speech="- x\n- <b>y</b> *z*")
    header, rule, line = examples_markdown([row], 3).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|") == 6
    assert "a &#124; b" in line and "- x<br>- &#60;b&#62;y&#60;/b&#62; &#42;z&#42;" in line
    assert line.endswith("| **no** |")
