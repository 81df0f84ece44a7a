# SPDX-License-Identifier: Apache-2.0
"""The gate through which all cuts enter: it checks what they would be read from, and the types of their values.

:class:`GatedCuts` stands around whatever reads cuts, and does two things. It refuses entries that would run commands
or reach the network (:mod:`nemo_mtbi.io.sources`), whatever the policy for bad entries says. And it detects entries
with values of a wrong type or without readable audio (:mod:`nemo_mtbi.data.entries`), which it names in an error or
leaves out and counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut, MixedCut, PaddingCut

from nemo_mtbi.config.schema import plain
from nemo_mtbi.data.entries import BadEntryError, Problem, check_conversation, check_cut_values, problem_of
from nemo_mtbi.data.manifest_lines import PROBLEM, SKIP, EntryFilter
from nemo_mtbi.data.nemo_cuts import restore_piece
from nemo_mtbi.io.manifests import check_manifest
from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.sources import ForbiddenSourceError, SourcePolicy, check_cut, kind_of
from nemo_mtbi.io.text import in_one_line


class GatedCuts:
    """Cuts (or NeMo's conversations) that are checked before their audio is read. Can be iterated again.

    Args:
        source: the cuts; any iterable that can be iterated again.
        policy: what they may be read from.
        lines: the filter of manifest lines that ``source`` was made with, or a fresh one.
        restart: each iteration counts anew what it leaves out.

    Attributes:
        prepare: applied to each cut that is let in.
    """

    def __init__(
        self, source: Iterable[Any], policy: SourcePolicy, lines: EntryFilter | None = None, restart: bool = False
    ):
        self.source = source
        self.policy = policy
        self.lines = EntryFilter() if lines is None else lines
        self.restart = restart
        self.prepare: Callable[[Any], Any] | None = None

    @property
    def left_out(self) -> Counter:
        """Number of entries that were left out, by reason."""
        return self.lines.skipped

    def __iter__(self) -> Iterator[Any]:
        if self.restart:
            self.lines.restart()
        reading, last = Reading(self.policy, lines=self.lines, postpone=self.lines.skip), None
        iterator = iter(self.source)
        while True:
            try:
                with reading:
                    item = next(iterator, None)
                if item is None:
                    return
                check_cut(item, self.policy)
            except ForbiddenSourceError as error:
                raise ForbiddenSourceError(
                    f"{self.lines.place}: {error}" if self.lines.place else str(error)
                ) from None
            except BadEntryError:
                raise
            except Exception as error:  # each reader has its own kinds for a file that is not what it is said to be
                raise BadEntryError(self._failed(error, last)) from error
            last = getattr(item, "id", None)
            problem = self._problem(item)
            if problem is None:
                yield item if self.prepare is None else self.prepare(item)
            elif self.lines.skip:
                self.lines.skipped[problem.reason] += 1
            else:
                raise BadEntryError(
                    f"cut {item.id}: {problem.text}; mend the data, or {self.lines.remedy}", problem.reason
                )

    def _failed(self, error: Exception, last: str | None) -> str:
        where = f"at {self.lines.place}" if self.lines.place else "at its first entry"
        where = where if self.lines.place or last is None else f"after cut {last}"
        remedy = f"; mend the data, or {self.lines.remedy}" if self.lines.opens_audio and not self.lines.skip else ""
        return f"the data source cannot be read {where}: {type(error).__name__}: {in_one_line(error)}{remedy}"

    @staticmethod
    def _problem(item: Any) -> Problem | None:
        if isinstance(item, PaddingCut):
            return None
        if isinstance(item, Cut):
            problem = problem_of(check_cut_values, restore_piece(item))
            marked = None if problem or isinstance(item, MixedCut) else (item.custom or {}).get(PROBLEM)
            return Problem(*map(str, marked)) if isinstance(marked, list) and len(marked) == 2 else problem
        return problem_of(check_conversation, item) if hasattr(item, "turns") else None


def read_gated(
    read: Callable[[], tuple[Any, bool]],
    config: Any,
    policy: SourcePolicy,
    skip: bool,
    remedy: str = SKIP,
    restart: bool = False,
) -> tuple[GatedCuts, bool]:
    """Return the cuts of a data configuration behind the gate, and whether NeMo calls them tarred.

    Args:
        read: NeMo's ``read_cutset_from_config`` for that configuration.
        config: the configuration, a ``DictConfig`` in NeMo's keys.
        policy: what data may be read from.
        skip: leave bad entries out and count them in ``left_out``; otherwise the first is an error.
        remedy: how they are left out, for messages.
        restart: each iteration counts anew what it leaves out.

    Raises:
        ValueError: if the source can't be opened.
    """
    lines = EntryFilter.of(plain(config), skip, remedy)
    lines.opening = True
    try:
        with Reading(policy, "the data source", lines):
            cuts, is_tarred = read()
    except (ForbiddenSourceError, BadEntryError):
        raise
    except Exception as error:  # each reader has its own kinds for a file that is not what it is said to be
        where = f" at {lines.place}" if lines.place else ""
        raise ValueError(f"the data source cannot be read{where}: {type(error).__name__}: {error}") from error
    lines.opening = False
    return GatedCuts(cuts, policy, lines, restart), is_tarred


def open_manifest(
    path: str | Path, policy: SourcePolicy, skip: bool = False, remedy: str = SKIP, key: str = ""
) -> GatedCuts:
    """Return the cuts of a Lhotse manifest, read lazily behind the gate. Each iteration counts anew.

    Args:
        path: of the manifest.
        policy: what its entries may be read from.
        skip: leave bad entries out and count them; otherwise the first is an error.
        remedy: how they are left out, for messages.
        key: configuration key or command-line option that named it, for messages.

    Raises:
        ValueError: if it is a folder, missing, empty or unreadable, or holds something else than cuts.
    """
    from omegaconf import OmegaConf

    policy.check(str(path), f"{key}={path}" if key else f"the manifest {path}")
    if kind_of(str(path)) == "local":
        path = Path(path).expanduser()
        check_manifest(path, key, "cuts")
    named = f"{key}={path}" if key else str(path)
    config = OmegaConf.create({"cuts_path": str(path)})
    cuts, _ = read_gated(lambda: (CutSet.from_file(path), False), config, policy, skip, remedy, True)
    if cuts.source is not None and not isinstance(cuts.source, CutSet):
        raise ValueError(f"{named} holds a {type(cuts.source).__name__}, not cuts: give a manifest of cuts")
    if cuts.source is None or next(iter(cuts), None) is None:
        why = ", ".join(f"{count} left out as {reason}" for reason, count in cuts.left_out.items())
        raise ValueError(f"{named} holds no cuts: it is empty" if not why else f"{named} holds no usable cuts: {why}")
    return cuts
