# SPDX-License-Identifier: Apache-2.0
"""The ``data:`` section: what is refused, and that nothing is made twice."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from lhotse import CutSet

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.config.model import parse_model_config
from nemo_mtbi.data.behaviors import check_provenance, read_behaviors
from nemo_mtbi.demo import recipe
from nemo_mtbi.demo.recipe import DataConfig, load_pool, parse_data_config
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.targets.tasks import TaskPool

POOL = {
    "tasks": [
        {"name": "transcribe", "scoring": "wer", "split": "train", "prompts": {"train": ["say it", "repeat it"]}},
        {"name": "who", "scoring": "exact", "split": "train", "prompts": {"train": ["who"], "heldout": ["name it"]}},
        {"name": "first", "scoring": "exact", "split": "heldout", "prompts": {"train": ["first word"]}},
    ]
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Fake recordings: a tone for each digit of three speakers."""
    folder = tmp_path_factory.mktemp("digits") / "recordings"
    folder.mkdir()
    times = np.arange(2400) / 8000
    for number, speaker in enumerate(("ann", "bob", "eve")):
        for digit in range(10):
            for index in (0, 5):
                tone = 0.3 * np.sin(2 * np.pi * (300 + 40 * digit + 500 * number) * times)
                soundfile.write(folder / f"{digit}_{speaker}_{index}.wav", tone, 8000)
    return folder.parent


@pytest.fixture
def small(tmp_path):
    """``small(**changes)``: the section of a corpus of a few utterances."""
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(POOL))
    sizes = {"train_utterances": 5, "validation_utterances": 2, "test_utterances": 3, "tasks_per_cut": 1}
    common = {"cache_dir": str(tmp_path / "cache"), "tasks": str(tmp_path / "tasks.yaml"), **sizes}
    return lambda **changes: parse_data_config({**common, **changes})


@pytest.fixture
def asked(monkeypatch):
    """Every batch that the text LLM is asked."""
    batches, answer = [], Responder.layouts

    def count(self, layouts, *args, **kwargs):
        batches.append(len(layouts))
        return answer(self, layouts, *args, **kwargs)

    monkeypatch.setattr(Responder, "layouts", count)
    return batches


def prepare(config, model):
    """The model's section is checked before, as training does it."""
    return recipe.prepare(config, parse_model_config(model))


def section(model_section):
    values = model_section()
    return {name: values[name] for name in ("pretrained_asr", "pretrained_llm", "generation")}


# Checks ------------------------------------------------------------


