# SPDX-License-Identifier: Apache-2.0
"""Actions that all processes take together: a failure of one is the same error in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

from nemo_mtbi.parallel import groups

Value = TypeVar("Value")


def together(what: str, action: Callable[[], Value], explain: Callable[[Exception], str] = str) -> list[Value]:
    """Run an action in every process, and share the outcomes.

    Args:
        what: beginning of the message if it fails.
        action: work of this process. It must not communicate, since another process may have failed already.
        explain: gives the text for an exception.

    Returns:
        The result of each process, by rank.

    Raises:
        ValueError, RuntimeError: the same in every process if one fails; a ValueError if that was one.
    """
    value: Value | None = None
    failure: tuple[bool, str] | None = None
    cause: Exception | None = None
    try:
        value = action()
    except Exception as error:  # of any kind: the others must raise too instead of waiting
        cause, failure = error, (isinstance(error, ValueError), explain(error) or type(error).__name__)
    try:
        outcomes = groups.gather_objects((value, failure))
    except RuntimeError:  # another process is gone
        if failure is None:
            raise
        raise RuntimeError(f"{what}: {failure[1]}") from cause
    failures = {rank: outcome for rank, (_, outcome) in enumerate(outcomes) if outcome}
    if failures:
        rank, (of_value, text) = next(iter(failures.items()))
        raise (ValueError if of_value else RuntimeError)(f"{what}: {text} [process {rank}]") from cause
    return [value for value, _ in outcomes]


def agreed(work: Callable[[], Value]) -> Value:
    """Run work that may fail on some processes of a model replica only; then all of them raise, and none waits.

    Args:
        work: of this process. All processes of the replica must call this function.

    Returns:
        What ``work`` returns.

    Raises:
        ValueError: of this process, or with the message of another.
        RuntimeError: likewise, for any other error.
    """
    if groups.layout().model_parallel_size == 1:
        return work()
    result: Value | None = None
    failure: Exception | None = None
    report: tuple[bool, str] | None = None
    try:
        result = work()
    except (ValueError, RuntimeError, OSError) as error:
        failure, report = error, (isinstance(error, ValueError), str(error))
    reports = groups.gather_objects(report, "replica")
    if failure is not None:
        raise failure
    for rank, other in enumerate(reports):
        if other is not None:
            kind = ValueError if other[0] else RuntimeError
            raise kind(f"process {rank} of this model replica failed: {other[1]}")
    return cast(Value, result)  # the work has ended without an error


@contextmanager
def led(items: Iterator[Value]) -> Iterator[Iterator[Value]]:
    """Let the first process of a replica set the pace of a collective iterator for all of them.

    The first process may fail between two items (a full disk), and the others must not wait for it then. The others
    consume the items before the body, and their body gets an empty iterator.
    """
    if groups.control_group("replica").rank() > 0:
        while groups.broadcast_object(None, "replica"):
            next(items, None)
        yield iter(())
        return

    def pulled() -> Iterator[Value]:
        while True:
            groups.broadcast_object(True, "replica")
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    try:
        yield pulled()
    finally:
        groups.broadcast_object(False, "replica")
