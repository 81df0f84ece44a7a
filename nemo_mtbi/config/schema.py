# SPDX-License-Identifier: Apache-2.0
"""Checks a section of a configuration against its dataclass: an unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")


def read_section(schema: type[Schema], cfg: Mapping | None, section: str = "") -> Schema:
    """Fills the dataclass ``schema`` from ``cfg``.

    Args:
        schema: a dataclass, frozen or not, whose fields may be dataclasses.
        cfg: a ``DictConfig`` or mapping; ``None`` stands for an empty one.
        section: its name, for messages.

    Raises:
        ValueError: unknown key (with the nearest known one), missing key, wrong type, or what the dataclass refuses.
    """
    name = f"{section}." if section else ""
    if not isinstance(cfg, (Mapping, type(None))):
        raise ValueError(f"the section {section or 'given'}: must hold keys and values, got {cfg!r}")
    typed = OmegaConf.structured(schema)
    try:
        # not a copy of a DictConfig: it would lose the parent that ${...} may point to
        node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg or {}))
        values = OmegaConf.to_container(node, resolve=True)
        _unlock(typed, values, name)
        return OmegaConf.to_object(OmegaConf.merge(typed, values))
    except OmegaConfBaseException as error:
        raise ValueError(explain(error, section)) from error


def _unlock(typed: DictConfig, values: Mapping, name: str) -> None:
    """OmegaConf takes frozen dataclasses for read-only, at every depth: lets ``values`` be merged into them."""
    OmegaConf.set_readonly(typed, False)
    for key in typed:
        if OmegaConf.is_missing(typed, key) or not OmegaConf.is_config(node := typed._get_node(key)):
            continue
        OmegaConf.set_readonly(node, False)
        given = values.get(key)
        if isinstance(given, Mapping) and typed[key] is None and is_dataclass(node._metadata.ref_type):
            typed[key] = node._metadata.ref_type  # an optional section that is given: its defaults
        if OmegaConf.is_dict(typed[key]):
            if not isinstance(given, (Mapping, type(None))):
                raise ValueError(f"{name}{key} must hold keys and values, got {given!r}")
            _unlock(typed[key], given or {}, f"{name}{key}.")


def explain(error: OmegaConfBaseException, section: str = "") -> str:
    """What OmegaConf found wrong in a section, in one line: where, what, and the nearest known key."""
    key = ".".join(part for part in (section, error.full_key) if part)
    if "missing mandatory value" in str(error).lower():
        return f"{key} is missing: set it in the YAML or on the command line"
    names = list(getattr(getattr(error, "object_type", None), "__dataclass_fields__", {}))
    if error.key is not None and names and error.key not in names:
        near = difflib.get_close_matches(str(error.key), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
        return f"unknown key {key}: {hint}"
    return f"{key}: {str(error).splitlines()[0]}"
