# SPDX-License-Identifier: Apache-2.0
import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
import target_fakes as fakes
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.data.behaviors import check_provenance, draw_behaviors, read_behaviors, transcript
from nemo_mtbi.targets.generate import read_targets
from nemo_mtbi.targets.progress import row_speed_text
from nemo_mtbi.targets.store import with_behaviors

CHAT, PLAN, POOL, FakeLLM = fakes.CHAT, fakes.PLAN, fakes.POOL, fakes.FakeLLM
answer, content, generate, make_cuts = fakes.answer, fakes.content, fakes.generate, fakes.make_cuts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fakes.undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


def test_every_response_stands_where_it_was_asked(tmp_path):
    counts = Counter()
    paths = generate(tmp_path, counts=counts)
    assert [path.name for path in paths] == [f"cuts-0000{n}.jsonl.gz" for n in range(3)]
    cuts = read_targets(tmp_path)
    assert cuts.is_lazy and [cut.id for cut in cuts] == [f"c{n}" for n in range(10)]
    rows = dropped = 0
    for before, cut in zip(make_cuts(), cuts, strict=True):
        expected = []
        for task, prompt in PLAN.draws(cut.id, PLAN.tasks(POOL)):
            ids, truncated = answer(CHAT.prompt(prompt, CHAT.encode(transcript(before))))
            limit = task.max_new_tokens or PLAN.max_new_tokens
            text, truncated = CHAT.decode(ids[:limit]), truncated or len(ids) > limit
            if text or not truncated:
                row = {"task": task.name, "prompt": prompt, "response": text, "truncated": truncated}
                expected.append({**row, "ids": ids[:limit]} if ids[:limit] else row)
            else:
                dropped += 1
        assert cut.custom["behaviors"] == expected
        assert cut.custom["kept"] == before.custom["kept"] and "behaviors" not in before.custom
        assert cut.supervisions == before.supervisions and cut.recording == before.recording
        rows += len(expected)
    assert counts["rows"] == rows and counts["dropped_empty"] == dropped > 0 and counts["cuts"] == 10
    seen = [row for cut in cuts for row in cut.custom["behaviors"]]
    assert {row["truncated"] for row in seen} == {True, False}
    assert counts["truncated"] == dropped + sum(row["truncated"] for row in seen)
    assert any(row["response"] == "" for row in seen), "an empty answer that ended by itself is an answer"
    assert all(len(row["response"]) <= 4 for row in seen if row["task"] == "keys")


def test_provenance_in_each_cut(tmp_path):
    generate(tmp_path, provenance={"llm": "abc", "precision": "bf16"})
    for cut in read_targets(tmp_path):
        assert cut.custom["behaviors_from"] == {
            "llm": "abc",
            "precision": "bf16",
            "chat": CHAT.fingerprint(),
            "chat_format": {"turn": ["<user>", "{audio}", "|", "{prompt}"], "end": "<end>"},
            "pool": POOL.fingerprint(),
            "decoding": {"method": "greedy", "max_new_tokens": 12},
            "plan": {
                "tasks_per_cut": 3,
                "always_tasks": [],
                "prompts_per_task": 2,
                "split": "all",
                "wordings": "train",
                "seed": 7,
            },
        }
    for wrong in ({}, {"llm": ""}, {"llm": "abc", "chat": "mine"}, {"llm": "abc", "x": object()}):
        with pytest.raises(ValueError, match="provenance must hold"):
            generate(tmp_path, provenance=wrong)


def of_before(value):
    """Targets as they were written before the tokens of answers, the chat format and digests were kept."""
    if isinstance(value, list):
        return [of_before(item) for item in value]
    if isinstance(value, dict):
        return {key: of_before(item) for key, item in value.items() if key not in ("ids", "chat_format", "sha256")}
    return value


