# SPDX-License-Identifier: Apache-2.0
import pytest
from lhotse.supervision import AlignmentItem, SupervisionSegment

from nemo_mtbi.data.behaviors import (
    Behavior,
    check_provenance,
    draw_behaviors,
    read_behaviors,
    transcript,
    word_times,
)

EXPECTED = {"llm": "sha256:llm", "chat": "sha256:chat"}


def test_a_draw_has_distinct_tasks(corpus):
    cut = corpus.cut(4)
    drawn = draw_behaviors(cut, 3, seed=1, epoch=0)
    assert len({behavior.task for behavior in drawn}) == 3
    assert len(draw_behaviors(cut, 99, seed=1, epoch=0)) == 5
    assert draw_behaviors(cut, None, seed=1, epoch=0) == read_behaviors(cut)


def test_a_draw_depends_on_seed_epoch_and_cut_alone(corpus):
    cut, other = corpus.cut(1), corpus.cut(2)
    base = draw_behaviors(cut, 2, 1, 0)
    assert base == draw_behaviors(cut, 2, 1, 0)
    names = [
        tuple((b.task, b.prompt) for b in draw_behaviors(c, 2, seed, epoch))
        for c in (cut, other)
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(names)) > 16
    wordings = {b.prompt for epoch in range(40) for b in draw_behaviors(cut, 5, 1, epoch)}
    assert len(wordings) == 10  # each wording of each task is drawn some time


def test_a_response_that_teaches_nothing_is_not_drawn(corpus):
    cut = corpus.cut(1)
    cut.custom["behaviors"] = [
        {"task": "a", "prompt": "p", "response": "", "truncated": True},
        {"task": "b", "prompt": "p", "response": "", "truncated": False},
    ]
    assert [behavior.task for behavior in draw_behaviors(cut, 2, 0, 0)] == ["b"]


def test_behaviors_may_stand_in_the_supervision(corpus):
    cut = corpus.cut(1)
    expected = read_behaviors(cut)
    cut.supervisions[0].custom = {"behaviors": cut.custom.pop("behaviors")}
    assert read_behaviors(cut) == expected


def test_a_cut_without_behaviors_is_an_error(corpus):
    with pytest.raises(ValueError, match="cut-001 carries no behaviors: run examples/mtbi_generate_targets.py"):
        read_behaviors(corpus.cut(1, behaviors=False))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"task": "a", "response": "r"}, "cut c: a behavior has no key 'prompt'"),
        ({"task": "a", "prompt": 3, "response": "r"}, "'prompt' of a behavior must be str, got 3"),
        ("text", "cut c: a behavior must be a mapping"),
        (
            {"task": "a", "prompt": "p", "response": "r", "ids": [1, "2"]},
            "'ids' of a behavior must be a list",
        ),
        ({"task": "a", "prompt": "p", "response": "r", "ids": "12"}, "'ids' of a behavior must be a list"),
    ],
)
def test_a_malformed_behavior_is_an_error(entry, message):
    with pytest.raises(ValueError, match=message):
        Behavior.from_dict(entry, "c")


def test_truncated_defaults_to_false_and_other_keys_are_left_alone():
    behavior = Behavior.from_dict({"task": "a", "prompt": "p", "response": "r", "score": 1}, "c")
    assert behavior.to_dict() == {"task": "a", "prompt": "p", "response": "r", "truncated": False}


def test_the_tokens_of_the_llm_are_kept_and_learned(chat):
    """An answer that begins with a space is stored without it, and would be encoded without it."""
    stored = {"task": "a", "prompt": "p", "response": "ok", "truncated": False, "ids": [32, ord("o"), ord("k")]}
    behavior = Behavior.from_dict(stored, "c")
    assert behavior.to_dict() == stored
    assert behavior.row(chat, [-1]).response == [32, ord("o"), ord("k"), chat.end_id]
    edited = Behavior.from_dict({**stored, "response": "no"}, "c")
    assert edited.row(chat, [-1]).response == [ord("n"), ord("o"), chat.end_id]


