# SPDX-License-Identifier: Apache-2.0
"""Behavior targets: the responses of the text LLM to (prompt, transcript), written into the cuts.

The cuts are split into contiguous shards. The requests about the cuts of a shard, and their batches, are a pure
function of the shard. Each finished batch goes to the shard's partial file, so that a run that was killed goes on
with the next batch and ends with the same bytes as one that never stopped::

    OUT/cuts-00000.jsonl.gz          a finished shard: cuts with `behaviors` and `behaviors_from`
    OUT/cuts-00001.partial.jsonl     a shard in the making: a header, then a line per finished batch
    OUT/targets.json                 written last: the number of shards and where the behaviors come from
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, load_jsonl

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.config.checks import RAISE_OR_SKIP, at_least
from nemo_mtbi.data.behaviors import BEHAVIORS, PROVENANCE, Behavior, transcript
from nemo_mtbi.data.gate import GatedCuts
from nemo_mtbi.data.manifest_lines import EntryFilter
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.locks import exclusive
from nemo_mtbi.io.sources import EVERYTHING
from nemo_mtbi.targets.origin import (
    behaviors_from,
    origin_difference,
    same_header,
    same_origin,
    without_format,
)
from nemo_mtbi.targets.plan import Request, TargetPlan, plan_shard
from nemo_mtbi.targets.progress import TargetsMeter
from nemo_mtbi.targets.store import (
    FORMAT,
    check_without_data,
    own_share,
    read_targets,
    shard_path,
    split_into_shards,
    surplus_shards,
    with_behaviors,
    write_index,
    write_shard,
)
from nemo_mtbi.targets.tasks import TaskPool

__all__ = ["TargetPlan", "generate_targets", "read_targets"]

logger = logging.getLogger(__name__)

BATCH_ROWS = "batch_rows"  # key of a partial file's header
_DIGEST = "sha256"  # key of a line in a partial file
BAD_ENTRY = "skipped_bad_"  # before the reason, in counts
LEAVE_OUT = "set on_missing_text=skip to leave it out"

# A batch of prompt layouts (token ids) → for each (response ids without the end token, cut by the length limit?).
Respond = Callable[[list[list[int]]], list[tuple[list[int], bool]]]
Answer = Sequence[Any]  # text, truncated, and the ids, which older partial files lack


def generate_targets(
    cuts: Iterable[Cut],
    out_dir: str | Path,
    *,
    pool: TaskPool,
    chat: ChatFormat,
    respond: Respond,
    provenance: dict,
    plan: TargetPlan | None = None,
    shard_size: int = 1000,
    on_missing_text: str = "raise",
    overwrite: bool = False,
    outdated: Iterable[Path] = (),
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    counts: Counter | None = None,
    batch_rows: int | None = None,
) -> list[Path]:
    """Write cuts with the text LLM's responses; return the shards of this process. A former run is resumed.

    Args:
        cuts: input; behaviors that they carry already are replaced. Read twice (a one-way stream is kept in memory).
        out_dir: folder of the shards.
        pool: tasks and wordings.
        chat: chat format and tokenizer of the LLM.
        respond: the LLM, greedy, with ``plan.max_new_tokens`` as its limit.
        provenance: JSON values that say which LLM this is: ``llm`` (its hash) and what else the user wants to keep.
        plan: which tasks and wordings are drawn for each cut.
        shard_size: cuts in a shard.
        on_missing_text: ``raise`` or ``skip`` cuts without a transcript or with values of a wrong type.
        overwrite: replace what was made by another LLM, pool or plan or from other cuts; the rest is kept.
        outdated: files that were made from the shards, which ``overwrite`` removes first.
        rank: this process takes the shards ``rank``, ``rank + world_size``, …
        world_size: number of processes that make targets.
        progress: show a bar; a line every 30 seconds where there is no terminal.
        counts: gets ``cuts``, ``rows``, ``truncated``, ``dropped_empty`` (responses both empty and truncated),
            ``skipped_no_text``, ``skipped_bad_`` and a reason, ``reused_shards``, ``reused_batches``, ``replaced`` (by
            ``overwrite``) added.
        batch_rows: rows of a batch at most, which a kill loses; None: as many as ``plan.batch_tokens`` allows. A shard
            in the making keeps the bound that it was begun with: its bytes don't change.

    Raises:
        ValueError: if an argument or a cut is not legal.
        RuntimeError: if ``out_dir`` holds what was made otherwise and ``overwrite`` is not set, or another run is
            making the same shards.
    """
    plan, counts = plan or TargetPlan(), Counter() if counts is None else counts
    _check_arguments(shard_size, on_missing_text, rank, world_size)
    origin = behaviors_from(provenance, plan, pool, chat)
    cuts = list(cuts) if iter(cuts) is cuts else cuts
    if not isinstance(cuts, GatedCuts):
        cuts = GatedCuts(cuts, EVERYTHING, EntryFilter(on_missing_text == "skip", LEAVE_OUT), restart=True)
    total = _survey(cuts, on_missing_text, counts)
    num_shards = -(-total // shard_size)
    out_dir = Path(out_dir)
    own = range(rank, num_shards, world_size)
    paths, work = [], sum(min(shard_size, total - number * shard_size) for number in own)
    with own_share(out_dir, rank=rank), TargetsMeter(work, progress) as meter:
        _prepare(out_dir, num_shards, overwrite, outdated)
        maker = _ShardMaker(out_dir, plan, pool, chat, respond, origin, overwrite, counts, meter, batch_rows)
        usable = (cut for cut in cuts if transcript(cut))
        for number, shard in enumerate(split_into_shards(usable, shard_size)):
            if number in own:
                with exclusive(shard_path(out_dir, number), "output_dir"):  # of a run with another world_size
                    paths.append(maker.make(number, shard))
        write_index(out_dir, shards=num_shards, cuts=total, behaviors_from=origin)
    left_out = counts["dropped_empty"] + sum(count for key, count in counts.items() if key.startswith("skipped"))
    level = logging.WARNING if left_out else logging.INFO
    logger.log(level, "targets in %s: %s", out_dir, dict(+counts))
    return paths


def _check_arguments(shard_size: int, on_missing_text: str, rank: int, world_size: int) -> None:
    at_least(1).check("shard_size", shard_size)
    RAISE_OR_SKIP.check("on_missing_text", on_missing_text)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not below world_size {world_size}: give each process a rank of its own")


def _survey(cuts: GatedCuts, on_missing_text: str, counts: Counter) -> int:
    """Count the usable cuts, and refuse what would stop the run after the LLM has worked for hours."""
    total, missing = 0, []
    for cut in cuts:
        if not transcript(cut):
            missing.append(cut.id)
            continue
        total += 1
        check_without_data(cut)
    if missing and on_missing_text == "raise":
        raise ValueError(
            f"{len(missing)} of {total + len(missing)} cuts have no transcript ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}): add supervisions with text or set on_missing_text=skip"
        )
    if not total:
        raise ValueError(f"no cut to make targets for: {len(missing)} cuts have no transcript and there are no others")
    counts["skipped_no_text"] += len(missing)
    counts.update({BAD_ENTRY + reason: count for reason, count in cuts.left_out.items()})
    return total


def _prepare(out_dir: Path, num_shards: int, overwrite: bool, outdated: Iterable[Path]) -> None:
    surplus = surplus_shards(out_dir, num_shards)
    if surplus and not overwrite:
        raise RuntimeError(
            f"{surplus[0]} was made from other cuts or with another shard_size (here there are {num_shards} shards): "
            "set overwrite=true to replace it, or give another folder"
        )
    for path in (*surplus, *(outdated if overwrite else ())):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _ShardMaker:
    out_dir: Path
    plan: TargetPlan
    pool: TaskPool
    chat: ChatFormat
    respond: Respond
    behaviors_from: dict
    overwrite: bool
    counts: Counter
    meter: TargetsMeter
    batch_rows: int | None

    def make(self, number: int, cuts: list[Cut]) -> Path:
        path = shard_path(self.out_dir, number)
        partial = self.out_dir / f"cuts-{number:05d}.partial.jsonl"
        if path.exists() and self._finished(path, cuts):
            self.counts["reused_shards"] += 1
            self.meter.advance(len(cuts))
        else:
            rows = self._rows_of_batch(partial)
            requests, batches = plan_shard(cuts, self.plan, self.pool, self.chat, rows)
            answers = self._answer(partial, cuts, requests, batches, rows)
            write_shard(path, self._attach(cuts, requests, answers))
            logger.info("%s: %d cuts, %d rows", path.name, len(cuts), len(requests))
        partial.unlink(missing_ok=True)
        self.counts["cuts"] += len(cuts)
        return path

    def _attach(self, cuts: list[Cut], requests: list[Request], answers: dict[int, Answer]) -> list[Cut]:
        behaviors: list[list[Behavior]] = [[] for _ in cuts]
        for index, request in enumerate(requests):
            text, truncated, *ids = answers[index]
            known = tuple(ids[0]) if ids and self.chat.decodes_to(ids[0], text) else None
            behaviors[request.cut].append(Behavior(request.task, request.prompt, text, truncated, known))
        # Empty and truncated: neither a token nor an end to learn from. A cut that has nothing else keeps them, or
        # training would take it for a cut that nobody made targets for; it leaves such a cut out and counts it.
        kept = [[row for row in rows if row.teaches] or rows for rows in behaviors]
        self._count(kept, len(requests))
        return self._carrying(cuts, kept)

    def _carrying(self, cuts: list[Cut], behaviors: list[list[Behavior]]) -> list[Cut]:
        return [
            with_behaviors(cut, [row.to_dict() for row in rows], self.behaviors_from)
            for cut, rows in zip(cuts, behaviors, strict=True)
        ]

    def _count(self, behaviors: list[list[Behavior]], requested: int) -> None:
        rows = [row for rows in behaviors for row in rows if row.teaches]
        dropped = requested - len(rows)
        truncated = dropped + sum(row.truncated for row in rows)
        self.counts.update(rows=len(rows), dropped_empty=dropped, truncated=truncated)

    # ----- what a former run left

    def _refuse(self, path: Path, why: str) -> None:
        """Raise, or with ``overwrite`` remove a file that can't be continued."""
        if not self.overwrite:
            raise RuntimeError(
                f"{path} {why}: set overwrite=true to make it anew (what fits is kept), run with the settings "
                "that it was made with, or give another folder"
            )
        self.counts["replaced"] += 1
        path.unlink()

    def _finished(self, path: Path, cuts: list[Cut]) -> bool:
        """Return whether the shard holds these cuts with behaviors of this plan and LLM."""
        try:
            stored = [deserialize_item(item) for item in load_jsonl(path)]
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as err:
            self._refuse(path, f"can't be read ({type(err).__name__}: {err})")
            return False
        origins = [(cut.custom or {}).get(PROVENANCE) for cut in stored]
        same = [(cut.id, transcript(cut)) for cut in stored] == [(cut.id, transcript(cut)) for cut in cuts]
        strange = [
            origin for origin in origins if not same_origin(origin, self.behaviors_from)
        ]  # says the seed and the pool, too
        if strange or not same:
            self._refuse(path, origin_difference(strange[0] if strange else self.behaviors_from, self.behaviors_from))
            return False
        behaviors = [[Behavior.from_dict(row, cut.id) for row in cut.custom[BEHAVIORS]] for cut in stored]
        tasks = self.plan.tasks(self.pool)
        self._count(behaviors, sum(len(self.plan.draws(cut.id, tasks)) for cut in cuts))
        fresh = self._carrying(cuts, behaviors)
        if [cut.to_dict() for cut in fresh] != [cut.to_dict() for cut in stored]:
            write_shard(path, fresh)  # the answers hold; paths, alignments or other fields of the input are newer
        return True

    def _rows_of_batch(self, path: Path) -> int | None:
        """Return the bound on rows that a partial file was begun with: other batches may round to other answers."""
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            line = file.readline()
            header = _parse(line) if line.endswith(b"\n") else None
            if isinstance(header, dict):
                rows = header.get(BATCH_ROWS)
                return rows if type(rows) is int and rows > 0 else None
        return self.batch_rows

    def _answer(
        self, path: Path, cuts: list[Cut], requests: list[Request], batches: list[list[int]], rows: int | None
    ) -> dict[int, Answer]:
        """Return the answers by index of their request, from the partial file as far as it goes, then from the LLM."""
        content = [[cuts[r.cut].id, r.task, r.prompt, r.limit, list(r.layout)] for r in requests]
        fingerprint = digest_of([FORMAT, without_format(self.behaviors_from), batches, content])
        header: dict[str, Any] = {"fingerprint": fingerprint, PROVENANCE: self.behaviors_from}
        header |= {} if rows is None else {BATCH_ROWS: rows}
        finished, keep = self._read_partial(path, header, [len(batch) for batch in batches])
        self.counts["reused_batches"] += len(finished)
        share = len(cuts) / len(requests)
        self.meter.advance(share * sum(len(batch) for batch in batches[: len(finished)]))
        with open(path, "r+b" if keep else "wb") as file:
            file.truncate(keep)
            file.seek(keep)
            if not keep:
                _append(file, header)
            for number, batch in enumerate(batches[len(finished) :], start=len(finished)):
                self.meter.ask(len(batch))
                started = time.monotonic()
                finished.append(self._ask([requests[i] for i in batch]))
                _append(file, {"batch": number, "answers": finished[-1]})
                self.meter.advance(share * len(batch), len(batch), time.monotonic() - started)
        pairs = zip(batches, finished, strict=True)
        return {index: tuple(answer) for batch, answers in pairs for index, answer in zip(batch, answers, strict=True)}

    def _ask(self, requests: list[Request]) -> list[Answer]:
        responses = self.respond([list(request.layout) for request in requests])
        if len(responses) != len(requests):
            raise RuntimeError(f"the LLM gave {len(responses)} responses to {len(requests)} prompts: fix `respond`")
        return [
            [
                self.chat.decode(ids[: request.limit]),
                bool(truncated) or len(ids) > request.limit,
                list(ids[: request.limit]),
            ]
            for request, (ids, truncated) in zip(requests, responses, strict=True)
        ]

    def _read_partial(self, path: Path, header: dict, sizes: list[int]) -> tuple[list[list[Answer]], int]:
        """Return the finished batches in order, and how many bytes of the file they fill (0: begin anew)."""
        data = path.read_bytes() if path.exists() else b""
        lines = io.BytesIO(data)  # splits at line feeds only
        first = lines.readline()
        if not first.endswith(b"\n"):  # missing, or killed while the header was written
            return [], 0
        stored = _parse(first)
        if not same_header(stored, header):
            other = stored.get(PROVENANCE) if isinstance(stored, dict) else None
            self._refuse(path, origin_difference(other, self.behaviors_from))
            return [], 0
        finished: list[list[Answer]] = []
        keep = len(first)
        for line in lines:
            answers = _parse_batch(line, len(finished), sizes)
            if answers is None:
                logger.warning(
                    "%s: %d bytes from a torn or damaged batch on dropped, they are asked again",
                    path,
                    len(data) - keep,
                )
                break
            finished.append(answers)
            keep += len(line)
        return finished, keep


def _append(file: BinaryIO, value: dict) -> None:
    file.write(json.dumps({**value, _DIGEST: digest_of(value)}).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _parse(line: bytes) -> object:
    """Return the value of a line without its digest; None if it is torn or damaged. Older lines have no digest."""
    try:
        value = json.loads(line)
    except ValueError:  # torn in the middle of JSON or of a character
        return None
    digest = value.pop(_DIGEST, None) if isinstance(value, dict) else None
    return value if digest is None or digest == digest_of(value) else None


def _parse_batch(line: bytes, number: int, sizes: list[int]) -> list[Answer] | None:
    """Return the answers of batch ``number``; None if the line is torn or is not that batch."""
    value = _parse(line) if line.endswith(b"\n") else None
    if not isinstance(value, dict) or value.get("batch") != number or number >= len(sizes):
        return None
    answers = value.get("answers")
    whole = isinstance(answers, list) and len(answers) == sizes[number]
    return answers if whole else None