def test_targets_of_before_are_read_and_gone_on_with(tmp_path, undisturbed):
    """Finished shards and partial files alike; the answers in them are not asked again."""
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, FakeLLM(fatal=8))
    shards, (partial,) = sorted(tmp_path.glob("cuts-*.gz")), tmp_path.glob("*.partial.jsonl")
    for path in shards:
        with gzip.open(path, "rt") as file:
            cuts = [of_before(json.loads(line)) for line in file]
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(cut) + "\n" for cut in cuts)
    header, *batches = map(json.loads, partial.read_text().splitlines())
    assert shards and batches and header["behaviors_from"]["chat_format"]
    batches = [{**batch, "answers": [answer[:2] for answer in batch["answers"]]} for batch in batches]
    partial.write_text("".join(json.dumps(of_before(item)) + "\n" for item in (header, *batches)))
    counts, llm = Counter(), FakeLLM()
    generate(tmp_path, llm, counts=counts)
    assert len(llm.batches) == undisturbed[1] - 8 and counts["reused_shards"] == len(shards)
    again = generate(tmp_path / "again")
    for path, whole in zip(sorted(tmp_path.glob("cuts-*.gz")), again, strict=True):
        with gzip.open(path, "rt") as file, gzip.open(whole, "rt") as other:
            assert [of_before(json.loads(line)) for line in file] == [of_before(json.loads(line)) for line in other]
    assert len(list(read_targets(tmp_path))) == 10


def test_another_chat_format_is_refused_by_what_differs(tmp_path):
    generate(tmp_path)
    with pytest.raises(RuntimeError, match="made with other chat .They were made with '<user>{audio}.{prompt}', and"):
        generate(tmp_path, chat=ChatFormat(("<user>", "{prompt}", "|", "{audio}"), "<end>", CHAT.tokenizer))


def test_what_training_reads(tmp_path):
    """Some cuts get no usable answer: training leaves these out and does not refuse them."""

    def silent_about_some(batch):
        return [([], True) if ord("3") in layout else ([ord("a")], False) for layout in batch]

    counts = Counter()
    generate(tmp_path, silent_about_some, counts=counts)
    cuts = list(read_targets(tmp_path))
    assert len(cuts) == 10
    for cut in cuts:
        check_provenance(cut, {"llm": fakes.PROVENANCE["llm"], "chat": CHAT.fingerprint()})
        with pytest.raises(ValueError, match="another llm"):
            check_provenance(cut, {"llm": "another"})
        asked = len(PLAN.draws(cut.id, PLAN.tasks(POOL)))
        assert len(read_behaviors(cut)) == asked
        assert len(draw_behaviors(cut, None, 0, 0)) == (0 if cut.id == "c3" else asked)
    assert counts["dropped_empty"] == counts["truncated"] == len(cuts[3].custom["behaviors"]) > 0
    again = Counter()
    generate(tmp_path, silent_about_some, counts=again)
    assert again["reused_shards"] == 3 and again["dropped_empty"] == counts["dropped_empty"]


def test_mixed_cuts_and_old_behaviors(tmp_path):
    cuts = [cut.pad(duration=2.0) for cut in make_cuts(3)]
    cuts[0] = with_behaviors(cuts[0], [{"task": "old"}], {"llm": "old"})
    generate(tmp_path, cuts=iter(cuts))  # a stream that can be read only once
    for cut in read_targets(tmp_path):
        assert type(cut).__name__ == "MixedCut"
        assert cut.custom["behaviors_from"]["llm"] == fakes.PROVENANCE["llm"]
        assert "old" not in [row["task"] for row in cut.custom["behaviors"]]
    assert cuts[0].custom["behaviors"] == [{"task": "old"}]


def test_cuts_without_transcript(tmp_path):
    cuts, counts, llm = make_cuts(texts=["", None, "  "]), Counter(), FakeLLM()
    with pytest.raises(ValueError, match=r"3 of 10 cuts have no transcript \(c0, c1, c2\).*on_missing_text=skip"):
        generate(tmp_path, llm, cuts=cuts)
    assert not llm.batches, "found before the LLM has worked"
    generate(tmp_path, cuts=cuts, on_missing_text="skip", counts=counts)
    assert [cut.id for cut in read_targets(tmp_path)] == [f"c{n}" for n in range(3, 10)]
    assert counts["skipped_no_text"] == 3 and counts["cuts"] == 7
    with pytest.raises(ValueError, match="no cut to make targets for"):
        generate(tmp_path / "none", cuts=make_cuts(3, ["", "", ""]), on_missing_text="skip")


def test_audio_in_memory_is_refused(tmp_path):
    recording = Recording("r", [AudioSource("memory", [0], b"RIFF")], 16000, 16000, 1.0)
    cut = MonoCut("c", 0, 1.0, 0, supervisions=[SupervisionSegment("s", "r", 0, 1.0, text="a")], recording=recording)
    with pytest.raises(ValueError, match="cut c holds its audio"):
        generate(tmp_path, cuts=[cut])


