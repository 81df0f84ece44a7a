# SPDX-License-Identifier: Apache-2.0
import json
import pickle

import pytest
from hf_models import SENTENCES, STYLES, hf_config, hf_tokenizer

from nemo_mtbi.data.hf_tokenizer import HFTokenizer


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