def test_an_empty_section_is_the_synthetic_corpus():
    assert parse_data_config({}) == DataConfig()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"train_uterances": 5}, "unknown key data.train_uterances: did you mean 'train_utterances'"),
        ({"adapt": {"step": 5}}, "unknown key data.adapt.step: did you mean 'steps'"),
        ({"targets": "gold"}, "data.targets is 'gold'; it must be behavior or reference"),
        ({"targets": "reference", "reference_format": "so"}, "data.reference_format is 'so'; it must hold {} once"),
        ({"reference_format": "so {}"}, "data.reference_format words right answers: remove it, or set data.targets"),
        ({"kind": "tts"}, "data.kind is 'tts'; it must be synthetic or digits"),
        ({"train_utterances": "many"}, "data.train_utterances: Value 'many'"),
        ({"train_utterances": 0}, "data.train_utterances is 0; it must be at least 1"),
        ({"test_utterances": -3}, "data.test_utterances is -3"),
        ({"tasks_per_cut": 0}, "data.tasks_per_cut is 0"),
        ({"adapt": {"steps": -1}}, "data.adapt.steps is -1; it must be at least 0"),
        ({"heldout_speakers": "theo"}, "data.heldout_speakers: "),
        ({"heldout_speakers": ["theo"]}, "data.heldout_speakers belongs to kind: digits"),
        ({"digits_dir": "somewhere"}, "data.digits_dir belongs to kind: digits"),
        ({"synthetic_utterances": 5}, "data.synthetic_utterances belongs to kind: digits"),
        ({"synthetic_utterances": -5}, "data.synthetic_utterances is -5; it must be at least 0"),
        ({"kind": "digits"}, "data.digits_dir is missing: give a clone of the Free Spoken Digit Dataset"),
        ({"kind": "digits", "digits_dir": "???"}, "data.digits_dir is missing: give a clone of the Free Spoken Digit"),
        ({"kind": "digits", "digits_dir": "/nowhere"}, "no recordings such as 7_theo_0.wav in /nowhere"),
    ],
)
def test_what_makes_no_sense_is_named(given, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_data_config(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("speakers", [[], ["nobody"], ["ann", "nobody"], ["ann", "bob", "eve"]])
def test_some_but_not_all_speakers_must_be_held_out(clone, speakers):
    with pytest.raises(ValueError, match="name some, not all, of ann, bob, eve"):
        parse_data_config({"kind": "digits", "digits_dir": str(clone), "heldout_speakers": speakers})


def test_all_tasks_are_a_legal_choice():
    assert parse_data_config({"tasks_per_cut": None}).tasks_per_cut is None


def test_pools_are_files_or_the_demo(tmp_path):
    assert {"transcribe", "continue", "translate"} <= {task.name for task in load_pool("demo").tasks}
    with pytest.raises(ValueError, match="nothing.yaml: cannot read the task pool"):
        load_pool(str(tmp_path / "nothing.yaml"))


# Work ------------------------------------------------------------


def test_a_synthetic_corpus_gets_targets_once(small, model_section, asked):
    pytest.importorskip("espeakng_loader")
    model = section(model_section)
    first = prepare(small(), model)
    train, validation, test = (list(CutSet.from_file(path)) for path in (first.train, first.validation, first.test))
    assert (len(train), len(validation), len(test)) == (5, 2, 3)
    assert all(len(read_behaviors(cut)) == 1 for cut in train)
    for cut in validation:
        assert {behavior.task for behavior in read_behaviors(cut)} == {"transcribe", "who"}  # never the held-out one
    assert {"transcribe", "who", "first"} <= test[0].custom["references"].keys()
    assert first.pretrained_asr == model["pretrained_asr"] and first.pool == TaskPool.from_dict(POOL, "tasks")
    assert sum(asked) == 5 * 1 + 2 * 2

    generation = GenerationConfig(**model["generation"])
    with recipe.text_responder(model["pretrained_llm"], None, generation) as (responder, fingerprint):
        for cut in (*train, *validation):
            check_provenance(cut, {"llm": fingerprint, "chat": responder.chat.fingerprint()})
            for behavior in read_behaviors(cut):
                said = responder.text([(behavior.prompt, cut.supervisions[0].text)])
                assert said == [behavior.response]

    asked.clear()
    files = {path: path.stat().st_mtime_ns for path in Path(first.train).parent.parent.rglob("*.jsonl.gz")}
    assert prepare(small(), model) == first
    assert asked == []
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_some_tasks_are_trained_on_right_answers(small, model_section, asked):
    """What MTBI is compared with: the validation stays on the LLM's own answers to all trained tasks."""
    pytest.importorskip("espeakng_loader")
    found = prepare(small(train_tasks=["transcribe"], targets="reference"), section(model_section))
    for cut in CutSet.from_file(found.train):
        (behavior,) = read_behaviors(cut)
        assert (behavior.task, behavior.response) == ("transcribe", cut.custom["references"]["transcribe"])
        assert behavior.response == cut.supervisions[0].text and behavior.prompt in ("say it", "repeat it")
    for cut in CutSet.from_file(found.validation):
        assert {behavior.task for behavior in read_behaviors(cut)} == {"transcribe", "who"}
    assert sum(asked) == 2 * 2
    worded = small(train_tasks=["transcribe"], targets="reference", reference_format="it says {}, no more")
    for cut in CutSet.from_file(prepare(worded, section(model_section)).train):
        (behavior,) = read_behaviors(cut)
        assert behavior.response == f"it says {cut.supervisions[0].text}, no more"


@pytest.mark.parametrize(
    "names, message", [(["first"], "names first, which the task pool holds out"), (["frst"], "no task frst in")]
)
def test_tasks_that_can_not_be_trained_on(small, names, message):
    with pytest.raises(ValueError, match=message):
        prepare(small(train_tasks=names), {"pretrained_asr": "demo", "pretrained_llm": "demo"})


def test_a_cut_without_a_right_answer(tmp_path, small):
    from lhotse import MonoCut, SupervisionSegment

    from nemo_mtbi.targets.plan import TargetPlan
    from nemo_mtbi.targets.reference import reference_targets
    from nemo_mtbi.testing import tiny_chat, tiny_tokenizer

    cut = MonoCut("c", 0, 1, 0, supervisions=[SupervisionSegment("c", "r", 0, 1, text="a")])
    cut.custom = {"references": {"transcribe": "a"}}
    pool, chat = TaskPool.from_dict(POOL, "tasks"), tiny_chat(tiny_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="cut c has no right answer to task 'who'.*data.train_tasks"):
        reference_targets([cut], tmp_path / "out", pool=pool, chat=chat, llm="x", plan=TargetPlan())


@pytest.mark.parametrize("change", ["decoding", "tasks", "seed", "llm"])
def test_targets_are_made_anew_where_it_matters(small, model_section, asked, change, clone, tmp_path):
    digits = {"kind": "digits", "digits_dir": str(clone), "heldout_speakers": ["eve"]}
    model = section(model_section)
    first = prepare(small(**digits), model)
    asked.clear()
    if change == "decoding":
        model["generation"] = {"max_new_tokens": 5}
    elif change == "tasks":
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": POOL["tasks"][::-1]}))
    elif change == "seed":
        digits["seed"] = 1
    else:
        from nemo_mtbi.testing import tiny_text_llm

        model["pretrained_llm"] = str(tiny_text_llm(tmp_path / "other", seed=1))
    second = prepare(small(**digits), model)
    assert sum(asked) == 9
    assert second.train != first.train and second.validation != first.validation


def test_two_runs_that_want_the_same_targets_take_turns(small, model_section, asked, tmp_path):
    """The second waits until the first lets go of the lock, and then finds what it wanted."""
    import threading

    from filelock import FileLock

    config, model, held = small(), section(model_section), []
    first = prepare(config, model)
    asked.clear()
    with FileLock(f"{first.train.parent}.lock"):
        second = threading.Thread(target=lambda: held.append(prepare(config, model)))
        second.start()
        second.join(1.0)
        assert second.is_alive() and not held
    second.join(60)
    assert held == [first] and not asked


def test_digits_are_split_by_speaker(small, model_section, clone):
    found = prepare(
        small(kind="digits", digits_dir=str(clone), heldout_speakers=["eve"], train_utterances=12),
        section(model_section),
    )
    speakers = {
        split: {cut.supervisions[0].speaker for cut in CutSet.from_file(getattr(found, split))}
        for split in ("train", "validation", "test")
    }
    assert speakers["train"] == {"ann", "bob"} >= speakers["validation"] and speakers["test"] == {"eve"}
    assert len(list(CutSet.from_file(found.train))) == 12


def test_the_encoder_is_adapted_once(small, model_section, clone, monkeypatch):
    from nemo_mtbi.encoders import ctc
    from nemo_mtbi.speech_llm.pretrained import load_speech_encoder

    config = small(
        kind="digits",
        digits_dir=str(clone),
        heldout_speakers=["eve"],
        train_utterances=8,
        adapt={"steps": 2},
    )
    model = section(model_section)
    first = prepare(config, model)
    before, after = (
        dict(load_speech_encoder(path).named_parameters()) for path in (model["pretrained_asr"], first.pretrained_asr)
    )
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)
    monkeypatch.setattr(ctc, "train_ctc", lambda *args, **kwargs: pytest.fail("it was trained again"))
    assert prepare(config, model) == first


def test_encoder_and_connector_learn_from_synthetic_digits_too(small, model_section, clone, monkeypatch):
    pytest.importorskip("espeakng_loader")
    from nemo_mtbi.encoders import ctc

    seen = []
    monkeypatch.setattr(ctc, "train_ctc", lambda model, cuts, **kwargs: seen.append((cuts, kwargs)))
    adapt = {"steps": 7, "learning_rate": 1e-3, "batch_duration": 9.0}
    digits = dict(kind="digits", digits_dir=str(clone), heldout_speakers=["eve"], adapt=adapt, seed=5)
    found = prepare(small(**digits, synthetic_utterances=4), section(model_section))
    ((cuts, settings),) = seen
    corpora = [[cut.id for cut in CutSet.from_file(path)] for path in cuts]
    assert [len(ids) for ids in corpora] == [5, 4]
    assert settings == {
        "steps": 7,
        "learning_rate": 1e-3,
        "batch_duration": 9.0,
        "seed": 5,
        "spec_augment": True,
    }
    train = list(CutSet.from_file(found.train))
    assert [cut.id for cut in train] == corpora[0] + corpora[1] and all(read_behaviors(cut) for cut in train)
    assert [len(list(CutSet.from_file(path))) for path in (found.validation, found.test)] == [2, 3]