def test_illegal_arguments(tmp_path):
    for wrong in ({"shard_size": 0}, {"on_missing_text": "ignore"}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generate(tmp_path, **wrong)
    with pytest.raises(RuntimeError, match="gave 0 responses to"):
        generate(tmp_path, lambda batch: [])


FOREIGN = {
    "llm": {"provenance": {"llm": "another"}},
    "pool": {"pool": POOL.subset(["say", "keys"])},
    "chat": {"chat": replace(CHAT, turn=("{prompt}", "{audio}"))},
    "plan": {"plan": replace(PLAN, seed=8)},
    "decoding": {"plan": replace(PLAN, max_new_tokens=13)},
    "cuts, transcripts": {"cuts": make_cuts(texts=["another"])},
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("fatal", [1, None], ids=["partial", "finished"])
def test_foreign_work_is_refused_or_replaced(tmp_path, what, fatal):
    try:
        generate(tmp_path / "a", FakeLLM(fatal))
    except KeyboardInterrupt:
        pass
    before = content(tmp_path / "a")
    with pytest.raises(RuntimeError, match=rf"cuts-00000.*made with other .*{what}.*overwrite=true"):
        generate(tmp_path / "a", FakeLLM(fatal=0), **FOREIGN[what])
    assert content(tmp_path / "a") == before
    generate(tmp_path / "a", overwrite=True, **FOREIGN[what])
    generate(tmp_path / "b", **FOREIGN[what])
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_partial_with_other_batches_or_no_header_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, FakeLLM(fatal=2))
    with pytest.raises(RuntimeError, match="batch_tokens"):
        generate(tmp_path, plan=replace(PLAN, batch_tokens=300))
    (tmp_path / "cuts-00000.partial.jsonl").write_text("my notes\n")
    with pytest.raises(RuntimeError, match="overwrite=true"):
        generate(tmp_path)


def test_overwrite_keeps_what_fits(tmp_path, undisturbed):
    """After the LLM ran out of memory: finished shards hold at any batch size."""
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, FakeLLM(fatal=undisturbed[1] - 1))
    counts = Counter()
    generate(tmp_path, plan=replace(PLAN, batch_tokens=60), overwrite=True, counts=counts)
    assert counts["reused_shards"] == 2 and counts["replaced"] == 1
    assert content(tmp_path) == undisturbed[0]


def test_surplus_and_damaged_shards(tmp_path, undisturbed):
    generate(tmp_path, shard_size=3)
    with pytest.raises(RuntimeError, match="cuts-00003.*shard_size"):
        generate(tmp_path)
    generate(tmp_path, overwrite=True)
    assert content(tmp_path) == undisturbed[0]
    path = tmp_path / "cuts-00001.jsonl.gz"
    for damage in (path.read_bytes()[:-20], b"no gzip", gzip.compress(b"{}\n"), gzip.compress(b"[]\n")):
        path.write_bytes(damage)
        with pytest.raises(RuntimeError, match="cuts-00001.*overwrite=true"):
            generate(tmp_path)
        generate(tmp_path, overwrite=True)
        assert content(tmp_path) == undisturbed[0]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_shards(tmp_path, undisturbed, world_size):
    names = []
    for rank in reversed(range(world_size)):
        names += [path.name for path in generate(tmp_path, rank=rank, world_size=world_size)]
        if len(names) < 3:
            with pytest.raises(RuntimeError, match=f"{3 - len(names)} of 3 shards are missing .cuts-00000"):
                read_targets(tmp_path)
    assert sorted(names) == [f"cuts-0000{n}.jsonl.gz" for n in range(3)]
    assert content(tmp_path) == undisturbed[0]


def test_reading_a_mixture_is_refused(tmp_path):
    generate(tmp_path / "a", provenance={"llm": "another"})
    generate(tmp_path / "b")
    (tmp_path / "a" / "cuts-00001.jsonl.gz").replace(tmp_path / "b" / "cuts-00001.jsonl.gz")
    with pytest.raises(RuntimeError, match="cuts-00001.*another run"):
        read_targets(tmp_path / "b")


def test_progress(tmp_path, capsys, undisturbed):
    generate(tmp_path, progress=True)
    assert "10/10 cuts" in capsys.readouterr().out
    assert content(tmp_path) == undisturbed[0]
    assert row_speed_text(30, 20.0, 3725.0) == "1.5 rows/s, 1:02:05 left"
    assert row_speed_text(0, 0.0, 0.0) == "…"
