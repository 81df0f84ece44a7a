# SPDX-License-Identifier: Apache-2.0
"""Joins behavior targets that were made elsewhere (vLLM, TensorRT-LLM …) onto cuts.

Each line of the targets is a JSON object:
  {"cut_id": "u1", "task": "keywords", "prompt": "name the keywords", "response": "red boat", "finish_reason": "stop"}
finish_reason: `stop` or `eos` for a response that ended by itself, `length` for one that the length limit cut.
An optional "ids" holds the tokens that the LLM gave: training imitates them where the text encodes to others.
The output folder has the form of generated targets: shards cuts-00000.jsonl.gz … and targets.json, written last.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_mtbi.io.display import printable

TRUNCATED = {"stop": False, "eos": False, "length": True}  # by finish reason
FIELDS = ("cut_id", "task", "prompt", "response", "finish_reason")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", required=True, type=Path, metavar="FILE", help="Lhotse cuts, such as in.jsonl.gz")
    parser.add_argument(
        "--targets", required=True, type=Path, nargs="+", metavar="FILE", help="JSON lines, plain or .gz"
    )
    parser.add_argument("--llm", required=True, help="hash or name of the LLM that made them; training compares it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--chat",
        metavar="HASH",
        help="fingerprint of the chat format; training compares it and refuses targets that don't say it",
    )
    parser.add_argument(
        "--decoding",
        type=json.loads,
        default={},
        metavar="JSON",
        help='such as {"method": "greedy", "max_new_tokens": 64}',
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="cuts in a shard (%(default)s)")
    choices = ("raise", "skip")
    parser.add_argument("--on-missing", choices=choices, default="raise", help="cuts without any target (%(default)s)")
    parser.add_argument(
        "--on-unknown", choices=choices, default="raise", help="targets of cuts that are not there (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the targets that the folder holds")
    arguments = parser.parse_args(argv)
    if arguments.shard_size < 1:
        parser.error(f"--shard-size must be at least 1, got {arguments.shard_size}")
    if not isinstance(arguments.decoding, dict):
        parser.error("--decoding must be a JSON object in braces")
    return arguments


def parse_line(line: bytes) -> tuple[str, dict]:
    """The cut's id and the behavior of one line.

    Raises:
        ValueError: if the line is malformed; the message says how.
    """
    try:
        item = json.loads(line.decode())
    except (ValueError, RecursionError) as err:
        raise ValueError(f"not a line of JSON in UTF-8 ({err})") from err
    if not isinstance(item, dict):
        raise ValueError(f"not a JSON object but {type(item).__name__}")
    for field in FIELDS:
        if not isinstance(item.get(field), str):
            raise ValueError(f"'{field}' must be there and a string, got {item.get(field)!r}")
        try:
            item[field].encode()
        except UnicodeEncodeError as err:
            raise ValueError(f"'{field}' holds half of a surrogate pair, which is no text") from err
    for field in ("cut_id", "task"):
        if not item[field]:
            raise ValueError(f"'{field}' is empty")
    if item["finish_reason"] not in TRUNCATED:
        raise ValueError(
            f"finish_reason {item['finish_reason']!r} is not one of {', '.join(TRUNCATED)}: leave out responses "
            "that failed, and write `length` for those that the length limit cut"
        )
    ids = item.get("ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise ValueError(f"'ids' must be a list of token ids, got {ids!r}")
    return item["cut_id"], {
        "task": item["task"],
        "prompt": item["prompt"],
        "response": item["response"].strip(),  # as ChatFormat.decode gives it: some servers keep a leading space
        "truncated": TRUNCATED[item["finish_reason"]],
        **({} if ids is None else {"ids": ids}),
    }


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as err:
        raise ValueError(f"{path}: can't be read past line {number} ({err})") from err


def load_targets(paths: Iterable[Path], counts: Counter) -> dict[str, list[dict]]:
    """The behaviors of each cut, in the order of the lines.

    Raises:
        ValueError: if a line is malformed or repeats a question about a cut; the message names file and line.
    """
    targets: dict[str, list[dict]] = {}
    places: dict[tuple[str, str, str], str] = {}
    for path in paths:
        for number, line in read_lines(path):
            place = f"{path}, line {number}"
            try:
                cut_id, behavior = parse_line(line)
            except ValueError as err:
                raise ValueError(f"{place}: {err}") from err
            key = (cut_id, behavior["task"], behavior["prompt"])
            if key in places:
                raise ValueError(f"{place}: the same cut, task and prompt as in {places[key]}: remove one of them")
            places[key] = place
            counts["lines"] += 1
            counts["truncated"] += behavior["truncated"]
            rows = targets.setdefault(cut_id, [])
            if behavior["truncated"] and not behavior["response"]:
                counts["dropped_empty"] += 1  # neither a token nor an end to learn from
            else:
                rows.append(behavior)
    return targets


def survey(cuts: Iterable, targets: dict[str, list[dict]], arguments: argparse.Namespace, counts: Counter) -> int:
    """Finds what would stop the import before anything is written; returns the number of cuts with targets."""
    from nemo_mtbi.targets.store import check_without_data

    seen, missing = set(), []
    for cut in cuts:
        check_without_data(cut)
        if cut.id in seen:
            raise ValueError(f"{arguments.cuts}: two cuts have the id {cut.id}, so its targets would be mixed up")
        seen.add(cut.id)
        if not targets.get(cut.id):
            missing.append(cut.id)
    unknown = [cut_id for cut_id in targets if cut_id not in seen]
    counts["unknown_cuts"], counts["missing_cuts"] = len(unknown), len(missing)
    if unknown and arguments.on_unknown == "raise":
        raise ValueError(
            f"targets of {_some(unknown)}, which {arguments.cuts} does not hold: give the cuts that the targets were "
            "made from, or --on-unknown skip"
        )
    if missing and arguments.on_missing == "raise":
        raise ValueError(
            f"{_some(missing)} of {len(seen)} would be left without targets: make them, or leave these cuts out with "
            "--on-missing skip"
        )
    if len(seen) == len(missing):
        raise ValueError(f"none of the {len(seen)} cuts of {arguments.cuts} has a target: compare the ids")
    return len(seen) - len(missing)


def _some(ids: list[str]) -> str:
    return f"{len(ids)} cut{'s' * (len(ids) > 1)} ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"


def clear(out: Path, overwrite: bool) -> None:
    """Makes the folder; removes targets that it holds if that is allowed, the index first."""
    from nemo_mtbi.io.paths import make_folder
    from nemo_mtbi.targets.store import INDEX_FILE

    make_folder(out, "--out")
    old = [path for pattern in (INDEX_FILE, "cuts-*.jsonl.gz", "cuts-*.partial.jsonl") for path in out.glob(pattern)]
    if old and not overwrite:
        raise ValueError(f"{out} holds targets already ({old[0].name}): give another folder, or --overwrite")
    for path in old:
        path.unlink()


def import_targets(arguments: argparse.Namespace) -> Counter:
    """Joins and writes; returns the counts.

    Raises:
        ValueError: if something does not fit; nothing has been written then.
    """
    from nemo_mtbi.data.gate import open_manifest
    from nemo_mtbi.io.paths import refuse_overwriting
    from nemo_mtbi.io.sources import EVERYTHING
    from nemo_mtbi.targets import store as target_shards

    counts: Counter = Counter()
    targets = load_targets(arguments.targets, counts)
    cuts = open_manifest(arguments.cuts, EVERYTHING, remedy="leave the cut out")  # no audio is read here
    refuse_overwriting(
        {"--cuts": [arguments.cuts], "--targets": arguments.targets},
        {"--out": target_shards.written_files(arguments.out)},
    )
    total = survey(cuts, targets, arguments, counts)
    behaviors_from = {"llm": arguments.llm, "chat": arguments.chat, "decoding": arguments.decoding}
    with target_shards.own_share(arguments.out, "--out"):
        clear(arguments.out, arguments.overwrite)
        joined = (
            target_shards.with_behaviors(cut, targets[cut.id], behaviors_from) for cut in cuts if targets.get(cut.id)
        )
        for number, shard in enumerate(target_shards.split_into_shards(joined, arguments.shard_size)):
            target_shards.write_shard(target_shards.shard_path(arguments.out, number), shard)
            counts["shards"] += 1
            counts["cuts"] += len(shard)
            counts["rows"] += sum(len(targets[cut.id]) for cut in shard)
        target_shards.write_index(arguments.out, shards=counts["shards"], cuts=total, behaviors_from=behaviors_from)
    return counts


def main(argv: list[str] | None = None) -> int:
    """Make targets of the responses; return the exit status."""
    arguments = parse_arguments(argv)
    try:
        counts = import_targets(arguments)
    except (ValueError, RuntimeError, OSError) as err:
        print(f"error: {printable(str(err))}", file=sys.stderr)
        return 1
    print(
        f"{counts['cuts']} cuts with {counts['rows']} rows in {counts['shards']} shards in {arguments.out}\n"
        f"responses cut by the length limit: {counts['truncated']}, of these empty and dropped: "
        f"{counts['dropped_empty']}\ncuts left out without targets: {counts['missing_cuts']}, "
        f"targets left out because their cut is unknown: {counts['unknown_cuts']} cuts"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
