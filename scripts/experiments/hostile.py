#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Makes hostile archives from the parts of good ones and opens each as a user would.

Hypothesis plants hostile parts anywhere in the configurations and among the members of ``.nemo`` files: MTBI models,
small and full, and ASR models. Each is refused by name, or gives a model; in no case may code of the archive run, a
process start, a variable of the environment get into what is built or saved, or a file be written outside of the
working folder. Prints how many were refused, and ends with status 1 at the first archive that breaks this.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hostile_parts import (
    KEYS,
    MEMBERS,
    SECRET,
    SECRET_NAME,
    VALUES,
    Runs,
    Watch,
    evil_repository,
    raw_texts,
    sections,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LONGEST = 60.0  # seconds for one archive, on a machine that has other work
RAW = "RAW{}RAW"  # stands in a tree for YAML text that no honest writer gives


class Hostile:
    """A hostile archive; shown by what was done to make it.

    Attributes:
        kind: of the good archive.
        content: of the tar file.
        moves: what was done.
    """

    def __init__(self, kind: str, content: bytes, moves: list[str]):
        self.kind, self.content, self.moves = kind, content, moves

    def __repr__(self) -> str:
        return f"{self.kind}: {'; '.join(self.moves)}"


@dataclass
class Good:
    """A good archive: the content of its files, by name, and how a user opens it."""

    files: dict[str, bytes] = field(repr=False)
    opened: Callable[[Path], Any]
    configs: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.configs = [name for name in self.files if name.endswith(".yaml")]


# ----------------------------------------------------------------------------------------------------------- archives


def places(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    """All mappings and lists of a tree, by the keys that lead there."""
    if isinstance(tree, (dict, list)):
        yield at
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, key))


def plant(draw: Callable, tree: dict, hostile: list[Any], raws: list[str], used: list[str]) -> str:
    """Put one hostile part somewhere into a tree, and say what and where."""
    at = draw(st.sampled_from(list(places(tree))))
    holder: Any = tree
    for key in at:
        holder = holder[key]
    kind = draw(st.sampled_from(["section", "raw", "raw", "section", "value"]))
    if kind == "raw":
        used.append(draw(st.sampled_from(raws)))
        part: Any = RAW.format(len(used) - 1)
    else:
        part = draw(st.sampled_from(hostile if kind == "section" else VALUES))
    if isinstance(holder, list):
        holder.insert(draw(st.integers(0, len(holder))), part)
    elif kind == "raw" and draw(st.booleans()):
        holder[part] = draw(st.sampled_from(VALUES))  # as a key
    elif isinstance(part, dict) and draw(st.booleans()):
        holder.update(part)
    else:
        at = (*at, draw(st.sampled_from([*map(str, holder), *KEYS])))
        holder[at[-1]] = part
    return f"{'.'.join(map(str, at))}: {used[-1] if kind == 'raw' else part!r:.200}"


def dump(tree: dict, used: list[str]) -> bytes:
    """YAML of a tree with the raw texts in their places."""
    text = yaml.safe_dump(tree, sort_keys=False, width=10**6)
    for number in reversed(range(len(used))):
        text = text.replace(RAW.format(number), used[number])
    return text.encode("utf-8", "surrogatepass")


@st.composite
def archives(draw: Callable, goods: dict[str, Good], canary: Path, repository: Path) -> Hostile:
    """Hostile archives."""
    kind, moves = draw(st.sampled_from(sorted(goods))), []
    files, extra = dict(goods[kind].files), []
    hostile, raws = sections(canary, repository), raw_texts(canary)
    for _ in range(draw(st.integers(1, 3))):
        move = draw(st.sampled_from(["tree"] * 6 + ["member", "pickle", "link", "cut"]))
        name = draw(st.sampled_from(sorted(files)))
        if move == "tree":
            name = draw(st.sampled_from(goods[kind].configs))
            try:
                tree, used = yaml.safe_load(files[name]), []
                if isinstance(tree, dict):
                    done = plant(draw, tree, hostile, raws, used)
                    files[name] = dump(tree, used)
                    moves.append(f"{name} {done}")
            except (yaml.YAMLError, ValueError, RecursionError):  # hostile already
                continue
        elif move == "member":
            extra.append((tarfile.TarInfo(draw(st.sampled_from(MEMBERS))), b"import os\n" * 3))
        elif move == "pickle":
            files[name] = pickle.dumps(Runs(canary))
        elif move == "link":
            info = tarfile.TarInfo(name)
            info.type = draw(st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]))
            info.linkname = "/etc/passwd"
            extra.append((info, b""))
        else:
            files[name] = files[name][: draw(st.integers(0, len(files[name])))]
        if move != "tree":
            moves.append(f"{move} {extra[-1][0].name if move in ('member', 'link') else name}")
    return Hostile(kind, pack(files, extra, draw(st.booleans())), moves)


