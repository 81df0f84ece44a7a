# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/extending run as they stand, and what they register is taken back."""

import re
from pathlib import Path

import pytest

from nemo_mtbi.config.connector import KINDS
from nemo_mtbi.encoders.registry import ENCODERS
from nemo_mtbi.llm.convert.hf import FAMILIES
from nemo_mtbi.metrics.corpus import METRICS, SCORERS
from nemo_mtbi.speech_llm.connector import CONNECTORS
from nemo_mtbi.speech_llm.trainable import TRAINABLE_PARTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "extending.md", *sorted((ROOT / "docs" / "extending").glob("*.md"))]
REGISTRIES = (CONNECTORS, ENCODERS, FAMILIES, KINDS, METRICS, SCORERS)


@pytest.fixture(autouse=True)
def registries():
    before, parts = [dict(registry) for registry in REGISTRIES], list(TRAINABLE_PARTS)
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)
    TRAINABLE_PARTS[:] = parts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_example_of_a_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "one example a page"
    exec(compile(blocks[0], str(page), "exec"), {"__name__": "example"})


def test_every_page_is_in_the_index():
    index = PAGES[0].read_text(encoding="utf-8")
    assert {f"extending/{page.name}" for page in PAGES[1:]} == set(re.findall(r"\((extending/[\w-]+\.md)\)", index))
    assert len(PAGES) == 7
