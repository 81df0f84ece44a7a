# SPDX-License-Identifier: Apache-2.0
"""Multi-task behavior imitation with speech-text interleaving (MTBI) for NVIDIA NeMo.

Importing this package is cheap: it loads neither torch nor NeMo. The names below are loaded on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_LAZY = {"MTBIModel": "nemo_mtbi.models.mtbi_model"}

__all__ = ["MTBIModel", "__version__"]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # the next access skips this function
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
