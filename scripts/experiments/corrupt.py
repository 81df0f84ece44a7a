#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Damages stored files at random and checks that none is loaded: `python scripts/experiments/corrupt.py`.

Makes tiny models, a full `.nemo`, a small one with the parts that it refers to, checkpoints (one that is compared as
those with files above 64 MiB are), an encoder cache, targets, an unfinished run of targets, and answers of an
evaluation. Each corruption harms one copy of one of them: bits are flipped, blocks are zeroed, doubled or exchanged, a
file is cut off, gets bytes behind or changes places with another one. Then the copy is loaded in a process of its own.
It must be refused by a ValueError or RuntimeError that names it, or give bitwise what an undamaged one gives. Prints a
table; the exit status is 1 if a corruption is neither.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import select
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from corrupt_stores import STORES, Store, make_stores

LIMIT = 120  # seconds for one load
SHOWN = 300  # letters of a message


# -------------------------------------------------------------------------------------------------------- corruptions


def _somewhere(rng: random.Random, path: Path) -> tuple[int, int]:
    """A place in a file: its beginning, and how many bytes may be harmed. Small members of archives count as large."""
    size = path.stat().st_size
    if path.suffix == ".nemo" and rng.random() < 0.7:
        with tarfile.open(path) as tar:
            member = rng.choice([item for item in tar if item.isfile() and item.size])
        return member.offset_data + rng.randrange(member.size), member.size
    return rng.randrange(size) if size else 0, size


def _flipped(rng: random.Random, path: Path, times: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(times):
        data[_somewhere(rng, path)[0]] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _spliced(rng: random.Random, path: Path, change: Callable[[bytes], bytes]) -> None:
    """Put something in the place of a block."""
    data, (at, size) = path.read_bytes(), _somewhere(rng, path)
    length = min(rng.choice((1, 16, 512, 4096)), max(size, 1))
    path.write_bytes(data[:at] + change(data[at : at + length]) + data[at + length :])


def _exchanged_blocks(rng: random.Random, path: Path) -> None:
    data, length = bytearray(path.read_bytes()), 64
    blocks = len(data) // length
    if blocks < 2:
        return _flipped(rng, path)
    one = min(_somewhere(rng, path)[0] // length, blocks - 1)
    other = rng.choice([number for number in range(blocks) if number != one])
    first, second = (slice(number * length, (number + 1) * length) for number in (one, other))
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)


def _exchanged_files(rng: random.Random, path: Path) -> None:
    """Two members of an archive change places, or a file with another one of the same kind."""
    if path.suffix == ".nemo":
        with tarfile.open(path) as tar:
            members = {item.name: tar.extractfile(item).read() for item in tar if item.isfile()}
        one, other = rng.sample(sorted(members), 2)
        members[one], members[other] = members[other], members[one]
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return
    others = [item for item in sorted(path.parent.parent.rglob("*")) if item.is_file() and item != path]
    other = rng.choice([item for item in others if item.suffix == path.suffix] or others or [path])
    one, content = path.read_bytes(), other.read_bytes()
    path.write_bytes(content), other.write_bytes(one)


CORRUPTIONS: dict[str, Callable[[random.Random, Path], None]] = {
    "a flipped bit": _flipped,
    "ten flipped bits": lambda rng, path: _flipped(rng, path, 10),
    "a block of zeros": lambda rng, path: _spliced(rng, path, lambda block: bytes(len(block))),
    "a doubled block": lambda rng, path: _spliced(rng, path, lambda block: block * 2),
    "a lost block": lambda rng, path: _spliced(rng, path, lambda block: b""),
    "exchanged blocks": _exchanged_blocks,
    "exchanged files": _exchanged_files,
    "cut off": lambda rng, path: os.truncate(path, rng.randrange(path.stat().st_size)),
    "bytes behind": lambda rng, path: path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 512, 10240)))),
}


def corrupt(rng: random.Random, place: Path) -> tuple[str, str]:
    """Damage one file below a folder; returns how, and the file's name."""
    path = rng.choice([item for item in sorted(place.rglob("*")) if item.is_file() and item.stat().st_size])
    how = rng.choice(sorted(CORRUPTIONS))
    CORRUPTIONS[how](rng, path)
    return how, str(path.relative_to(place))


