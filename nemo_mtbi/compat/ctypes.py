# SPDX-License-Identifier: Apache-2.0
"""Internals of Python's ctypes."""

from __future__ import annotations

import _ctypes
import ctypes
import sys


def unload(library: ctypes.CDLL) -> None:
    """Unload a shared library, whose functions must not be called any more.

    Uses ``_ctypes.dlclose`` (``FreeLibrary`` on Windows) and ``CDLL._handle``: ctypes loads libraries and has no
    public way to unload one. A ``close`` of ``CDLL`` would replace it.
    """
    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
    else:
        _ctypes.dlclose(library._handle)
