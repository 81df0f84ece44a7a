# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import shutil

import pytest
from hf_models import SENTENCES, STYLES, hf_config, hf_tokenizer

from nemo_mtbi.chat.hf_tokenizer import HFTokenizer


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request, tmp_path_factory):
    return HFTokenizer(hf_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param))


def test_text_comes_back(tokenizer):
    for text in (*SENTENCES, "naïve 東京\n\nx", "  two  spaces"):
        assert tokenizer.ids_to_text(tokenizer.text_to_ids(text)) == text


def test_nothing_is_added_and_control_tokens_are_known(tokenizer):
    ids = tokenizer.text_to_ids("the fox")
    control = [tokenizer.token_to_id(name) for name in tokenizer.control_tokens]
    assert ids and not set(ids) & set(control)
    assert tokenizer.token_to_id(tokenizer.end) in control and tokenizer.token_to_id("the") is None
    assert tokenizer.ids_to_text([*ids, *control]) == "the fox"


def test_the_name_of_a_control_token_in_a_text_is_text(tokenizer):
    text = f"say {tokenizer.end} and stop"
    ids = tokenizer.text_to_ids(text)
    assert tokenizer.token_to_id(tokenizer.end) not in ids
    assert tokenizer.ids_to_text(ids) == text


def test_pickles(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).text_to_ids("the fox") == tokenizer.text_to_ids("the fox")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer in .* can't be read"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    hf_config(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="the tokenizer in .* can't be read"):
        HFTokenizer(tmp_path)


def test_code_in_the_folder_is_not_run(tmp_path):
    hf_tokenizer(tmp_path, "chatml")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('this code was run')")
    try:
        HFTokenizer(tmp_path)  # some versions fall back to a class of their own
    except ValueError as error:
        assert "can't be read" in str(error)


@pytest.mark.parametrize("family, style", [("qwen2", "chatml"), ("qwen3", "chatml"), ("llama", "headers")])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path, family, style):
    """The classes of some families would begin with an empty one."""
    hf_config(hf_tokenizer(tmp_path, style), family)
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocabulary.json")
    with pytest.raises(ValueError, match="lacks tokenizer.json .or tokenizer.model, or vocab.json and merges.txt"):
        HFTokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks tokenizer.json"):
        HFTokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="has no vocabulary|can't be read"):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize("key", ["eos_token", "bos_token", "pad_token"])
def test_a_control_token_that_the_vocabulary_lacks_is_refused(tmp_path, key):
    """It would be appended, with the id of an embedding that was never trained."""
    path = hf_tokenizer(tmp_path, "chatml") / "tokenizer_config.json"
    size = HFTokenizer(tmp_path).vocab_size
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "<|new|>"}))
    with pytest.raises(ValueError, match="names '<.new.>' in tokenizer_config.json .* has no such token"):
        HFTokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|new|>": size}))  # as those have it that were resized
    assert HFTokenizer(tmp_path).token_to_id("<|new|>") == size


def test_a_control_token_that_a_sentencepiece_model_lacks_is_refused(tmp_path):
    from nemo_mtbi.speech_llm.pretrained import DEMO

    shutil.copy(DEMO / "llm" / "tokenizer.model", tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert HFTokenizer(tmp_path).end_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    with pytest.raises(ValueError, match="names '<.im_end.>' in .*, but tokenizer.model has no such token"):
        HFTokenizer(tmp_path)