def pack(files: dict[str, bytes], extra: list[tuple[tarfile.TarInfo, bytes]], first: bool) -> bytes:
    """A tar file; ``extra`` members stand first or last."""
    members = [(tarfile.TarInfo(f"./{name}"), content) for name, content in files.items()]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in [*extra, *members] if first else [*members, *extra]:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


# --------------------------------------------------------------------------------------------------------------- good


def good_archives(folder: Path) -> dict[str, Good]:
    """Tiny models of every kind, saved, and how each is opened."""
    from omegaconf import OmegaConf

    from nemo_mtbi.encoders.ctc import save_asr
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.speech_llm.pretrained import load_asr_model, load_speech_encoder
    from nemo_mtbi.testing import tiny_asr_model, tiny_asr_nemo, tiny_text_llm

    asr, llm = tiny_asr_nemo(folder / "encoder.nemo"), tiny_text_llm(folder / "llm")
    section = {"pretrained_asr": str(asr), "pretrained_llm": str(llm), "connector": {"hidden_size": 24}}
    model = MTBIModel(OmegaConf.create(section))
    model.save_to(folder / "small.nemo")
    model.save_to(folder / "full.nemo", full=True)
    parts = {"encoder": {"freeze": ["layers"], "window_seconds": 10.0}, "lora": {"rank": 2}}
    MTBIModel(OmegaConf.create({**section, **parts})).save_to(folder / "rich.nemo")
    save_asr(tiny_asr_model(folder / "tokenizer"), folder / "tensors.nemo")

    def restored(path: Path) -> Any:
        model = MTBIModel.restore_from(path, map_location="cpu")
        model.save_to(path.with_name("again.nemo"))
        return str(model.cfg), path.with_name("again.nemo").read_bytes()

    def encoded(path: Path) -> Any:
        return str(load_speech_encoder(path))

    def opened_recognizer(path: Path) -> Any:
        return str(load_asr_model(path).cfg)

    opened = {"small": restored, "rich": restored, "full": restored, "tensors": opened_recognizer, "encoder": encoded}
    return {name: Good(_files(folder / f"{name}.nemo"), how) for name, how in opened.items()}


def _files(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {item.name.removeprefix("./"): tar.extractfile(item).read() for item in tar if item.isfile()}


def attack(folder: Path, count: int, seed: int) -> Counter:
    """Open so many hostile archives.

    Args:
        folder: empty; everything is made in it.
        count: of archives.
        seed: of their choice.

    Returns:
        How many were refused, and how many gave a model, by kind.

    Raises:
        AssertionError: if code ran, a secret got out, a file was written elsewhere, or an error names no archive.
    """
    from hypothesis import seed as seeded

    canary, work = folder / "CANARY", folder / "work"
    work.mkdir()
    repository, goods = evil_repository(folder / "repository", canary), good_archives(folder)
    watch, outcomes, raws = Watch(folder), Counter(), []
    before = set(os.listdir(folder))

    # no explanations: they print archives
    phases = (Phase.explicit, Phase.generate, Phase.shrink)

    @seeded(seed)
    @settings(phases=phases, max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(archives(goods, canary, repository))
    def one(archive: Hostile) -> None:
        kind, path = archive.kind, work / "hostile.nemo"
        path.write_bytes(archive.content)
        start = time.monotonic()
        with watch.watching():
            try:
                text, outcome = goods[kind].opened(path), "opened"
            except (ValueError, RuntimeError) as error:
                text, outcome = str(error), "refused"
            except Exception as error:  # a raw error, which names neither file nor remedy
                text, outcome = str(error), "raw"
                raws.append(f"{archive!r:.500} -> {type(error).__name__}: {error!s:.300} {_place(error)}")
        ran = canary.exists()
        canary.unlink(missing_ok=True)
        assert not ran and not watch.seen, f"code ran: {watch.seen}"
        assert SECRET not in str(text), "a variable of the environment got out"
        assert set(os.listdir(folder)) == before, "files were written elsewhere"
        assert time.monotonic() - start < LONGEST, "it took too long"
        outcomes[kind, outcome] += 1

    os.environ[SECRET_NAME] = SECRET
    try:
        with _temporary(work):
            one()
    finally:
        del os.environ[SECRET_NAME]
    assert not raws, "errors that name neither file nor remedy:\n" + "\n".join(raws)
    return outcomes


def _place(error: Exception) -> str:
    """Where an error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({frame.filename}:{frame.lineno})"


@contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Temporary files are made in the working folder, so that any other place is elsewhere."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def main() -> None:
    """Attack with hostile archives and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="archives")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = attack(Path(folder), arguments.count, arguments.seed)
    for (kind, outcome), number in sorted(outcomes.items()):
        print(f"{kind:8} {outcome:8} {number}")
    print(f"{sum(outcomes.values())} archives: no code ran, no variable got out, nothing was written elsewhere")


if __name__ == "__main__":
    main()
