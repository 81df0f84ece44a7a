# SPDX-License-Identifier: Apache-2.0
"""The parts of a chat format give the ids that the LLM's own template, and NeMo's formatter, give."""

import pytest
from hf_models import DATED, SENTENCES, STYLES, hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.data.chat import Turn
from nemo_mtbi.data.chat_template import ChatConfig, chat_format
from nemo_mtbi.data.hf_tokenizer import HFTokenizer
from nemo_mtbi.data.layout import IGNORE

FORMATTERS = {"chatml": "qwen", "headers": "llama3", "brackets": "llama2"}
WORDS = st.lists(st.sampled_from(" ".join(SENTENCES).split()), min_size=1, max_size=8)
LETTERS = st.lists(st.sampled_from(["the", "quick", "fox", "Naïve", "12", "don't"]), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {style: HFTokenizer(hf_tokenizer(tmp_path_factory.mktemp(style), style)) for style in STYLES}


def by_template(tokenizer, content, system=None):
    """Ids of a user's turn by Hugging Face."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": content})
    ids = tokenizer.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    return ids if isinstance(ids, list) else ids["input_ids"]


def flat(pieces):
    return [token for piece in pieces for token in piece]


@given(prompt=WORDS, words=WORDS, system=st.sampled_from([None, "Be brief."]))
@settings(max_examples=60, deadline=None)
def test_text_twins_have_the_ids_of_the_template(tokenizers, prompt, words, system):
    for style in ("chatml", "headers"):
        chat = chat_format(tokenizers[style], ChatConfig(system=system))
        found = chat.prompt(" ".join(prompt), flat(chat.encode_words(words)))
        assert found == by_template(tokenizers[style], f"{' '.join(prompt)}\n{' '.join(words)}", system), style


@given(prompt=WORDS, words=LETTERS)
@settings(max_examples=60, deadline=None)
def test_speech_before_the_instruction(tokenizers, prompt, words):
    """A mark at the end of the speech would melt with the separator: as text only, so there it is left out."""
    for style in ("chatml", "headers"):
        chat = chat_format(tokenizers[style], ChatConfig(audio="before"))
        found = chat.prompt(" ".join(prompt), flat(chat.encode_words(words)))
        assert found == by_template(tokenizers[style], f"{' '.join(words)}\n{' '.join(prompt)}"), style


@given(prompt=WORDS)
@settings(max_examples=60, deadline=None)
def test_sentencepiece_around_the_speech(tokenizers, prompt):
    chat = chat_format(tokenizers["brackets"], ChatConfig())
    text = " ".join(prompt)
    assert chat.prompt(text, []) == by_template(tokenizers["brackets"], f"{text}\n")
    before, after = chat.prompt(text, [-1])[: -len(chat.encode_after(" [/INST]"))], chat.encode_after(" [/INST]")
    assert before[-1] == -1 and chat.tokenizer.ids_to_text(after) == "[/INST]"


@given(words=WORDS)
@settings(max_examples=100, deadline=None)
def test_words_concatenate_to_the_text(tokenizers, words):
    for tokenizer in tokenizers.values():
        chat = chat_format(tokenizer, ChatConfig())
        assert flat(chat.encode_words(words)) == chat.encode(" ".join(words))


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_ends_with_the_token_of_the_template(tokenizers, style):
    chat = chat_format(tokenizers[style], ChatConfig())
    assert chat.end == STYLES[style][2]
    assert chat.response("the fox")[-1] == chat.end_id and chat.decode(chat.response("the fox")) == "the fox"


def test_a_user_can_say_no_control_token(tokenizers):
    for tokenizer in tokenizers.values():
        chat = chat_format(tokenizer, ChatConfig())
        assert chat.prompt("x", []).count(chat.end_id) == chat.prompt(f"x {chat.end}", []).count(chat.end_id)


@given(asked=st.lists(st.tuples(WORDS, LETTERS), min_size=1, max_size=3), system=st.sampled_from([None, "Be brief."]))
@settings(max_examples=60, deadline=None)
def test_conversations_have_the_ids_of_the_template(tokenizers, asked, system):
    for style in ("chatml", "headers"):
        chat = chat_format(tokenizers[style], ChatConfig(system=system))
        turns = [(" ".join(words), " ".join(answer)) for words, answer in asked]
        layout, labels = chat.conversation([Turn((question,), answer) for question, answer in turns])
        messages = [] if system is None else [{"role": "system", "content": system}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizers[style].tokenizer.apply_chat_template(messages, tokenize=True)
        ids = ids if isinstance(ids, list) else ids["input_ids"]
        assert ids[: len(layout) + 1] == [*layout, chat.end_id], style
        said = [label for label in labels if label != IGNORE]
        assert said == flat(chat.response(answer) for _, answer in turns), style


SINGLE = (
    "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
)


def test_formats_of_one_turn_and_of_more(tmp_path, tokenizers):
    assert all(chat_format(tokenizers[style], ChatConfig()).more for style in ("chatml", "headers"))
    single = HFTokenizer(hf_tokenizer(tmp_path, "brackets", template=SINGLE))
    assert chat_format(single, ChatConfig()).more == ()


# ------------------------------------------------------------------------------------------------- NeMo's formatters


class Parsing:
    """The tokenizer as NeMo's formatters want it: control tokens by their names, and marks of a text."""

    def __init__(self, tokenizer):
        self._own = tokenizer.tokenizer
        self.bos, self.eos = self._own.bos_token_id, self._own.eos_token_id

    def text_to_ids(self, text):
        return self._own.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("style, format", FORMATTERS.items())
def test_formats_by_name_have_the_ids_of_nemo(tokenizers, style, format):
    from nemo.collections.common.prompts import PromptFormatter

    chat = chat_format(tokenizers[style], ChatConfig(format=format))
    content = "Transcribe it.\nthe quick fox"
    formatter = PromptFormatter.resolve(format)(Parsing(tokenizers[style]))
    wanted = formatter.encode_dialog([{"role": "user", "slots": {"message": content}}])["input_ids"].tolist()
    if style == "brackets":  # SentencePiece begins a word where speech begins
        assert chat.prompt("Transcribe it.", [-1])[:2] == wanted[:2] and chat.turn[-1] == " [/INST]"
    else:
        assert chat.prompt("Transcribe it.", flat(chat.encode_words(["the", "quick", "fox"]))) == wanted


@pytest.mark.parametrize("style", ["headers", "brackets"])
def test_templates_and_formats_agree(tokenizers, style):
    """Not so ChatML: the template of Qwen adds a system prompt, NeMo's format has none. NeMo's Llama 2 puts a space
    behind an answer, which no LLM says: it has single turns only."""
    by_name, own = (chat_format(tokenizers[style], ChatConfig(format=name)) for name in (FORMATTERS[style], None))
    assert (by_name.turn, by_name.end) == (own.turn, own.end)
    assert by_name.more == (() if style == "brackets" else own.more)


def test_the_system_prompt_of_llama2(tokenizers):
    chat = chat_format(tokenizers["brackets"], ChatConfig(format="llama2", system="Be brief."))
    assert "".join(chat.turn[:3]) == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{prompt}"


def test_sentencepiece_of_nemo_by_name():
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    from nemo_mtbi.modules.pretrained import DEMO

    tokenizer = SentencePieceTokenizer(str(DEMO / "llm" / "tokenizer.model"))
    chat = chat_format(tokenizer, ChatConfig(format="llama2"))
    assert (chat.turn[0], chat.end) == ("<s>", "</s>")
    with pytest.raises(ValueError, match="has no chat template: name a prompt format"):
        chat_format(tokenizer, ChatConfig())


# ------------------------------------------------------------------------------------------------ choices and errors


def test_options_reach_the_template(tokenizers):
    chat = chat_format(tokenizers["chatml"], ChatConfig(options={"enable_thinking": False}))
    assert chat.turn[-1] == "assistant\n<think>\n\n</think>\n\n"


def test_prompts_do_not_change_over_night(tmp_path):
    chat = chat_format(HFTokenizer(hf_tokenizer(tmp_path, "headers", template=DATED)), ChatConfig())
    assert chat.turn[1] == "Today is 26 Jul 2024. "
    other = ChatConfig(options={"date_string": "1 May 2025"})
    assert chat_format(chat.tokenizer, other).turn[1] == "Today is 1 May 2025. "


@pytest.mark.parametrize(
    "style, values, message",
    [
        ("brackets", {"system": "x"}, "template refuses the conversation: only user and assistant roles"),
        ("chatml", {"format": "qwen", "system": "x"}, "qwen has no plain system turn"),
        ("chatml", {"format": "none"}, "model.chat.format: Unknown prompt formatter: 'none' .*llama3"),
        ("chatml", {"format": "llama3"}, "ends with .*, which is no token of the LLM's vocabulary"),
        ("chatml", {"audio": "first"}, "model.chat.audio is 'first'; it must be after or before"),
        ("chatml", {"format": "qwen", "options": {"a": 1}}, "model.chat.options are of the tokenizer's own"),
    ],
)
def test_what_does_not_fit_is_refused(tokenizers, style, values, message):
    with pytest.raises(ValueError, match=message):
        chat_format(tokenizers[style], ChatConfig(**values))


def test_templates_that_lose_the_prompt_are_refused(tmp_path):
    hf_tokenizer(tmp_path / "none", "chatml", template="")
    with pytest.raises(ValueError, match="has no chat template: name a prompt format"):
        chat_format(HFTokenizer(tmp_path / "none"), ChatConfig())
    hf_tokenizer(tmp_path / "deaf", "chatml", template="<|im_start|>user{{ messages[0].content[:3] }}")
    with pytest.raises(ValueError, match="must say {prompt} and {audio} exactly once"):
        chat_format(HFTokenizer(tmp_path / "deaf"), ChatConfig())
