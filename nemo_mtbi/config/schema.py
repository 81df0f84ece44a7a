# SPDX-License-Identifier: Apache-2.0
"""Reads a section of a configuration into its dataclass; an error names the whole key and the remedy."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_mtbi.config.checks import field_rules, suggestion, union_members

Schema = TypeVar("Schema")


def read_section(schema: type[Schema], cfg: Mapping | None, section: str = "") -> Schema:
    """Return the dataclass ``schema`` filled from ``cfg``.

    Args:
        schema: a dataclass that is not frozen (OmegaConf takes a frozen one for read-only); its fields may be
            dataclasses.
        cfg: a ``DictConfig`` or mapping; ``None`` stands for an empty one.
        section: its name, for messages.

    Raises:
        ValueError: unknown key (with the nearest known one), missing key, wrong type, a value that the rule of its
            field forbids (:mod:`nemo_mtbi.config.checks`), or what the dataclass itself refuses.
    """
    if not isinstance(cfg, (Mapping, type(None))):
        raise ValueError(f"the section {section or 'given'}: must hold keys and values, got {cfg!r}")
    try:
        # not a copy of a DictConfig: it would lose the parent that ${...} may point to
        node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg or {}))
        values = plain(node)
        _check_sections(schema, values, section)
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(schema), values))  # of keys, as its parts
        _check_values(merged, section)
        return cast(Schema, OmegaConf.to_object(merged))  # it makes the type that it was structured by
    except OmegaConfBaseException as error:
        raise ValueError(explain_config_error(error, section)) from error


def plain(cfg: Mapping) -> dict[str, Any]:
    """Return a ``DictConfig`` or mapping as plain keys and values, with its references resolved.

    Raises:
        OmegaConfBaseException: if a reference can't be resolved.
    """
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))  # of a DictConfig it is a dict


def _check_sections(schema: type, values: Any, section: str) -> None:
    """Refuse a value that is not a mapping where a section stands; OmegaConf would not name its key.

    Args:
        schema: a dataclass.
        values: what is given for it.
        section: its name, for messages.

    Raises:
        ValueError: names the key.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{section} must hold keys and values, got {values!r}")
    for name, hint in typing.get_type_hints(schema).items():
        inner = next((kind for kind, _ in union_members(hint) if isinstance(kind, type) and is_dataclass(kind)), None)
        if inner is not None and values.get(name) is not None:
            _check_sections(inner, values[name], _join(section, name))


def _check_values(node: DictConfig, section: str) -> None:
    """Check each value against the rule of its field, at every depth; here the whole key is known.

    Raises:
        ValueError: names the key, the value and what is allowed.
    """
    schema = OmegaConf.get_type(node)
    rules = field_rules(schema) if schema is not None and is_dataclass(schema) else {}
    for name in node:
        if OmegaConf.is_missing(node, name):
            continue
        key, value = _join(section, str(name)), node[name]
        if name in rules:
            rules[name].check(key, value)
        if isinstance(value, DictConfig):
            _check_values(value, key)


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def explain_config_error(error: OmegaConfBaseException, section: str = "") -> str:
    """Return what OmegaConf refuses in a section, in one line: where, what, and the nearest known key."""
    key = ".".join(part for part in (section, error.full_key) if part)
    if "missing mandatory value" in str(error).lower():
        return f"{key} is missing: set it in the YAML or on the command line"
    schema = getattr(error, "object_type", None)
    names = [field.name for field in fields(schema)] if schema is not None and is_dataclass(schema) else []
    if error.key is not None and names and error.key not in names:
        return f"unknown key {key}: {suggestion(error.key, names)}"
    return f"{key}: {str(error).splitlines()[0]}"
