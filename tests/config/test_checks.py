# SPDX-License-Identifier: Apache-2.0
"""Rules beside the fields of a section: what they refuse, from YAML and in Python, and what the messages say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import pytest
from omegaconf import OmegaConf

from nemo_mtbi.config.checks import Count, OneOf, Section, Share, above, at_least, between, choices, suggestion
from nemo_mtbi.config.schema import read_section


@dataclass
class Inner(Section):
    SECTION: ClassVar[str] = "top.inner"

    size: Count = 1
    kind: Annotated[str, OneOf("wide", "narrow", "round", remedy=", or leave it out")] = "wide"


@dataclass
class Outer(Section):
    count: Count | None = None
    share: Share = 0.5
    rate: Annotated[float, above(0)] = 1.0
    mode: Annotated[str | None, OneOf("fast", "slow")] = None
    inner: Inner = field(default_factory=Inner)
    parts: dict[str, Inner] = field(default_factory=dict)


CASES = [
    ({"count": 0}, "count is 0; it must be at least 1, or null"),
    ({"share": 1.5}, "share is 1.5; it must be between 0 and 1"),
    ({"share": -0.5}, "share is -0.5; it must be between 0 and 1"),
    ({"share": math.nan}, "share is nan; it must be between 0 and 1"),
    ({"rate": 0.0}, "rate is 0.0; it must be above 0"),
    ({"rate": math.inf}, "rate is inf; it must be above 0"),
    ({"mode": "fats"}, "mode is 'fats'; it must be one of null, fast, slow (did you mean 'fast'?)"),
]


@pytest.mark.parametrize("values, message", CASES)
@pytest.mark.parametrize("make", [lambda values: Outer(**values), lambda values: read_section(Outer, values)])
def test_a_value_is_refused_by_the_same_message_in_python_and_from_yaml(make, values, message):
    with pytest.raises(ValueError) as error:
        make(values)
    assert str(error.value) == message


@pytest.mark.parametrize("values", [{"count": 1}, {"count": None}, {"share": 0}, {"share": 1}, {"mode": "slow"}])
def test_values_at_the_bounds_are_legal(values):
    assert read_section(Outer, values) == Outer(**values)


@pytest.mark.parametrize("count", [1.5, True, "2", [1]])
def test_what_is_not_a_whole_number_is_refused_in_python(count):
    with pytest.raises(ValueError, match="it must be a whole number, at least 1"):
        Outer(count=count)


@pytest.mark.parametrize("share", [None, "half", False])
def test_what_is_not_a_number_is_refused_in_python(share):
    with pytest.raises(ValueError, match="^share is .*; it must be .*between 0 and 1$"):
        Outer(share=share)


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
@pytest.mark.parametrize(
    "values, key",
    [({"inner": {"size": 0}}, "model.inner.size"), ({"parts": {"one": {"size": 0}}}, "model.parts.one.size")],
)
def test_messages_hold_the_whole_key_of_a_configuration(wrap, values, key):
    with pytest.raises(ValueError, match=f"^{key} is 0; it must be at least 1$"):
        read_section(Outer, wrap(values), "model")


def test_a_section_that_is_made_in_python_names_where_it_stands():
    with pytest.raises(ValueError) as error:
        Inner(kind="rund")
    assert str(error.value) == (
        "top.inner.kind is 'rund'; it must be one of wide, narrow, round (did you mean 'round'?), or leave it out"
    )


def test_a_section_that_is_not_a_mapping_is_refused_by_its_whole_key():
    with pytest.raises(ValueError, match="^model.inner must hold keys and values, got 3$"):
        read_section(Outer, {"inner": 3}, "model")


def test_choices_of_a_field():
    assert choices(Inner, "kind") == ("wide", "narrow", "round")
    assert choices(Outer, "mode") == ("fast", "slow")
    with pytest.raises(TypeError, match="Outer.share is not a choice"):
        choices(Outer, "share")


def test_a_rule_checks_an_argument_too():
    at_least(0).check("n", 0)
    between(1, 2).check("n", 2)
    with pytest.raises(ValueError, match="^n is -1; it must be at least 0$"):
        at_least(0).check("n", -1)


def test_an_unknown_name_gets_the_nearest_one_or_all():
    assert suggestion("knd", ["kind", "size"]) == "did you mean 'kind'?"
    assert suggestion("zzz", ["kind", "size"]) == "known keys: kind, size"
    assert suggestion("zzz", ["kind", "size"], otherwise="remove it") == "remove it"
