# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_mtbi.io.display import printable


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("right\rwrong\b", "right\\rwrong\\x08"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud83d", "\\ud83d"),
        ("\x7f\x00", "\\x7f\\x00"),
    ],
)
def test_commands_to_the_terminal_are_shown_and_not_obeyed(hostile, shown):
    assert printable(hostile) == shown


@pytest.mark.parametrize("text", ["", "où? häß\n\t今天 👩\u200d🔬 \u2028 |<b>", "क्\u200dष"])
def test_text_of_any_language_stays_as_it_is(text):
    assert printable(text) == text


@given(st.text(st.characters()))
def test_nothing_that_is_shown_can_fail_to_print_or_command(text):
    shown = printable(text).encode().decode()
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown
