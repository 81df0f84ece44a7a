# SPDX-License-Identifier: Apache-2.0
"""The summary of a benchmark by hand, what the terminal shows of it, and the examples beside it."""

import io
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nemo_mtbi.evaluation.benchmark import SET, SPEECH, TEXT, TrainingRecord, benchmark_config, benchmark_results
from nemo_mtbi.evaluation.examples import examples_markdown, examples_of, pick_examples
from nemo_mtbi.evaluation.figures import AnsweredSet, SystemAnswers
from nemo_mtbi.evaluation.files import write_json
from nemo_mtbi.evaluation.items import Clip, EvalSet, Item, Reply, metrics_of
from nemo_mtbi.evaluation.terminal import print_summary
from nemo_mtbi.targets.tasks import Task

CONFIG = replace(benchmark_config("tiny", Path("run/tiny.nemo")), resamples=20)
GROUPS = ["seen", "heldout_wordings", "heldout_tasks"]
OLD = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Answer:
    """One question with its answers, as the first format of ``results.json`` was computed from."""

    cut_id: str
    task: str
    prompt: str
    group: str
    scoring: str
    transcript: str
    reference: str | None
    text: str
    speech: str


def answered(rows):
    """The answers as those of a benchmark; utterances of one id and different transcripts are told apart."""
    clips = list(dict.fromkeys((row.cut_id, row.transcript) for row in rows))
    several = Counter(name for name, _ in clips)
    items = [
        Item(
            clips.index((row.cut_id, row.transcript)),
            row.task,
            row.group,
            row.prompt,
            metrics_of(Task(row.task, row.scoring, False, ("",))),
            row.reference,
        )
        for row in rows
    ]
    named = [Clip(f"{name}, {said}" if several[name] > 1 else name, Path("x.wav"), said) for name, said in clips]
    replies = {SPEECH: [row.speech for row in rows], TEXT: [row.text for row in rows]}
    systems = {name: SystemAnswers(items, [[Reply(x, 1, False) for x in texts]]) for name, texts in replies.items()}
    return AnsweredSet(EvalSet(SET, named, items), systems, {})


def summarize(rows, **record):
    return benchmark_results(
        CONFIG, answered(rows), 3, TrainingRecord(**({"seconds": 12.5, "steps": 300, "peak_rss_gib": 1.25} | record))
    )


def examples(rows):
    return examples_of(answered(rows), CONFIG)


def test_figures_are_those_of_the_first_format(tmp_path):
    """The answers of a training at the time of two pipelines, and the ``results.json`` that it wrote."""
    rows = [Answer(**row) for row in json.loads((OLD / "answers.json").read_text())]
    old = json.loads((OLD / "results.json").read_text())
    new = json.loads(write_json(tmp_path / "results.json", summarize(rows)).read_text())
    assert {key: new[key] for key in ("transcription", "behavior", "tasks")} == {
        key: old[key] for key in ("transcription", "behavior", "tasks")
    }
    assert len(rows) == sum(figures["n"] for figures in old["behavior"].values())


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
    print_summary(summary, examples(answers), console, **options)
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
    assert examples([answer(text="a b", speech=" a  b\n")])[0].agrees
    assert not examples([answer(text="a b", speech="A b")])[0].agrees


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


def test_results_are_stable_whatever_the_order_of_the_rows(rows, tmp_path):
    first = write_json(tmp_path / "a.json", summarize(rows)).read_bytes()
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert write_json(tmp_path / "b.json", summarize(shuffled)).read_bytes() == first


def test_results_that_would_lie_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        write_json(tmp_path / "results.json", summarize(rows, seconds=float("nan")))
    assert not list(tmp_path.iterdir())


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
    print_summary(summarize(rows), examples(rows), shown=0)
    out = capsys.readouterr().out
    assert "held-out wordings" in out and "Examples" not in out


def test_picked_examples_mix_disagreements_groups_and_tasks():
    rows = [
        answer(f"{group}{t}", group, cut_id=f"u{c}", speech="cow" if c == 0 else "cat")
        for group in GROUPS
        for t in range(3)
        for c in range(5)
    ]
    found = examples(rows)
    picked = pick_examples(found, 6)
    assert [a.agrees for a in picked] == [False] * 3 + [True] * 3
    assert sorted(a.group for a in picked) == sorted(GROUPS * 2)
    assert len({a.task for a in picked}) == 6
    assert pick_examples(found[::-1], 6) == picked


@pytest.mark.parametrize(("differing", "equal"), [(0, 9), (9, 0), (1, 9), (9, 1), (1, 1), (0, 0)])
def test_picked_examples_fill_up(differing, equal):
    rows = [answer(cut_id=f"d{i}", speech="cow") for i in range(differing)]
    rows += [answer(cut_id=f"e{i}") for i in range(equal)]
    picked = pick_examples(examples(rows), 4) if rows else pick_examples([], 4)
    assert len(picked) == len({a.clip.id for a in picked}) == min(4, differing + equal)
    assert sum(not a.agrees for a in picked) == min(differing, max(2, 4 - equal))


@pytest.mark.parametrize("field", ["transcript", "prompt", "text", "speech", "task"])
def test_no_text_commands_the_terminal_or_the_board(field):
    rows = [answer(**{field: "x\x1b]0;title\x07\x9b2J\x1f\u202ey"})]
    for shown in (printed(summarize(rows), rows), examples_markdown(examples(rows))):
        assert not {"\x1b", "\x07", "\x9b", "\x1f", "\u202e"} & set(shown) and ("x" in shown and "y" in shown)


def test_markdown_keeps_its_table_whatever_the_answers():
    row = answer(text="a | b", speech="- x\n- <b>y</b> *z*")
    header, rule, line = examples_markdown(examples([row]), 3).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|") == 6
    assert "a &#124; b" in line and "- x<br>- &#60;b&#62;y&#60;/b&#62; &#42;z&#42;" in line
    assert line.endswith("| **no** |")