def test_a_refusal_says_in_what_the_chat_formats_differ(corpus, chat):
    cut, mine = corpus.cut(1), chat.description()
    expected = {**EXPECTED, "chat": "sha256:x", "chat_format": mine}
    with pytest.raises(ValueError, match="another chat: .* puts a prompt as '<user>{audio}.{prompt}'.* Regenerate"):
        check_provenance(cut, expected)
    cut.custom["behaviors_from"] = {**cut.custom["behaviors_from"], "chat_format": {**mine, "end": "<stop>"}}
    with pytest.raises(ValueError, match="Their answers end at '<stop>', and those of this model at '<end>'"):
        check_provenance(cut, expected)
    assert check_provenance(cut, {**expected, "chat": "sha256:chat"}) is True
    assert check_provenance(cut, expected, allow_foreign=True) is False


def test_a_truncated_row_predicts_no_end(chat):
    whole = Behavior("t", "p", "ab").row(chat, [-1])
    cut = Behavior("t", "p", "ab", truncated=True).row(chat, [-1])
    assert whole.labels[-1] == chat.end_id
    assert cut.labels[-1] == ord("b") and whole.layout[:-1] == cut.layout


def test_provenance(corpus):
    cut = corpus.cut(1)
    check_provenance(cut, EXPECTED)
    with pytest.raises(ValueError, match="another llm: sha256:llm, but the model has sha256:x.*allow_foreign: true"):
        check_provenance(cut, {**EXPECTED, "llm": "sha256:x"})
    check_provenance(cut, {"llm": "sha256:x"}, allow_foreign=True)
    del cut.custom["behaviors_from"]
    with pytest.raises(ValueError, match="another llm: None"):
        check_provenance(cut, EXPECTED)


def test_transcript_joins_the_supervisions_in_order_of_time(corpus):
    cut = corpus.cut(1, text="b  c")
    cut.supervisions.append(SupervisionSegment("s", cut.recording.id, -0.5, 0.1, text=" a "))
    assert transcript(cut) == "a b c"
    cut.supervisions = [SupervisionSegment("s", cut.recording.id, 0, 0.1)]
    assert transcript(cut) == ""


def test_word_times_fit_the_transcript_or_are_none(corpus):
    cut = corpus.cut(2, text="a b")
    first, second = word_times(cut)
    assert (first.start_s, first.end_s, second.start_s) == (0.0, pytest.approx(second.start_s), first.end_s)
    items = cut.supervisions[0].alignment["word"]
    cut.supervisions[0].alignment["word"] = [AlignmentItem("", 0.0, 0.0), *items]
    assert word_times(cut) == (first, second)
    cut.supervisions[0].alignment["word"] = items[:1]
    assert word_times(cut) is None
    cut.supervisions[0].alignment["word"] = items[::-1]
    assert word_times(cut) is None
    assert word_times(corpus.cut(3, align=False)) is None


def test_word_times_count_from_the_start_of_the_cut(corpus):
    """Lhotse keeps them in the time of the recording, and moves them neither in truncated nor in padded cuts."""
    cut = corpus.cut(4, seconds=2.0, text="a b c d")
    late = cut.truncate(offset=1.0)
    late.supervisions[0].alignment = {"word": cut.supervisions[0].alignment["word"][2:]}
    late.supervisions[0].text = "c d"
    late.supervisions[0].start, late.supervisions[0].duration = 0.0, 1.0
    assert [(word.start_s, word.end_s) for word in word_times(late)] == [(0.0, 0.5), (0.5, 1.0)]
    padded = late.pad(duration=3.0, direction="left")
    assert [word.start_s for word in word_times(padded)] == [2.0, 2.5]
    joined = late.append(cut)
    assert [word.start_s for word in word_times(joined)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    lost = late.move_to_memory()  # the audio begins at 0 now, but the alignment still says 1.0
    assert lost.start == 0.0 and word_times(lost) is None
