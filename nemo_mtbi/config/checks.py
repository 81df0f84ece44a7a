# SPDX-License-Identifier: Apache-2.0
"""Rules for values, declared beside the fields of a typed section: ``rank: Annotated[int, AtLeast(1)] = 16``.

A section is checked when it is made (:class:`Section`), in Python as from YAML. Every message names the key, the value
and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar


class Rule(ABC):
    """A condition on one value; its text completes the sentence "it must be …"."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """Return whether a value is legal."""

    def remedy(self, value: Any) -> str:
        """Return what a message adds about an illegal value, if anything."""
        return ""

    def check(self, key: str, value: Any) -> None:
        """Refuse an illegal value.

        Args:
            key: name of the value, for the message.
            value: to be checked.

        Raises:
            ValueError: names key, value and what is allowed.
        """
        if not self.accepts(value):
            raise ValueError(f"{key} is {value!r}; it must be {self}{self.remedy(value)}")


class OneOf(Rule):
    """One of several texts.

    Args:
        choices: the legal texts.
        registry: its keys are legal too, also those that are added later.
        remedy: what messages add.
    """

    def __init__(self, *choices: str, registry: Mapping[str, Any] | None = None, remedy: str = ""):
        self._choices, self._registry = choices, {} if registry is None else registry
        self._remedy = remedy

    @property
    def choices(self) -> tuple[str, ...]:
        """The legal texts of now."""
        return (*self._choices, *self._registry)

    def accepts(self, value: Any) -> bool:
        """Return whether a value is one of the choices."""
        return isinstance(value, str) and value in self.choices

    def remedy(self, value: Any) -> str:
        """Return the choice that the value is a misspelling of, and what messages add."""
        near = nearest(value, self.choices) if isinstance(value, str) else None
        return (f" (did you mean {near!r}?)" if near else "") + self._remedy

    def __str__(self) -> str:
        return any_of(self.choices)


class Number(Rule):
    """A number within bounds.

    Args:
        holds: whether a number is legal. NaN and infinite numbers never are.
        text: of the bounds.
        remedy: what messages add.
    """

    def __init__(self, holds: Callable[[float], bool], text: str, remedy: str = ""):
        self._holds, self._text, self._remedy = holds, text, remedy

    def accepts(self, value: Any) -> bool:
        """Return whether a value is a finite number within the bounds."""
        return _is_number(value) and math.isfinite(value) and self._holds(value)

    def remedy(self, value: Any) -> str:
        """Return what messages add."""
        return self._remedy

    def __str__(self) -> str:
        return self._text


def at_least(least: float) -> Number:
    """Return the rule for numbers that are not below ``least``."""
    return Number(lambda value: value >= least, f"at least {least}")


def above(bound: float) -> Number:
    """Return the rule for numbers above ``bound``."""
    return Number(lambda value: value > bound, f"above {bound}")


def between(least: float, most: float, remedy: str = "") -> Number:
    """Return the rule for numbers from ``least`` to ``most``, both included."""
    return Number(lambda value: least <= value <= most, f"between {least} and {most}", remedy)


# Types of fields that several sections have.
Count = Annotated[int, at_least(1)]
Share = Annotated[float, between(0, 1)]
FrozenDtype = Annotated[str, OneOf("float32", "bfloat16")]
RAISE_OR_SKIP = OneOf("raise", "skip")
RaiseOrSkip = Annotated[str, RAISE_OR_SKIP]


@dataclass(frozen=True)
class _FieldRule(Rule):
    """The rule of a field, together with what follows from the field's type.

    Attributes:
        rule: as declared.
        optional: whether ``None`` is legal.
        whole: whether a number must be an integer.
    """

    rule: Rule
    optional: bool
    whole: bool

    def accepts(self, value: Any) -> bool:
        """Return whether a value fits both the rule and the type of the field."""
        if value is None:
            return self.optional
        return self.rule.accepts(value) and (not self.whole or isinstance(value, int))

    def remedy(self, value: Any) -> str:
        """Return what messages add by the declared rule."""
        return self.rule.remedy(value)

    def __str__(self) -> str:
        if isinstance(self.rule, OneOf):
            return any_of(("null", *self.rule.choices) if self.optional else self.rule.choices)
        return f"{self.rule}{', or null' if self.optional else ''}"

    def check(self, key: str, value: Any) -> None:
        """Refuse an illegal value; the message says so if it is not a number at all, or not a whole one."""
        if value is not None and isinstance(self.rule, Number):
            if not _is_number(value) or (self.whole and not isinstance(value, int)):
                raise ValueError(f"{key} is {value!r}; it must be a {'whole ' * self.whole}number, {self}")
        super().check(key, value)


class Section:
    """Base of typed sections: each value is checked against the rule of its field when a section is made.

    A dataclass that also compares its fields calls ``super().__post_init__()`` first.

    Attributes:
        SECTION: where it stands in the configuration, for messages; empty: messages name the field alone.
    """

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, rule in field_rules(type(self)).items():
            rule.check(f"{self.SECTION}.{name}" if self.SECTION else name, getattr(self, name))


_RULES: dict[type, dict[str, Rule]] = {}  # by section: hints are read once


def field_rules(section: type) -> dict[str, Rule]:
    """Return the rules of a dataclass, by the names of its fields."""
    if section in _RULES:
        return _RULES[section]
    rules: dict[str, Rule] = {}
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        members = union_members(hint)
        rule = next((extra for _, extras in members for extra in extras if isinstance(extra, Rule)), None)
        if rule is not None:
            kinds = [kind for kind, _ in members]
            rules[name] = _FieldRule(rule, type(None) in kinds, int in kinds)
    _RULES[section] = rules
    return rules


def choices(section: type, name: str) -> tuple[str, ...]:
    """Return the legal texts of a field, without ``None``.

    Raises:
        KeyError: if the field has no rule.
        TypeError: if its rule is not a choice.
    """
    rule = field_rules(section)[name]
    declared = rule.rule if isinstance(rule, _FieldRule) else rule
    if not isinstance(declared, OneOf):
        raise TypeError(f"{section.__name__}.{name} is not a choice")
    return declared.choices


def union_members(hint: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the types of a union, each with what ``Annotated`` adds to it."""
    if typing.get_origin(hint) is Annotated:
        inner, *extras = typing.get_args(hint)
        return [(kind, (*own, *extras)) for kind, own in union_members(inner)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(hint) for member in union_members(part)]
    return [(hint, ())]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def any_of(names: Iterable[str]) -> str:
    """Return names in the words of a message: ``a or b``, ``one of a, b, c``."""
    names = list(names)
    return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the known name that a name is most likely a misspelling of, or ``None``."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return close[0] if close else None


def suggestion(name: Any, known: Iterable[str], otherwise: str | None = None) -> str:
    """Return the hint about an unknown name: the nearest known one.

    Args:
        name: the unknown name.
        known: all legal names.
        otherwise: the hint where none is near; ``None``: all legal names.
    """
    known = list(known)
    near = nearest(name, known)
    if near:
        return f"did you mean {near!r}?"
    return f"known keys: {', '.join(known)}" if otherwise is None else otherwise
