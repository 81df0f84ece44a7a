# SPDX-License-Identifier: Apache-2.0
"""Conversations of NeMo's layouts: rows by hand, through the loader, and beside utterances."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import loader_sources as sources
import pytest
from lhotse.utils import fastcopy

from nemo_mtbi.chat.format import ChatFormat, Turn
from nemo_mtbi.data.conversations import Conversation, Exchange, as_cut, conversation_row
from nemo_mtbi.data.dataset import MTBIDataset
from nemo_mtbi.data.loader import build_dataloader
from nemo_mtbi.layouts.layout import IGNORE


@pytest.fixture
def several(chat):
    """The format of the tests with further turns: <user> {audio} | {prompt}."""
    return ChatFormat(chat.turn, chat.end, chat.tokenizer, more=("<user>", "{audio}", "|", "{prompt}"))


@pytest.fixture
def dataset(several, frames):
    return MTBIDataset(several, frames, 400)


def ids(text):
    return [ord(c) for c in text]


# Rows ------------------------------------------------------------


def test_a_conversation_by_hand(several):
    turns = [Turn(((-1, -2), "go"), "ok"), Turn(("a", (-3,), "b"), "x")]
    layout, labels = several.conversation(turns)
    first = [1, -1, -2, *ids("|go")]
    second = [1, *ids("a|"), -3, *ids("|b")]
    whole = [*first, *ids("ok"), 2, *second, *ids("x"), 2]
    assert layout == whole[:-1]
    said = [*([IGNORE] * len(first)), *ids("ok"), 2, *([IGNORE] * len(second)), *ids("x"), 2]
    assert labels == said[1:]


def test_a_single_turn_is_a_row(several):
    layout, labels = several.conversation([Turn(((-1, -2), "go"), "ok")])
    prompt = several.prompt("go", [-1, -2])
    assert layout == [*prompt, *ids("ok")] and labels == [*([IGNORE] * (len(prompt) - 1)), *ids("ok"), 2]


def test_what_is_no_conversation(chat, several):
    with pytest.raises(ValueError, match="needs turns"):
        several.conversation([])
    with pytest.raises(ValueError, match="something that the user says"):
        several.conversation([Turn((), "ok")])
    with pytest.raises(ValueError, match="has 2 turns, but the chat format of this LLM has one"):
        chat.conversation([Turn(("a",), "b")] * 2)


def test_the_twin_reads_the_transcripts(corpus, several):
    cuts = corpus.cuts(2)
    conversation = Conversation("c", (Exchange((cuts[0], "go"), "ok"), Exchange(("then", cuts[1]), "well")))
    row = conversation_row(conversation, several, [3, 2], 4, twin=True)
    assert row.utterance == 4 and row.pieces == 2 and row.twin.utterance is None
    assert [value for value in row.layout if value < 0] == [-1, -2, -3, -4, -5]
    texts = [cut.supervisions[0].text for cut in cuts]
    read = several.conversation(
        [Turn((tuple(ids(texts[0])), "go"), "ok"), Turn(("then", tuple(ids(texts[1]))), "well")]
    )
    assert (list(row.twin.layout), list(row.twin.labels)) == read and row.twin.response == row.response
    silent = fastcopy(cuts[1], supervisions=[])
    with pytest.raises(ValueError, match="has no transcript of cut-001"):
        conversation_row(Conversation("c", (Exchange((silent,), "ok"),)), several, [2], 0, twin=True)


# NeMo's layouts ------------------------------------------------------------


def user(kind, value, **more):
    return {"from": "User", "type": kind, "value": value, **more}


def assistant(value):
    return {"from": "Assistant", "type": "text", "value": value}


@pytest.fixture
def spoken(corpus):
    """Paths of two recordings, of 0.6 and 1.79 seconds."""
    return [cut.recording.sources[0].source for cut in corpus.cuts(2)]


def multimodal(corpus, spoken):
    """Text alone, one audio, several audios in two turns."""
    first, second = (dict(value=path, duration=seconds) for path, seconds in zip(spoken, (0.6, 1.79), strict=True))
    lines = [
        {"id": "text", "conversations": [user("text", "hello"), assistant("hi")]},
        {"id": "one", "conversations": [user("text", "what?"), user("audio", **first), assistant("a")]},
        {
            "id": "two",
            "conversations": [
                user("audio", **first),
                user("text", "or"),
                user("audio", **second),
                assistant("both"),
                user("text", "why"),
                assistant("so"),
            ],
        },
    ]
    path = corpus.folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"type": "multimodal_conversation", "manifest_filepath": str(path), "audio_locator_tag": "<audio>"}


def sharegpt(corpus, spoken):
    turns = [
        {"from": "human", "value": "<sound>\nwhat is it?"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "sure?"},
        {"from": "gpt", "value": "yes"},
    ]
    path = corpus.folder / "sharegpt.jsonl"
    path.write_text(json.dumps({"id": "share", "sound": spoken[1], "conversations": turns}) + "\n")
    return {
        "type": "share_gpt",
        "manifest_filepath": str(path),
        "audio_locator_tag": "<audio>",
        "audio_placeholders": "<sound>",
    }


def read(dataset, *entries, train=False, **keys):
    return build_dataloader({"input_cfg": list(entries), "batch_size": 8, **keys}, dataset, train=train)


def test_nemos_own_layout(corpus, spoken, several, frames):
    dataset = MTBIDataset(several, frames, 400, with_rows=True)
    (batch,) = read(dataset, multimodal(corpus, spoken))
    counts = [frames(9600), frames(28640)]
    assert batch.frame_lengths.tolist() == [counts[0], *counts] and batch.stats == {"conversations": 3}
    assert batch.num_targets == 3 + 2 + 5 + 3  # with the ends
    assert [(row.cut_id, row.task, row.reference) for row in batch.rows] == [
        ("text", "conversation", "hi"),
        ("one", "conversation", "a"),
        ("two", "conversation", "so"),
    ]
    asked = [1, *ids("what?|"), *range(-1, -counts[0] - 1, -1)]
    assert list(batch.rows[1].prompt) == asked
    assert batch.rows[2].instruction == "why" and list(batch.rows[2].prompt)[-4:] == [1, *ids("why")]


def test_sharegpt(corpus, spoken, several, frames):
    dataset = MTBIDataset(several, frames, 400, with_rows=True)
    (batch,) = read(dataset, sharegpt(corpus, spoken))
    assert batch.cut_ids == ["share"] and batch.frame_lengths.tolist() == [frames(28640)]
    assert [row.reference for row in batch.rows] == ["yes"] and batch.num_targets == 2 + 4


def test_a_batch_of_text_alone(corpus, several, frames):
    line = {"id": "t", "conversations": [user("text", "hello"), assistant("hi")]}
    path = corpus.folder / "text.jsonl"
    path.write_text(json.dumps(line) + "\n")
    entry = {"type": "multimodal_conversation", "manifest_filepath": str(path), "audio_locator_tag": "<audio>"}
    (batch,) = read(MTBIDataset(several, frames, 400), entry)
    assert batch.num_frames == 0 and batch.num_targets == 3 and batch.twins == []


def test_conversations_beside_utterances(corpus, spoken, dataset):
    """Mixed batches of text, speech and both; the costs are those of their rows."""
    plain = {"type": "lhotse", "cuts_path": corpus.jsonl(corpus.cuts(6)), "weight": 0.5}
    entries = [plain, {**multimodal(corpus, spoken), "weight": 0.5}]
    loader = read(dataset, *entries, train=True, rows_per_cut=2, batch_size=None, batch_tokens=400,
                  force_iterable_dataset=True, seed=3, shuffle=True)  # fmt: skip
    seen, conversations = Counter(), 0
    for batch in islice(loader, 30):
        seen.update(batch.cut_ids)
        conversations += batch.stats.get("conversations", 0)
        rows = sum(int(micro.lengths.sum()) for micro in batch.microbatches)
        assert rows <= 400
    assert conversations > 10 and {"two", "cut"} <= {name[:3] for name in seen}


def test_the_order_of_a_stream_of_conversations_is_that_of_its_seed(corpus, spoken, dataset):
    entry = multimodal(corpus, spoken)
    one, two = (
        [sources.content(batch) for batch in islice(read(dataset, entry, train=True, seed=5, shuffle=True), 5)]
        for _ in range(2)
    )
    assert one == two


@pytest.mark.parametrize(
    "turns, message",
    [
        (
            [{"from": "System", "type": "text", "value": "be brief"}, user("text", "a"), assistant("b")],
            "model.chat.system",
        ),
        ([assistant("b")], "must begin with the user"),
        ([user("text", "a")], "must begin with the user and end with the assistant"),
    ],
)
def test_conversations_that_are_refused(corpus, dataset, turns, message):
    path = corpus.folder / "bad.jsonl"
    path.write_text(json.dumps({"id": "bad", "conversations": turns}) + "\n")
    entry = {"type": "multimodal_conversation", "manifest_filepath": str(path), "audio_locator_tag": "<audio>"}
    with pytest.raises(ValueError, match=message):
        list(read(dataset, entry))


def test_the_assistant_does_not_speak(corpus):
    cut = corpus.cut(0)
    turns = [SimpleNamespace(role="user", value="say it"), SimpleNamespace(role="assistant", cut=cut)]
    with pytest.raises(ValueError, match="assistant in conversation c is audio: answers are text"):
        as_cut(SimpleNamespace(id="c", turns=turns), 16000)


@pytest.mark.parametrize("key", ["perturb_speed", "lowpass_enabled", "clipping_enabled"])
def test_changes_of_the_sound_are_for_utterances(corpus, spoken, dataset, key):
    with pytest.raises(ValueError, match=f"{key} is for utterances, and text.* is a conversation"):
        next(iter(read(dataset, multimodal(corpus, spoken), train=True, **{key: True})))


def test_text_alone_lasts_no_time(corpus, spoken, dataset):
    (batch,) = read(dataset, multimodal(corpus, spoken), min_duration=1.0)
    assert batch.stats == {"conversations": 2} and batch.skipped == {"shorter_than_min_duration": 1}


def test_a_bad_audio_leaves_the_conversation_out(corpus, spoken, several, frames):
    entry = multimodal(corpus, spoken)
    Path(spoken[1]).write_bytes(Path(spoken[0]).read_bytes()[:200])
    lenient = MTBIDataset(several, frames, 400, on_bad_audio="skip")
    (batch,) = read(lenient, entry)
    assert batch.stats == {"conversations": 2} and batch.skipped == {"too_short": 1}
