# SPDX-License-Identifier: Apache-2.0
"""Which training checkpoints on disk are whole, and which one a run may resume from.

A checkpoint is a folder. It is written in ``.saving`` beside its place, gets its marker when all of its files are on
disk, and is then moved to its place. So a save that was interrupted never takes the place of a whole checkpoint, and
what has no marker, or files that differ from it, is no checkpoint.

NeMo's checkpoint callback keeps marks of its own (``NAME-unfinished`` beside ``NAME``) while it saves and removes;
after a kill they may stand beside a whole checkpoint, which NeMo would then delete. :func:`recover` clears them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_mtbi.io.digests import HashingWriter
from nemo_mtbi.parallel.checkpoint.digests import BLOCK, FileMark, check_signed, mark_of, signed
from nemo_mtbi.parallel.checkpoint.digests import measure as measure

logger = logging.getLogger(__name__)

MARKER = "checkpoint.json"
FORMAT_VERSION = 2  # 1 had no digests of files above HASHED_BYTES, nor of the marker itself
HASHED_BYTES = 64 * 2**20  # larger files are compared when they are loaded: reading them twice would delay every start
_SAVING, _BROKEN = ".saving", ".broken"  # folders beside checkpoints; NeMo takes neither for one
_REPLACED, _REMOVED = ".replaced", ".removed"  # what becomes of a checkpoint, in `.saving`
_CONTENT = (MARKER, "metadata.json", ".metadata", "common.pt")
_LAST = re.compile(r".*-last(-v\d+)?")  # how NeMo and Lightning name the newest checkpoint

CAUSES = {  # error number: cause and remedy
    errno.ENOSPC: ("no space left on the device", "free space there"),
    errno.EDQUOT: ("the disk quota is used up", "free space there or have the quota raised"),
    errno.EFBIG: ("a file would be larger than the limit", "raise it with `ulimit -f`"),
    errno.EROFS: ("the file system is read-only", "have it mounted for writing"),
    errno.EACCES: ("no permission", "give this user the right to read and write there"),
    errno.EPERM: ("no permission", "give this user the right to read and write there"),
    errno.ENOTDIR: ("a part of the path is a file", "correct the path"),
    errno.EIO: ("the device reports an input/output error", "check the disk or the network file system"),
}


@dataclass(frozen=True)
class Marker:
    """Content of the marker file of a complete checkpoint.

    Attributes:
        step: optimizer steps taken.
        epoch: the one that was running.
        serial: counts the saves of a folder; the largest is the newest, whatever the clocks say.
        layout: sizes of the parallel layout that has written it; for people, since any layout can read it.
        files: name -> what the file must be.
    """

    step: int
    epoch: int
    serial: int
    layout: Mapping[str, Any]
    files: Mapping[str, FileMark]


# ------------------------------------------------------------------------------------------------------------- names


def folder_of(path: str | Path) -> Path:
    """Return the folder of a checkpoint, from the path that Lightning or NeMo gave it (with or without ``.ckpt``).

    Raises:
        ValueError: for an address that is not a local path.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is not a local path: checkpoints are written to a file system that all nodes share")
    return Path(str(path).removesuffix(".ckpt")).absolute()


def unfinished_mark(folder: Path) -> Path:
    """Return the path of NeMo's mark that it is saving or removing a checkpoint."""
    return Path(f"{folder}-unfinished")


# ------------------------------------------------------------------------------------------------------------ errors


def explain_system_error(error: BaseException) -> str:
    """Return cause and remedy of an error in one line; the cause is the first error of the system in its chain."""
    system: OSError | None = None
    link: BaseException | None = error
    number, seen = 0, set()
    while link is not None and id(link) not in seen and not isinstance(link, ValueError):
        seen.add(id(link))
        if isinstance(link, OSError) and link.errno:
            system, number = link, link.errno
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    if system is None:
        return str(error) or type(error).__name__
    cause, remedy = CAUSES.get(number, (os.strerror(number), "see that it can be read and written"))
    name = os.fsdecode(system.filename) if isinstance(system.filename, bytes) else system.filename
    where = f" ({name})" if name else ""
    return f"{cause}{where}: {remedy}, or use another folder (exp_manager.exp_dir)"


# ------------------------------------------------------------------------------------------------------------ marker


