# SPDX-License-Identifier: Apache-2.0
"""Parameters of tests that form a matrix: a core that every run has, and the rest that only ``--full`` has."""

from collections.abc import Collection, Iterable

import pytest


def with_core(values: Iterable, core: Collection) -> list:
    """All of ``values`` as parameters of a test; those outside ``core`` have the marker ``full``.

    Raises:
        ValueError: if the core has a value that is not among them.
    """
    values = list(values)
    if unknown := [value for value in core if value not in values]:
        raise ValueError(f"not among the values: {unknown}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if value in core else [pytest.mark.full]
        )
        for value in values
    ]
