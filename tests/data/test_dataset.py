# SPDX-License-Identifier: Apache-2.0
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_mtbi.config.interleave import InterleaveConfig, InterleaveSchedule
from nemo_mtbi.data.audio import BadAudioError, load_samples
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.draw import DrawConfig, DrawnRows, DrawRows
from nemo_mtbi.layouts.layout import IGNORE

ALWAYS = InterleaveConfig(probability=1.0, text_share=1.0)


@pytest.fixture
def draw(chat, frames):
    def make(cuts, epoch=0, **config):
        rows = DrawRows(cuts, chat, frames, DrawConfig(**config))
        rows.set_epoch(epoch)
        return list(rows)

    return make


def rows_in(batch):
    """All rows as (layout, labels), in no order."""
    return sorted(
        (tuple(micro.layout[r, :n].tolist()), tuple(micro.labels[r, :n].tolist()))
        for micro in batch.microbatches
        for r, n in enumerate(micro.lengths.tolist())
    )


def test_a_step_holds_each_utterance_once_and_all_its_rows(corpus, chat, frames, draw):
    cuts = draw(corpus.cuts(4), rows_per_cut=3)
    batch = MTBIDataset(chat, frames, 200)[cuts]
    assert batch.cut_ids == ["cut-000", "cut-001", "cut-002", "cut-003"]
    assert batch.audio_lengths.tolist() == [cut.num_samples for cut in cuts]
    assert batch.frame_lengths.tolist() == [frames(cut.num_samples) for cut in cuts]
    offset, expected = 0, []
    for cut in cuts:
        count = frames(cut.num_samples)
        for behavior in DrawnRows.of(cut).behaviors:
            row = behavior.row(chat, [-(offset + f + 1) for f in range(count)])
            expected.append((row.layout, row.labels))
        offset += count
    assert rows_in(batch) == sorted(expected)
    assert batch.num_targets == sum(label != IGNORE for _, labels in expected for label in labels)


def test_the_samplers_cost_is_what_the_batch_holds(corpus, chat, frames, draw):
    cuts = draw(corpus.cuts(6), rows_per_cut=2)
    batch = MTBIDataset(chat, frames, 100)[cuts]
    assert sum(DrawnRows.of(cut).cost for cut in cuts) == sum(int(m.lengths.sum()) for m in batch.microbatches)


def test_interleaving_is_the_same_whatever_the_batch(corpus, chat, frames, draw):
    dataset = MTBIDataset(chat, frames, 200, interleave=InterleaveConfig(probability=0.7))
    cuts = draw(corpus.cuts(8), rows_per_cut=3)
    single = [dataset[[cut]] for cut in cuts]
    together = dataset[cuts]
    backwards = pickle.loads(pickle.dumps(dataset))[cuts[::-1]]
    texts = sorted(tuple(v for v in layout if v >= 0) for batch in single for layout, _ in rows_in(batch))
    for batch in (together, backwards):
        assert sorted(tuple(v for v in layout if v >= 0) for layout, _ in rows_in(batch)) == texts
    assert together.stats["interleaved_rows"] == sum(b.stats.get("interleaved_rows", 0) for b in single) > 0
    assert rows_in(dataset[draw(corpus.cuts(8), epoch=1, rows_per_cut=3)]) != rows_in(together)


def test_rows_of_one_cut_are_interleaved_apart(corpus, chat, frames, draw):
    cut = corpus.cut(4, seconds=4.0, text="a b c d e f g h")
    for behavior in cut.custom["behaviors"]:
        behavior["task"] = "the same"
    dataset = MTBIDataset(chat, frames, 1000, interleave=ALWAYS)
    spoken = [
        [tuple(v for v in layout if v < 0) for layout, _ in rows_in(dataset[draw([cut], epoch=epoch)])]
        for epoch in (0, 1)
    ]
    assert len(set(spoken[0])) > 3
    assert spoken[0] != spoken[1]  # all behaviors in both epochs, but other words are written


def test_without_word_times_all_rows_stay_speech_and_are_counted(corpus, chat, frames, draw):
    dataset = MTBIDataset(chat, frames, 200, interleave=ALWAYS)
    cuts = draw(corpus.cuts(3, align=False), rows_per_cut=2)
    batch = dataset[cuts]
    assert batch.stats == {"no_alignment": 3}
    assert rows_in(batch) == rows_in(MTBIDataset(chat, frames, 200)[cuts])


