# SPDX-License-Identifier: Apache-2.0
"""One process of a replica sends requests, the others follow: for work that only one may write to disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from nemo_mtbi.inference.generate import Generated
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.parallel import groups

PATIENT = "patient_replica"  # the leader may read for long, or wait for another run, before a request


class Leader:
    """Answers for the reader of a replica, whose other processes are in :func:`follow`.

    A context manager: its end lets the others go on. If the work fails, they fail too.
    """

    def __init__(self, responder: Responder):
        self._responder = responder

    def __enter__(self) -> Leader:
        return self

    def layouts(self, layouts: Sequence[Sequence[int]]) -> list[Generated]:
        """Answers to finished text-only prompt layouts."""
        groups.broadcast_object([list(layout) for layout in layouts], PATIENT)
        return self._responder.layouts(layouts)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            groups.broadcast_object(None, PATIENT)
        elif isinstance(error, Exception):  # and not a signal, which others have too, or notice by the end of this one
            with suppress(RuntimeError):  # they may be gone, which is why this one fails
                groups.broadcast_object(f"{type(error).__name__}: {error}", PATIENT)


def follow(responder: Responder) -> None:
    """Take part in every batch that the leader of this replica answers, until it ends.

    Raises:
        RuntimeError: if the leader has failed.
    """
    while (layouts := groups.broadcast_object(None, PATIENT)) is not None:
        if isinstance(layouts, str):
            raise RuntimeError(f"the first process of this model replica failed: {layouts}")
        responder.layouts(layouts)
