# SPDX-License-Identifier: Apache-2.0
import pickle
from collections import Counter
from itertools import islice

import pytest
from lhotse import CutSet
from lhotse.testing.dummies import dummy_cut

from nemo_mtbi.data.draw import DrawConfig, DrawnRows, DrawRows, SkipCounter
from nemo_mtbi.layouts.layout import speech


def draws(source, chat, frames, **config):
    reader = config.pop("reader", None)
    return DrawRows(source, chat, frames, DrawConfig(**config), reader=reader)


def rows_of(cuts):
    return {(drawn.cut_id, drawn.epoch): drawn.behaviors for drawn in map(DrawnRows.of, cuts)}


def test_cost_is_the_length_of_all_rows_and_stands_where_samplers_count_it(corpus, chat, frames):
    for cut in draws(corpus.cuts(5), chat, frames, rows_per_cut=3):
        drawn = DrawnRows.of(cut)
        audio = speech(0, frames(cut.num_samples))
        assert drawn.cost == sum(len(b.row(chat, audio).layout) for b in drawn.behaviors)
        assert len(drawn.behaviors) == 3
        assert len(cut.supervisions[0].tokens) == drawn.cost


def test_the_source_stays_as_it_was(corpus, chat, frames):
    cuts = corpus.cuts(2)
    before = [cut.to_dict() for cut in cuts]
    out = list(draws(cuts, chat, frames))
    assert [cut.to_dict() for cut in cuts] == before
    assert "behaviors" not in out[0].custom  # all of them would travel to the workers


def test_rows_depend_on_seed_epoch_and_cut_and_on_nothing_else(corpus, chat, frames):
    cuts = corpus.cuts(6)
    one = draws(cuts, chat, frames, rows_per_cut=2)
    two = draws(cuts[::-1], chat, frames, rows_per_cut=2)
    for epoch in (0, 3):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        assert rows_of(one) == rows_of(two)
    two.set_epoch(3)
    other = draws(cuts, chat, frames, rows_per_cut=2, seed=1)
    other.set_epoch(3)
    assert rows_of(other) != rows_of(two)
    again = pickle.loads(pickle.dumps(one))
    again.set_epoch(3)
    two.set_epoch(3)
    assert rows_of(again) == rows_of(two)


def test_reading_ahead_changes_nothing(corpus, chat, frames):
    rows = draws(corpus.cuts(6), chat, frames, rows_per_cut=2)
    first = rows_of(rows)
    list(islice(rows, 3))
    rows.set_epoch(0)
    assert rows_of(rows) == first


def test_a_stream_counts_the_visits_of_each_cut(corpus, chat, frames):
    rows = draws(CutSet.from_cuts(corpus.cuts(3)).repeat(preserve_id=True), chat, frames, rows_per_cut=2)
    drawn = [DrawnRows.of(cut) for cut in islice(rows, 9)]
    assert [d.epoch for d in drawn] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    finite = draws(corpus.cuts(3), chat, frames, rows_per_cut=2)
    for epoch in range(3):
        finite.set_epoch(epoch)
        assert rows_of(finite) == {(d.cut_id, d.epoch): d.behaviors for d in drawn if d.epoch == epoch}


def test_readers_of_a_stream_never_share_an_epoch(corpus, chat, frames):
    stream = CutSet.from_cuts(corpus.cuts(2)).repeat(preserve_id=True)
    seen = [
        [DrawnRows.of(cut).epoch for cut in islice(draws(stream, chat, frames, reader=(rank, 3)), 4)]
        for rank in range(3)
    ]
    assert seen == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2, 5, 5]]


def test_every_cut_that_is_left_out_is_counted(corpus, chat, frames):
    cuts = [
        corpus.cut(1, seconds=9.0),
        corpus.cut(2),
        corpus.cut(3, seconds=0.3),
        corpus.cut(4),
        corpus.cut(5, text=""),
        corpus.cut(6, seconds=0.05),
        corpus.cut(7, seconds=9.0),
    ]
    rows = draws(cuts, chat, frames, on_bad_audio="skip", min_duration=0.01, max_duration=5.0)
    kept = [DrawnRows.of(cut) for cut in rows]
    assert [drawn.cut_id for drawn in kept] == ["cut-002", "cut-003", "cut-004"]
    total = SkipCounter()
    for drawn in kept:
        total.update(drawn.skipped)
    assert total == {"longer_than_max_duration": 2, "no_transcript": 1, "too_short": 1}
    assert total.message() == "longer_than_max_duration: 2, no_transcript: 1, too_short: 1"
    assert dict(kept[-1].skipped) == {"no_transcript": 1, "too_short": 1, "longer_than_max_duration": 1}
    assert [dict(d.skipped) for d in rows_list(rows)] == [dict(d.skipped) for d in kept]  # counts do not pile up


