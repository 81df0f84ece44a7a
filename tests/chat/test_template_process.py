# SPDX-License-Identifier: Apache-2.0
"""Chat templates of others are rendered within limits, and learn nothing of this process."""

import os
import time

import pytest

from nemo_mtbi.chat import template_process
from nemo_mtbi.chat.template_process import TemplateError, render_template

GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
VARIABLES = {"messages": [{"role": "user", "content": "ä\u2028 {{ x }}"}], "add_generation_prompt": True}


def test_a_conversation_is_rendered():
    assert render_template(GOOD, VARIABLES) == "<user>ä\u2028 {{ x }}!"


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% generation %}a{{ messages[0].role }}{% endgeneration %}", "auser"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = '<' %}{{ {'a': ns.a} | tojson }}", '{"a": "<"}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if tools is not defined %}none{% endif %}\n", "none"),
        ("   {% if true %}\na\n   {% endif %}\n", "a\n"),
    ],
)
def test_what_templates_of_transformers_may_use(template, text):
    assert render_template(template, VARIABLES) == text


@pytest.mark.parametrize("style", ["chatml", "headers", "brackets"])
def test_the_text_is_that_of_transformers(style, tmp_path):
    from hf_models import hf_tokenizer

    from nemo_mtbi.chat.hf_tokenizer import HFTokenizer

    tokenizer = HFTokenizer(hf_tokenizer(tmp_path, style))
    messages = [{"role": "user", "content": " Hi, <there>! "}, {"role": "assistant", "content": "'la'"}]
    for generation in (False, True):
        wanted = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        assert tokenizer.render(messages, generation, {}) == wanted
    with pytest.raises(ValueError, match="options of a chat template can't set messages"):
        tokenizer.render(messages, True, {"messages": []})


def test_endless_templates_are_stopped_and_the_next_one_is_rendered():
    start = time.process_time()
    with pytest.raises(TemplateError, match="takes more than 1 s or 512 MiB .* model.chat="):
        render_template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", VARIABLES)
    assert time.process_time() - start < 1  # of this process
    assert render_template(GOOD, VARIABLES).endswith("!")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% set x = 'a' * (10 ** 10) %}", "MemoryError"),
        ("{{ ('%9999999999d' | format(1))[:1] }}", "MemoryError"),
        ("{{ 'a'.ljust(10 ** 8) }}", "it gives 1000000.. characters"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.environ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "namespace"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if", "unexpected"),
    ],
)
def test_templates_that_ask_for_more_are_refused(template, message):
    with pytest.raises(TemplateError, match=message):
        render_template(template + GOOD, VARIABLES)


def test_the_process_has_no_environment_of_ours(monkeypatch):
    monkeypatch.setenv("MTBI_SECRET", "s3cret")
    template_process._end()
    render_template(GOOD, VARIABLES)
    with open(f"/proc/{template_process._worker.process.pid}/environ") as file:
        assert "s3cret" not in file.read()


def test_a_forked_process_starts_one_of_its_own():
    render_template(GOOD, VARIABLES)
    before = template_process._worker.process.pid
    child = os.fork()
    if not child:
        try:
            code = 0 if render_template(GOOD, VARIABLES).endswith("!") else 1
            code += template_process._worker.process.pid == before
        except BaseException:
            code = 3
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_template(GOOD, VARIABLES).endswith("!") and template_process._worker.process.pid == before
