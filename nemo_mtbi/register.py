# SPDX-License-Identifier: Apache-2.0
"""The one place where NeMo learns of this package."""

from __future__ import annotations

PREFIX = "nemo_mtbi."


def register() -> None:
    """Make NeMo accept our classes as config targets; may be called again and again.

    NeMo 3 instantiates only targets with an allowed prefix, so that a ``.nemo`` file cannot run code of its choice.
    Ours is added and no other. NeMo 2 has no such list. Text files are opened as people have them.
    """
    from nemo_mtbi.compat.nemo import allow_targets
    from nemo_mtbi.io import reading

    allow_targets(PREFIX)
    reading.install()