def rows_list(rows):
    return [DrawnRows.of(cut) for cut in rows]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"text": ""}, "cut-001 has no transcript.*on_bad_audio: skip"),
        ({"seconds": 0.05}, "cut-001 is too short to own a single speech frame"),
    ],
)
def test_a_bad_cut_is_an_error_unless_it_may_be_skipped(corpus, chat, frames, values, message):
    with pytest.raises(ValueError, match=message):
        list(draws([corpus.cut(1, **values)], chat, frames))


def test_a_cut_without_behaviors_is_never_skipped(corpus, chat, frames):
    with pytest.raises(ValueError, match="mtbi_generate_targets"):
        list(draws([corpus.cut(1, behaviors=False)], chat, frames, on_bad_audio="skip"))


def test_rows_outside_the_bounds_are_counted_and_left_out(corpus, chat, frames):
    cuts = [corpus.cut(1, seconds=1.0), corpus.cut(2, seconds=1.0, text="a b")]
    whole = {d.cut_id: d for d in rows_list(draws(cuts, chat, frames))}
    audio = speech(0, frames(16_000))
    lengths = sorted(len(b.row(chat, audio).layout) for d in whole.values() for b in d.behaviors)
    bound = lengths[len(lengths) // 2]
    kept = rows_list(draws(cuts, chat, frames, max_tokens=bound))
    dropped = sum(length > bound for length in lengths)
    assert dropped and sum((Counter(d.skipped) for d in kept), Counter()) == {"row_length": dropped}
    assert all(len(b.row(chat, audio).layout) <= bound for d in kept for b in d.behaviors)
    assert sum(d.cost for d in kept) == sum(length for length in lengths if length <= bound)


def test_the_tokens_of_another_llm_are_not_learned(corpus, chat, frames):
    cut = corpus.cut(1)
    for row in cut.custom["behaviors"]:
        row["ids"] = [32, *map(ord, row["response"])]
    own = cut.custom["behaviors_from"]
    for expected, kept in ((own, True), ({**own, "llm": "sha256:x"}, False), ({**own, "chat": "sha256:x"}, False)):
        expected = {key: expected[key] for key in ("llm", "chat")}
        (drawn,) = DrawRows([cut], chat, frames, DrawConfig(expected=expected, allow_foreign=True))
        assert {behavior.ids is not None for behavior in DrawnRows.of(drawn).behaviors} == {kept}


def test_foreign_behaviors_are_refused(corpus, chat, frames):
    cuts = corpus.cuts(1)
    with pytest.raises(ValueError, match="another llm"):
        list(draws(cuts, chat, frames, expected={"llm": "sha256:other"}))
    assert list(draws(cuts, chat, frames, expected={"llm": "sha256:other"}, allow_foreign=True))


def test_no_usable_cut_is_an_error_that_says_why(corpus, chat, frames):
    with pytest.raises(ValueError, match=r"no usable cut in the data \(longer_than_max_duration: 2\)"):
        list(draws(corpus.cuts(2), chat, frames, max_duration=0.1))
    with pytest.raises(ValueError, match="the source is empty"):
        list(draws([], chat, frames))


def test_a_stream_of_nothing_but_bad_cuts_ends(corpus, chat, frames):
    stream = CutSet.from_cuts(corpus.cuts(1)).repeat(preserve_id=True)
    with pytest.raises(ValueError, match="no usable cut"):
        next(iter(draws(stream, chat, frames, max_duration=0.1)))


def test_an_unreadable_source_is_one_clear_error(corpus, chat, frames, tmp_path):
    path = tmp_path / "broken.jsonl"
    CutSet.from_cuts(corpus.cuts(1)).to_file(path)
    path.write_text(path.read_text() + '{"id": "half')
    with pytest.raises(ValueError, match="cannot be read after cut cut-000: .*Error"):
        list(draws(CutSet.from_jsonl_lazy(path), chat, frames))


def test_only_cuts_are_accepted(chat, frames):
    with pytest.raises(ValueError, match="yields str: only cuts"):
        list(draws(["text"], chat, frames))


def test_rows_must_have_been_drawn(corpus):
    with pytest.raises(ValueError, match="no rows were drawn for cut cut-001"):
        DrawnRows.of(corpus.cut(1))
    with pytest.raises(ValueError, match="no rows were drawn"):
        DrawnRows.of(dummy_cut(0))


def test_a_padded_cut_carries_its_rows(corpus, chat, frames):
    cut = CutSet.from_cuts(corpus.cuts(1)).pad(duration=4.0, direction="left", preserve_id=True)
    (drawn,) = map(DrawnRows.of, draws(cut, chat, frames, rows_per_cut=1))
    assert drawn.cost == len(drawn.behaviors[0].row(chat, speech(0, frames(64_000))).layout)
    assert drawn.words[0].start_s == pytest.approx(4.0 - corpus.cut(0).duration)


@pytest.mark.parametrize(
    "values, message",
    [({"rows_per_cut": 0}, "rows_per_cut is 0; it must be at least 1"), ({"on_bad_audio": "x"}, "raise or skip")],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        DrawConfig(**values)