def test_twins_read_the_transcript_and_answer_the_same(corpus, chat, frames, draw):
    cuts = draw(corpus.cuts(4))
    for changes in ({}, {"interleave": InterleaveConfig(probability=0.7)}):
        batch = MTBIDataset(chat, frames, 300, with_twins=True, **changes)[cuts]
        expected, truncated = [], 0
        for cut in cuts:
            text, drawn = chat.encode(cut.supervisions[0].text), DrawnRows.of(cut)
            for behavior in drawn.behaviors:
                prompt = chat.prompt(behavior.prompt, text)
                # the end of a truncated response is no target
                response = [*chat.encode(behavior.response), *([] if behavior.truncated else [chat.end_id])]
                labels = [IGNORE] * (len(prompt) - 1) + response
                expected.append((tuple(prompt + response[:-1]), tuple(labels)))
                truncated += behavior.truncated
        assert rows_in(replace(batch, microbatches=batch.twins)) == sorted(expected) and truncated == 8
        assert sum(len(micro.twin_index) for micro in batch.microbatches) == batch.num_targets
        assert rows_in(batch) == rows_in(MTBIDataset(chat, frames, 300, **changes)[cuts])
    assert MTBIDataset(chat, frames, 300)[cuts].twins is None


def test_a_row_that_is_all_text_hears_nothing_and_has_no_twin(corpus, chat, frames, draw):
    cuts = draw(corpus.cuts(3))
    dataset = MTBIDataset(chat, frames, 300, InterleaveConfig(0.0, all_text=0.5), with_twins=True)
    batch = dataset[cuts]
    text = [layout for layout, _ in rows_in(batch) if min(layout) >= 0]
    assert 5 < len(text) < 25 and batch.stats == {"text_rows": len(text)}
    assert sum(len(twin.lengths) for twin in batch.twins) == 30 - len(text)
    whole = MTBIDataset(chat, frames, 300, InterleaveConfig(0.0, all_text=1.0), with_twins=True)[cuts]
    assert len(whole.audio) == 0 and whole.cut_ids == [] and whole.twins == []
    expected = [
        behavior.row(chat, chat.encode(DrawnRows.of(cut).transcript)).layout
        for cut in cuts
        for behavior in DrawnRows.of(cut).behaviors
    ]
    assert [layout for layout, _ in rows_in(whole)] == sorted(expected)


def test_at_the_level_of_waves_spoken_runs_are_utterances(corpus, chat, frames, draw):
    cut = corpus.cut(4, seconds=4.0, text="a b c d e f g h")
    cuts = draw([cut, *corpus.cuts(2)])
    wave = MTBIDataset(chat, frames, 1000, replace(ALWAYS, level="wave", probability=0.7))
    batch, embedded = wave[cuts], replace_level(wave)[cuts]
    assert len(batch.audio) == len(batch.cut_ids) > 3 and set(batch.cut_ids) == set(embedded.cut_ids)
    assert batch.stats == embedded.stats and batch.stats["interleaved_rows"] > 5
    assert batch.frame_lengths.tolist() == [frames(n) for n in batch.audio_lengths.tolist()]
    # every frame of every piece is heard, and each row hears a run of frames, from its first piece to its last
    heard = [[-v - 1 for v in layout if v < 0] for layout, _ in rows_in(batch)]
    assert {frame for row in heard for frame in row} == set(range(int(batch.frame_lengths.sum())))
    assert all(row == list(range(row[0], row[0] + len(row))) for row in heard if row)
    # each piece is cut out of the utterance
    sources = {cut.id: load_samples(cut, frames) for cut in cuts}
    for piece, length, name in zip(batch.audio, batch.audio_lengths.tolist(), batch.cut_ids, strict=True):
        source, head = sources[name], piece[: min(length, 32)]
        starts = (source.unfold(0, len(head), 1) == head).all(1).nonzero().flatten().tolist()
        assert any(torch.equal(source[start : start + length], piece[:length]) for start in starts)


def replace_level(dataset):
    config = replace(dataset.interleave, level="embedding")
    return MTBIDataset(dataset.chat, dataset.frames, dataset.micro_batch_tokens, config)


def test_a_schedule_follows_the_passes(corpus, chat, frames, draw):
    config = InterleaveConfig(0.0, schedule=InterleaveSchedule(epochs=2, probability=1.0))
    dataset = MTBIDataset(chat, frames, 1000, config)
    cuts = corpus.cuts(8)
    counts = [dataset[draw(cuts, epoch=epoch)].stats.get("interleaved_rows", 0) for epoch in range(4)]
    assert counts[0] == 60 and 15 < counts[1] < 45 and counts[2:] == [0, 0]  # two cuts have a single word


