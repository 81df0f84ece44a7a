# SPDX-License-Identifier: Apache-2.0
"""Text LLMs straight from Hugging Face directories: they answer here as they answer there."""

import json
import shutil

import pytest
import torch
from hf_models import hf_llm, hf_tokenizer
from safetensors.torch import load_file, save_file

from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.io import file_digests
from nemo_mtbi.llm.directory import HFDirectory, OwnDirectory, open_text_llm
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.pretrained import find_text_llm, load_text_llm

LLMS = {"qwen2": "chatml", "llama": "headers", "mistral": "brackets"}
QUESTIONS = [
    ("Answer in one word.", "the quick fox"),
    ("Repeat it!", "she sells"),
    ("What is the last word?", "lazy dog"),
]
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    groups.initialize()
    folder = tmp_path_factory.mktemp("hf")
    for family, style in LLMS.items():
        hf_llm(folder / family, family, style)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(folder / "qwen2", tmp_path / "copy")


@torch.no_grad()
def expected(path):
    """What Hugging Face answers to a chat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    answers = []
    for prompt, text in QUESTIONS:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{prompt}\n{text}"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_chats_are_answered_as_hugging_face_answers_them(folder, family):
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.respond import Responder
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder

    found = load_text_llm(folder / family)
    responder = Responder(LayoutDecoder(found.chunks), found.chat, GenerationConfig(NEW))
    answers = responder.text(QUESTIONS)
    assert answers == expected(folder / family) and len(set(answers)) == len(QUESTIONS)


@pytest.mark.parametrize("family", LLMS)
def test_settings_and_tokenizer_are_a_directory_of_ours(folder, family, tmp_path):
    """As they lie in a ``.nemo``: without the weights, and read by the other class."""
    theirs = load_text_llm(folder / family)
    for name, content in theirs.texts.items():
        (tmp_path / name).write_bytes(content)
    ours = open_text_llm(tmp_path)
    assert isinstance(ours, OwnDirectory) and ours.missing() == ["model.safetensors"]
    assert ours.architecture == theirs.decoder.architecture
    chat = ours.chat()
    assert (chat.turn, chat.end) == (theirs.chat.turn, theirs.chat.end)
    for prompt, text in QUESTIONS:
        assert chat.prompt(prompt, [-1]) == theirs.chat.prompt(prompt, [-1])
        assert chat.encode(text) == theirs.chat.encode(text)
    asked = ours.chat(ChatConfig(audio="before"))
    assert asked.turn.index("{audio}") < asked.turn.index("{prompt}")
    assert ours.texts(chat) == theirs.texts


# ------------------------------------------------------------------------------------------------- end tokens


def set_ends(path, **ends):
    """Writes ``eos_token_id`` of the files that are named."""
    for name, value in ends.items():
        file = path / f"{name}.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, "eos_token_id": value}))


def test_answers_end_where_hugging_face_ends_them(copy):
    """At each token of a list, and not as one that was cut off."""
    from transformers import AutoModelForCausalLM

    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.respond import Responder
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder

    def theirs(ids):
        model = AutoModelForCausalLM.from_pretrained(copy).eval()
        given = torch.tensor([ids])
        return model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()

    layout = open_text_llm(copy).chat().prompt("say it", "the quick brown fox")
    first = open_text_llm(copy).chat().end_id
    ends = [first, theirs(layout)[5]]
    set_ends(copy, generation_config=ends)
    wanted, found = theirs(layout), load_text_llm(copy)
    assert wanted[-1] == ends[1] and len(wanted) < NEW
    (answer,) = Responder(LayoutDecoder(found.chunks), found.chat, GenerationConfig(NEW)).layouts([layout])
    assert (answer.ids, answer.truncated) == (wanted[:-1], False)
    assert found.chat.response("the fox")[-1] == first  # what the template puts behind an answer is learned


def test_all_end_tokens_of_all_files_count(copy):
    set_ends(copy, config=7, generation_config=[2, 9, 7, -1, 10**6])
    chat = open_text_llm(copy).chat()
    assert chat.end_ids == (chat.end_id, *sorted({7, 9, 2} - {chat.end_id}))
    hf_tokenizer(copy, "chatml")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    chat = open_text_llm(copy).chat()
    assert chat.end == "<|im_end|>" and chat.tokenizer.token_to_id("<|endoftext|>") in chat.ends
    (copy / "generation_config.json").unlink()
    assert 7 in open_text_llm(copy).chat().ends


@pytest.mark.parametrize("wrong", ["2", [2, "x"], 1.5, True])
def test_malformed_end_tokens_name_their_file(copy, wrong):
    set_ends(copy, generation_config=wrong)
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is .* id of a token, or a list of ids"):
        open_text_llm(copy).chat()


def test_end_tokens_are_written_down_and_older_settings_read(copy, tmp_path):
    """Settings of before do not say them: the files beside them do."""
    set_ends(copy, config=[7, 9])
    chat = open_text_llm(copy).chat()
    ours = tmp_path / "ours"
    ours.mkdir()
    for name, content in open_text_llm(copy).texts(chat).items():
        (ours / name).write_bytes(content)
    settings = (ours / "llm.yaml").read_text()
    assert OwnDirectory(ours).chat().end_ids == chat.end_ids
    assert OwnDirectory(ours).chat().fingerprint() == chat.fingerprint()
    assert "  ends:\n  - 7\n  - 9\n" in settings
    (ours / "llm.yaml").write_text(settings.replace("  ends:\n  - 7\n  - 9\n", ""))
    assert OwnDirectory(ours).chat().end_ids == chat.end_ids
    (ours / "llm.yaml").write_text(settings.replace("  - 9\n", "  - 9999\n"))
    with pytest.raises(ValueError, match="llm.yaml: chat.ends is .*a list of ids below 512"):
        OwnDirectory(ours).chat()


def test_another_chat_is_written_down(folder):
    found = load_text_llm(folder / "qwen2", weights=False, chat=ChatConfig(system="Be brief."))
    assert b"Be brief." in found.texts["llm.yaml"]
    assert found.fingerprint == load_text_llm(folder / "qwen2", weights=False).fingerprint
    assert found.chat.fingerprint() != load_text_llm(folder / "qwen2", weights=False).chat.fingerprint()


def test_the_fingerprint_tells_every_part(copy):
    seen = {open_text_llm(copy).fingerprint}

    def nudge():
        weights = load_file(copy / "model.safetensors")
        weights["model.norm.weight"][3] += 0.01
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    def stretch():
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))

    def greet():
        (copy / "chat_template.jinja").write_text("Hi. " + (copy / "chat_template.jinja").read_text())

    for change in (nudge, stretch, greet):
        change()
        found = open_text_llm(copy).fingerprint
        assert found not in seen
        seen.add(found)


def test_of_large_files_samples_are_hashed(copy, monkeypatch):
    """Every sample of a whole file counts, and so does its length."""
    whole = open_text_llm(copy).fingerprint
    monkeypatch.setattr(file_digests, "HASHED_BYTES", 1000)
    monkeypatch.setattr(file_digests, "_BLOCK", 64)
    monkeypatch.setattr(file_digests, "_SAMPLES", 16)
    path = copy / "model.safetensors"
    content, sampled = path.read_bytes(), open_text_llm(copy).fingerprint
    assert sampled != whole and open_text_llm(copy).fingerprint == sampled
    step = len(content) // 16
    for position in (3 * step, 15 * step + 63):  # within the first bytes of a sixteenth
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert open_text_llm(copy).fingerprint != sampled
    path.write_bytes(content + b"\0")
    assert open_text_llm(copy).fingerprint != sampled


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_files_are_named(copy, name):
    (copy / name).unlink()
    wanted = {"config.json": "llm.yaml"}.get(name, name)
    with pytest.raises(ValueError, match=f"lacks {wanted}; .*neither one of ours nor of Hugging Face"):
        find_text_llm(copy)


def test_missing_shards_and_tokenizers_are_named(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    for path in list(copy.glob("tokenizer*")) + [copy / "chat_template.jinja"]:
        path.unlink()
    with pytest.raises(ValueError, match="lacks one.safetensors, tokenizer.json"):
        find_text_llm(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json can't be read .*copy it again"):
        find_text_llm(copy)


def test_weights_of_another_format_are_named(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="lacks model.safetensors .there is pytorch_model.bin, .*convert it"):
        find_text_llm(copy)


@pytest.mark.parametrize("family", LLMS)
def test_settings_of_a_tokenizer_are_not_a_tokenizer(folder, family, tmp_path):
    """Neither in a directory of theirs nor in one of ours."""
    theirs, ours = shutil.copytree(folder / family, tmp_path / "theirs"), tmp_path / "ours"
    shutil.copytree(theirs, ours)
    for name, content in load_text_llm(theirs, weights=False).texts.items():
        (ours / name).write_bytes(content)
    for path in (theirs, ours):
        (path / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match="lacks tokenizer.json"):
            find_text_llm(path)


def test_a_tokenizer_of_another_llm_is_refused(copy):
    hf_tokenizer(copy, "chatml", vocabulary=700)
    config = json.loads((copy / "config.json").read_text())
    size = open_text_llm(copy).tokenizer.vocab_size if isinstance(open_text_llm(copy), HFDirectory) else 0
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": size - 1}))
    with pytest.raises(ValueError, match=f"the tokenizer has {size} tokens, but the LLM embeds {size - 1}"):
        open_text_llm(copy).chat()


def test_a_base_model_needs_a_format(copy):
    (copy / "chat_template.jinja").unlink()
    hf_tokenizer(copy, "chatml", template="")
    with pytest.raises(ValueError, match="copy: the tokenizer has no chat template: name a prompt format"):
        load_text_llm(copy)
    assert load_text_llm(copy, chat=ChatConfig(format="qwen")).chat.end == "<|im_end|>"
