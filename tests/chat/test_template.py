# SPDX-License-Identifier: Apache-2.0
"""The parts of a chat format give the ids that the LLM's own template, and NeMo's formatter, give."""

import hashlib
import json

import pytest
from hf_models import DATED, SCHEMES, SENTENCES, STYLES, hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.chat.format import Turn, chat_difference
from nemo_mtbi.chat.hf_tokenizer import HFTokenizer
from nemo_mtbi.chat.template import chat_format
from nemo_mtbi.config.chat import ChatConfig
from nemo_mtbi.layouts.layout import IGNORE

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


TOKENIZERS = [(style, None) for style in STYLES] + [("brackets", scheme) for scheme in SCHEMES]


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda found: "-".join(filter(None, found)))
def tokenizer(request, tmp_path_factory):
    """Byte pairs, and each way in which SentencePiece marks the beginning of a text."""
    style, scheme = request.param
    return HFTokenizer(hf_tokenizer(tmp_path_factory.mktemp(style), style, scheme=scheme))


@pytest.mark.parametrize("audio", ["after", "before"])
@given(prompt=WORDS, words=WORDS)
@settings(max_examples=25, deadline=None)
def test_text_in_the_place_of_speech_joins_the_prompt_as_in_the_template(tokenizer, audio, prompt, words):
    """No further space of SentencePiece, and no mark that melts with the separator only in the template."""
    chat = chat_format(tokenizer, ChatConfig(audio=audio))
    asked, said = " ".join(prompt), " ".join(words)
    wanted = by_template(tokenizer, f"{asked}\n{said}" if audio == "after" else f"{said}\n{asked}")
    assert chat.prompt(asked, said) == wanted
    assert chat.prompt(asked, flat(chat.pieces(words))) == wanted  # a row whose words are all written
    assert chat.prompt(asked, chat.encode(said)) == wanted


@pytest.mark.parametrize("audio", ["after", "before"])
def test_written_words_beside_speech_join_the_prompt(tokenizer, audio):
    chat = chat_format(tokenizer, ChatConfig(audio=audio))
    (first,), (second,), (third,) = chat.pieces(["the", "quick", "fox."])
    layout = chat.prompt("What?", [first, second, -1, third])
    rendered, place = "".join(chat.turn).replace("{prompt}", "What?"), layout.index(-1)
    before, behind = rendered.split("{audio}")
    assert layout[:place] == tokenizer.rendered_to_ids(f"{before}the quick")
    behind = min((behind.split(name)[0] for name in tokenizer.control_tokens), key=len)
    wanted = chat.encode_after(f" fox.{behind}")
    assert layout[place + 1 :][: len(wanted)] == wanted


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


THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{{ m.content }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
REMINDER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last and m.role == 'user' %}\n"
    "Be brief.{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_LAST = (
    "{% set own = messages[0].content if messages[0].role == 'system' else none %}{{ bos_token }}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] {% if loop.last and own %}"
    "{{ own }}\n\n{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THIRD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.index == 5 %}Once more: {% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "style, template, config",
    [
        ("chatml", THINKING, ChatConfig(options={"enable_thinking": False})),
        ("chatml", REMINDER, ChatConfig()),
        ("chatml", THIRD, ChatConfig()),
        ("brackets", SYSTEM_LAST, ChatConfig(system="Be brief.")),
    ],
    ids=["thinking", "reminder", "third", "system"],
)
def test_templates_that_do_not_split_into_turns_answer_single_turns_only(tmp_path, style, template, config):
    tokenizer = HFTokenizer(hf_tokenizer(tmp_path, style, template=template))
    chat = chat_format(tokenizer, config)
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": "What?\nthe fox"})
    wanted = tokenizer.rendered_to_ids(tokenizer.render(messages, True, config.options))
    assert chat.prompt("What?", "the fox") == chat.question([], ("What?", "the fox")) == wanted
    for ask in (chat.question, lambda turns, contents: chat.conversation([*turns, Turn(contents, "12")])):
        with pytest.raises(ValueError, match="has one: .*its template can't be split into turns: '"):
            ask([Turn(("What?",), "12 birds")], ("And now?",))


def test_thinking_left_open_splits_into_turns(tmp_path):
    tokenizer = HFTokenizer(hf_tokenizer(tmp_path, "chatml", template=THINKING))
    chat = chat_format(tokenizer, ChatConfig())
    turns = [("What?", "12 birds"), ("And now?", "the fox."), ("Count!", None)]
    messages = [
        {"role": role, "content": said}
        for pair in turns
        for role, said in zip(("user", "assistant"), pair, strict=True)
        if said
    ]
    found = chat.question([Turn((asked,), answer) for asked, answer in turns[:-1]], ("Count!",))
    assert found == tokenizer.rendered_to_ids(tokenizer.render(messages, True, {}))


def test_control_tokens_that_swallow_white_space(tmp_path):
    """The template's line feed behind such a token is not in its ids."""
    hf_tokenizer(tmp_path, "chatml")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = HFTokenizer(tmp_path)
    assert tokenizer.strips("<|im_end|>") == (False, True)
    chat = chat_format(tokenizer, ChatConfig())
    assert chat.prompt("What?", "the fox") == by_template(tokenizer, "What?\nthe fox")
    assert chat.more[0] == "<|im_start|>" and chat.turn.count("\n") == 1  # between prompt and speech


def test_the_fingerprint_changes_only_where_prompts_or_ends_do(tokenizers):
    """Targets of before carry the hash of parts and end: it stays where nothing is asked or answered otherwise."""

    def before(chat):
        return hashlib.sha256(json.dumps([*chat.turn, chat.end]).encode()).hexdigest()

    same = chat_format(tokenizers["chatml"], ChatConfig())
    joined = chat_format(tokenizers["brackets"], ChatConfig())  # SentencePiece's further space was asked before
    further = chat_format(tokenizers["chatml"], ChatConfig(), [0])
    assert same.fingerprint() == before(same) == before(further)
    assert chat_format(tokenizers["chatml"], ChatConfig(), [same.end_id]) == same
    assert further.end_ids == (same.end_id, 0) and further.fingerprint() != before(further)
    assert joined.fingerprint() != before(joined)
    for chat, said in (
        (joined, "encoded the transcript apart"),
        (further, "ends them at '<|im_end|>' and the tokens 0"),
    ):
        assert said in chat_difference(None, chat.description(), before(chat))


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

    from nemo_mtbi.speech_llm.pretrained import DEMO

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
        ("chatml", {"format": "llama3"}, "ends with .*, which is not a token of the LLM's vocabulary"),
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