def write_durably(path: Path, content: bytes) -> FileMark:
    """Write a file, wait until the device has it, and return its mark."""
    with open(path, "wb") as file:
        hashed = HashingWriter(file, BLOCK)
        hashed.write(content)
        os.fsync(hashed.fileno())
    return mark_of(hashed)


def sync_folder(folder: Path) -> None:
    """Wait until the device has the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't, and need not
            raise
    finally:
        os.close(handle)


def write_marker(folder: Path, marker: Marker) -> None:
    """Declare the checkpoint whole; the last thing that is written."""
    values = {"format": FORMAT_VERSION, **asdict(marker)}
    content = json.dumps(signed(values), indent=1).encode()
    write_durably(folder / f"{MARKER}.part", content)
    os.replace(folder / f"{MARKER}.part", folder / MARKER)
    sync_folder(folder)


def read_marker(folder: Path) -> Marker:
    """Return the marker of a checkpoint, whose files are not looked at.

    Raises:
        ValueError: if there is none or it can't be read; names the folder and the reason.
    """
    try:
        content = json.loads((folder / MARKER).read_bytes())
        if content["format"] > FORMAT_VERSION:
            raise ValueError(
                f"{folder} has checkpoint format {content['format']}, this version reads up to {FORMAT_VERSION}: "
                "update nemo_mtbi"
            )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder} is not a whole checkpoint: it has no {MARKER}, so its save was not finished"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged_marker(folder, error) from error
    try:
        check_signed(content)
        del content["format"]
        files = {name: FileMark(**mark) for name, mark in content.pop("files").items()}
        return Marker(**content, files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged_marker(folder, error) from error


def _damaged_marker(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder} is not a whole checkpoint: its {MARKER} is damaged ({error})")


def check(folder: Path) -> Marker:
    """Compare the files of a checkpoint with its marker: large ones by size, since they are compared when loaded.

    Raises:
        ValueError: if it is not whole; names the folder, the file and what is wrong.
    """
    marker = read_marker(folder)
    for name, expected in marker.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is not a whole checkpoint: {name} is missing")
        size = path.stat().st_size
        if size != expected.size:
            raise ValueError(f"{folder} is not a whole checkpoint: {name} has {size} of {expected.size} bytes")
        if size <= HASHED_BYTES and expected.sha256 is not None and not expected.fits(path):
            raise ValueError(
                f"{folder} is not a whole checkpoint: the content of {name} has changed since it was saved"
            )
    return marker


def next_serial(folder: Path) -> int:
    """Return the serial number of the next save in a folder of checkpoints."""
    serials = [0]
    for path in candidates(folder):
        try:
            serials.append(read_marker(path).serial)
        except ValueError:
            continue  # what is broken is reported where a run resumes
    return 1 + max(serials)


# ------------------------------------------------------------------------------------------------- moving and removing


def staging_of(folder: Path) -> Path:
    """Return where a checkpoint is written before it is moved to ``folder``."""
    return folder.parent / _SAVING / folder.name


def prepare_staging(folder: Path) -> None:
    """Make an empty folder to write a checkpoint in, which :func:`commit` moves to ``folder``."""
    staging = staging_of(folder)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def commit(folder: Path) -> None:
    """Move a whole checkpoint to its place. One that stands there goes when the new one has taken its place."""
    replaced = _in_saving(folder, _REPLACED)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(staging_of(folder), folder)
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # recover() clears what is left
    _remove_if_empty(replaced.parent)


def abandon(folder: Path) -> None:
    """Clear what a failed save has left, as far as the device lets; a checkpoint that stood there stays."""
    staging = staging_of(folder)
    replaced = Path(f"{staging}{_REPLACED}")
    if replaced.is_dir() and not folder.exists():
        os.rename(replaced, folder)
    shutil.rmtree(staging, ignore_errors=True)
    _remove_if_empty(staging.parent)
    if (folder / MARKER).is_file():  # or NeMo would delete it at the next start
        try:
            unfinished_mark(folder).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{unfinished_mark(folder)} can't be removed ({error}); {folder} itself is whole")


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is moved away first, so that no partly deleted one is ever found."""
    removed = _in_saving(folder, _REMOVED)
    os.rename(folder, removed)
    shutil.rmtree(removed)
    _remove_if_empty(removed.parent)


