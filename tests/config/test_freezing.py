# SPDX-License-Identifier: Apache-2.0
"""Patterns of names, which may come from a model file of others."""

import re
import time

import pytest

from nemo_mtbi.config.freezing import check_freeze, matching, unfrozen
from nemo_mtbi.config.llm import LoraConfig

NAMES = [f"decoder.layers.{n}.self_attention.linear_qkv.weight" for n in range(200)] + ["a" * 60 + "b"]


@pytest.mark.parametrize("pattern", ["layers.1.", r"layers\.1\d\.", "^decoder.*weight$", "(?i)LINEAR", "[^a]b$", ""])
def test_patterns_are_searched_for_as_python_does(pattern):
    assert matching([pattern], NAMES, "key") == {pattern: {name for name in NAMES if re.search(pattern, name)}}


@pytest.mark.parametrize("pattern", [r"^(\w|\w\w)+\s"])
def test_a_pattern_that_would_take_years_is_refused(pattern):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"model.llm.freeze has .* which takes too long .* make it simpler"):
        unfrozen(NAMES, [pattern], "model.llm")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 20_000, "a" * 1001, 3])
def test_what_is_not_a_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="model.llm.freeze is .*it must be true, false or a list of patterns"):
        check_freeze([pattern], "model.llm")
    if isinstance(pattern, str):
        with pytest.raises(ValueError, match="model.lora.target_modules has .* which is not a regular expression"):
            LoraConfig(target_modules=[pattern])
