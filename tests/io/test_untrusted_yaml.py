# SPDX-License-Identifier: Apache-2.0
"""YAML of others: what it says after parsing is checked, however it is written."""

import base64
import time

import pytest
from omegaconf import OmegaConf

from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.io.untrusted_yaml import entries, read_yaml

HIDDEN = base64.b64encode(b"${oc.env:HOME}").decode()


@pytest.mark.parametrize(
    "text",
    [
        r'a: "\x24{oc.env:HOME}"',
        r'a: "\u0024{oc.env:HOME}"',
        r'a: "\U00000024{oc.env:HOME}"',
        r'a: "$\x7boc.env:HOME}"',
        r'a: "\x24\x7boc.env:HOME\x7d"',
        r'a: "before \x24{oc.env:HOME} behind"',
        r'a: "\\\x24{oc.env:HOME}"',
        r'a: "\x24{oc.decode:\x24{oc.env:HOME}}"',
        r'a: "\x24{b}"',
        r'a: [1, [{b: "\x24{oc.env:HOME}"}]]',
        r'"\x24{oc.env:HOME}": 1',
        r'a: {"\u0024{b}": {c: 1}}',
        'a: !!str "\\x24{b}"',
        'a: "$\\\n  {oc.env:HOME}"',  # a line that goes on
    ],
)
def test_references_are_refused_however_they_are_written(text):
    with pytest.raises(ArchiveError, match="text refers to values outside of it"):
        read_yaml(text.encode(), "text")


@pytest.mark.parametrize(
    "text, message",
    [
        (f"a: !!binary {HIDDEN}", "text holds a bytes at 'a', which is not a plain value"),
        ("a: !!timestamp 2020-01-01", "text holds a date at 'a'"),
        ("a: !!set {x}", "text holds a set at 'a'"),
        ("a: !!python/name:os.system ''", "text is not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "text is not YAML"),
        ("a: !!python/object/new:os.system ['true']", "text is not YAML"),
        ("? [a, b]\n: 1", "text is not YAML"),
        ("a: 0x" + "f" * 100_000, "text has a number of 400000 bits at 'a'"),
        ("? 0x" + "f" * 100_000 + "\n: 1", "text has a number of 400000 bits"),
        ("a: 1\n---\nb: 2", "text is not YAML"),
        ("a: 1\n'a': 2", "text is not YAML .a key stands twice"),
    ],
)
def test_values_that_are_not_plain_are_refused(text, message):
    with pytest.raises(ArchiveError, match=message):
        read_yaml(text.encode(), "text")


def test_size_and_time_are_bounded():
    start = time.process_time()
    for text in (b"[" * 2_000_000, b"- " * 1_000_000, b"? " * 1_000_000, b"&a " * 700_000, b"#" * 3_000_000):
        with pytest.raises(ArchiveError):
            read_yaml(text, "text")
    assert time.process_time() - start < 5


def test_plain_values_are_those_of_omegaconf():
    text = (
        "a: 1e-5\nb: [1_000, 1., .5, 1e5, -1e+3, .inf, 017, 0o17, 12:30]\nc: {d: null, e: ~, f: yes, g: 'no'}\n"
        "h: 2020-01-01\nk: $ {x} $x {y}\nl: |\n  $\n  {a}\n1: one\n"
    )
    assert read_yaml(text.encode(), "text") == OmegaConf.to_container(OmegaConf.create(text))


def test_entries_are_found_at_every_depth():
    found = {(place, key) for place, key, _ in entries({"a": [{"b": 1}, [{"c": {"d": 2}}]]})}
    assert found == {("a", "a"), ("a[0].b", "b"), ("a[1][0].c", "c"), ("a[1][0].c.d", "d")}