# ------------------------------------------------------------------------------------------------------------ running


def apart(work: Callable[[], str], limit: float = LIMIT) -> tuple[str, str]:
    """Work in a forked process: ``right`` and what it returns, ``refused`` or ``FAILED`` and the message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        try:
            outcome = f"right {work()}"
        except (ValueError, RuntimeError) as error:
            outcome = f"refused {error}"
        except BaseException as error:
            outcome = f"FAILED {type(error).__name__}: {error}"
        os.write(writing, outcome.encode("utf-8", "replace")[:60000])
        os._exit(0)
    os.close(writing)
    text, end = b"", time.monotonic() + limit
    while select.select([reading], [], [], max(end - time.monotonic(), 0))[0]:
        piece = os.read(reading, 65536)
        if not piece:
            break
        text += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    os.waitpid(child, 0)
    kind, _, message = text.decode().partition(" ")
    return (kind, message) if kind else ("FAILED", "its process died or did not end")


def judge(store: Store, place: Path, expected: str) -> tuple[str, str]:
    """Load what lies in a folder: ``right``, ``refused`` by name, or ``FAILED``, with the message."""
    kind, message = apart(lambda: store.load(place))
    if kind == "right" and message != expected:
        return "FAILED", "other content was loaded"
    if kind == "refused" and not any(name in message for name in (str(place), *store.named)):
        return "FAILED", f"the message does not name it: {message}"
    return kind, message


def _import() -> None:
    """Import what takes long once, before processes are forked."""
    import nemo.collections.asr.models  # noqa: F401

    import nemo_mtbi.models.mtbi_model  # noqa: F401
    import nemo_mtbi.testing  # noqa: F401


def run(count: int, seed: int, folder: Path, stores: Sequence[Store] = STORES) -> tuple[Counter, list[str]]:
    """Make and damage stores; returns (store, outcome) -> number, and a line for each that failed."""
    os.chdir(folder)
    outcomes, failed, expected = Counter(), [], {}
    _import()
    kind, message = apart(lambda: str(make_stores(folder, stores)), 10 * LIMIT)
    if kind != "right":
        raise RuntimeError(f"nothing to damage could be made: {message}")
    for store in stores:
        place = shutil.copytree(folder / store.name, folder / "undamaged" / store.name)
        kind, expected[store.name] = apart(lambda store=store, place=place: store.load(place))
        if kind != "right":
            raise RuntimeError(f"{store.name} can't be loaded undamaged: {expected[store.name]}")
    for number in range(count):
        store, rng = stores[number % len(stores)], random.Random(f"{seed} {number}")
        place = shutil.copytree(folder / store.name, folder / "damaged" / str(number))
        how, name = corrupt(rng, place)
        kind, message = judge(store, place, expected[store.name])
        outcomes[store.name, kind] += 1
        if kind == "FAILED":
            failed.append(f"number {number}, {store.name}: {how} in {name}: {message[:SHOWN]}")
        shutil.rmtree(place)
    return outcomes, failed


def table(outcomes: Mapping[tuple[str, str], int]) -> str:
    """Markdown: a row for each store."""
    lines = ["| stored | corruptions | refused by name | right | failed |", "|---|---|---|---|---|"]
    kinds = ("refused", "right", "FAILED")
    for name in dict.fromkeys(name for name, _ in outcomes):
        figures = [outcomes.get((name, kind), 0) for kind in kinds]
        lines.append(f"| {name} | {sum(figures)} | " + " | ".join(map(str, figures)) + " |")
    figures = [sum(number for (_, kind), number in outcomes.items() if kind == wanted) for wanted in kinds]
    lines.append(f"| all | {sum(figures)} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Damage stores and print what came of it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="corruptions")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, where and how")
    arguments = parser.parse_args(argv)
    from nemo_mtbi.commands.cli import quiet

    quiet()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, failed = run(arguments.count, arguments.seed, Path(folder).resolve())
    print(table(outcomes))
    print(f"\nseed {arguments.seed}, {time.monotonic() - started:.0f} s")
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