def _in_saving(folder: Path, suffix: str) -> Path:
    """Return a free place to move a checkpoint to."""
    path = Path(f"{staging_of(folder)}{suffix}")
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    return path


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # another checkpoint is in it, or it is gone
        return


# ---------------------------------------------------------------------------------------------------------- resuming


def candidates(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints of a folder, and what looks like one."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            if _LAST.fullmatch(path.name) or any((path / name).exists() for name in _CONTENT):
                yield path


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a folder.

    Attributes:
        last: the newest whole checkpoint; ``None``: there is none.
        broken: newer ones that are not whole, and what has no readable marker -> the reason.
    """

    last: Path | None
    broken: Mapping[Path, str]


def survey(folder: Path, without: Path | None = None) -> Survey:
    """Find the newest whole checkpoint; the one ``without`` is passed over. Nothing is changed."""
    marked, broken = [], {}
    for path in candidates(folder):
        if path == without:
            continue
        try:
            marked.append((read_marker(path).serial, path))
        except ValueError as error:
            broken[path] = str(error)
    for _, path in sorted(marked, reverse=True):
        try:
            check(path)
            return Survey(path, broken)
        except ValueError as error:
            broken[path] = str(error)
    return Survey(None, broken)


def _choose(surveyed: Survey, folder: Path) -> Path | None:
    """Return the checkpoint to resume from; warn of newer ones that are broken."""
    if surveyed.last is None:
        if surveyed.broken:
            raise ValueError(
                f"no checkpoint in {folder} can be resumed from: {'; '.join(surveyed.broken.values())}. Restore one "
                "of them, or remove them to begin anew"
            )
        return None
    for reason in surveyed.broken.values():
        logger.warning(f"{reason}; {surveyed.last.name} is used instead")
    return surveyed.last


def find_last_whole(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a folder; warn of broken ones by name. Nothing is changed.

    Returns:
        ``None`` if there is no checkpoint.

    Raises:
        ValueError: if there are checkpoints and none of them is whole.
    """
    return _choose(survey(Path(folder)), Path(folder))


def recover(folder: str | Path) -> Path | None:
    """Tidy up what a killed run has left, so that NeMo finds one newest checkpoint, and return that.

    A save that was complete but for the last move is moved; one that was not is cleared. NeMo's marks beside whole
    checkpoints are removed. Broken checkpoints are moved to ``.broken``. Of several ``-last`` only the newest stays,
    as if the run had gone on.

    Raises:
        ValueError: if there are checkpoints and none of them is whole; they stay where they are then.
        OSError: if the folder can't be changed.
    """
    folder = Path(folder)
    _finish_moves(folder)
    surveyed = survey(folder)
    last = _choose(surveyed, folder)
    if last is None:
        return None
    for path in surveyed.broken:
        _move_aside(path)
    for path in list(candidates(folder)):
        if path != last and _LAST.fullmatch(path.name) and _LAST.fullmatch(last.name):
            logger.info(f"{path} is removed: {last.name} is newer")
            remove(path)
        elif unfinished_mark(path).exists():  # else nothing is to be changed, nor has the folder to be writable
            unfinished_mark(path).unlink()
    return last


def _finish_moves(folder: Path) -> None:
    """End what :func:`commit` was doing, and clear what was still being written or removed."""
    saving = folder / _SAVING
    if not saving.is_dir():
        return
    for path in sorted(saving.iterdir()):  # `NAME.replaced` comes behind `NAME`
        place = folder / path.name.removesuffix(_REPLACED)
        if path.suffix == _REMOVED:
            continue
        try:
            check(path)
        except ValueError:
            continue
        if path.suffix == _REPLACED and not place.exists():
            os.rename(path, place)
        elif path == staging_of(place):
            commit(place)
    shutil.rmtree(saving, ignore_errors=True)


def _move_aside(path: Path) -> None:
    target, number = path.parent / _BROKEN / path.name, 0
    while target.exists():
        number += 1
        target = path.parent / _BROKEN / f"{path.name}.{number}"
    target.parent.mkdir(exist_ok=True)
    os.rename(path, target)
    logger.warning(f"{path.name} was moved to {target}")