def test_rows_for_validation(corpus, chat, frames, draw):
    cuts = draw(corpus.cuts(3))
    batch = MTBIDataset(chat, frames, 200, with_rows=True)[cuts]
    assert len(batch.rows) == 30
    row = batch.rows[10]
    assert (row.utterance, row.cut_id, row.task, row.transcript) == (1, "cut-001", "transcribe", "w1x0 w1x1")
    assert list(row.prompt) == chat.prompt(row.instruction, [-(f + 1) for f in range(int(batch.frame_lengths[1]))])
    assert row.reference == "transc" and not row.truncated and batch.rows[19].truncated


def test_stereo_is_mixed_down_and_other_rates_are_resampled(corpus, chat, frames, draw):
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 8000))
    stereo = corpus.cut(1, samples=np.stack([left, right], 1), text="a")
    assert torch.allclose(load_samples(stereo, frames), torch.from_numpy((left + right) / 2).float(), atol=1e-6)
    slow = corpus.cut(2, rate=8000, seconds=1.0, text="a")
    assert len(load_samples(slow, frames)) == 16_000


def nan(n=16_000):
    samples = np.zeros(n)
    samples[100:200] = np.nan
    return samples


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage(corpus, kind):
    """A cut that looks right in the manifest, with audio that is not."""
    samples = {"silent": np.zeros(16_000), "not_finite": nan()}.get(kind)
    cut = corpus.cut(9, seconds=1.0, samples=samples)
    path = corpus.folder / "cut-009.wav"
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("this is no audio")
    elif kind == "truncated":
        truncate(path)
    elif kind == "0 bytes":
        path.write_bytes(b"")
    elif kind == "0 samples":
        corpus.audio("cut-009", np.zeros(0))
    return cut


BAD = {
    "silent": "silent",
    "not_finite": "not_finite",
    "missing": "unreadable",
    "text": "unreadable",
    "truncated": "unreadable",
    "0 bytes": "unreadable",
    "0 samples": "unreadable",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_audio_is_one_clear_error_or_a_counted_skip(corpus, chat, frames, draw, kind):
    cuts = draw([corpus.cut(1), damage(corpus, kind), corpus.cut(2)], rows_per_cut=2)
    with pytest.raises(BadAudioError, match="(?s)cut-009.*on_bad_audio: skip") as caught:
        MTBIDataset(chat, frames, 200)[cuts]
    assert caught.value.reason == BAD[kind] and len(str(caught.value)) < 1500
    skipping = MTBIDataset(chat, frames, 200, on_bad_audio="skip")
    batch = skipping[cuts]
    assert batch.skipped == {BAD[kind]: 1}
    assert batch.cut_ids == ["cut-001", "cut-002"]
    assert rows_in(batch) == rows_in(skipping[[cuts[0], cuts[2]]])


def test_a_missing_library_is_no_bad_audio(corpus, chat, frames, draw, monkeypatch):
    """Lhotse reports it by a RuntimeError on every cut: skipping them all would train on nothing."""

    def fail(*args, **kwargs):
        raise RuntimeError("Please install torchaudio and try again.")

    cuts = draw([corpus.cut(1)])
    monkeypatch.setattr("lhotse.audio.recording.Recording.load_audio", fail)
    with pytest.raises(RuntimeError, match="Please install torchaudio"):
        MTBIDataset(chat, frames, 200, on_bad_audio="skip")[cuts]


def test_a_batch_of_bad_cuts_is_an_empty_step(corpus, chat, frames, draw):
    batch = MTBIDataset(chat, frames, 200, on_bad_audio="skip")[draw([damage(corpus, "silent")])]
    assert (batch.num_targets, batch.microbatches, batch.skipped) == (0, [], {"silent": 1})


def test_the_counts_of_the_drawing_reach_the_batch(corpus, chat, frames, draw):
    cuts = draw([corpus.cut(1), corpus.cut(2, text="")], on_bad_audio="skip")
    assert MTBIDataset(chat, frames, 200)[cuts].skipped == {"no_transcript": 1}


def test_settings_are_checked(chat, frames):
    with pytest.raises(ValueError, match="on_bad_audio is .*; it must be raise or skip"):
        MTBIDataset(chat, frames, 200, on_bad_audio="ignore")
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        MTBIDataset(chat, frames, 0)
