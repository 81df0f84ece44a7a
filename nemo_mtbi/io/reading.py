# SPDX-License-Identifier: Apache-2.0
"""Guards before Lhotse's backends for files and audio: inside :class:`Reading` they open only what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any

from lhotse import AudioSource
from lhotse.audio import AudioLoadingError
from lhotse.audio.backend import (
    AudioBackend,
    LibsndfileCompatibleAudioInfo,
    get_current_audio_backend,
    set_current_audio_backend,
)
from lhotse.serialization import IOBackend, get_current_io_backend, set_current_io_backend

from nemo_mtbi.compat.lhotse import check_before_loading
from nemo_mtbi.io.sources import ForbiddenSourceError, SourcePolicy, check_cut
from nemo_mtbi.io.text_files import TextOpener


class GuardedIOBackend(IOBackend):
    """Backend that opens what another backend opens, if the reading under way allows it.

    Args:
        inner: the other backend.
    """

    def __init__(self, inner: IOBackend):
        self.inner = inner

    def open(self, identifier: Any, mode: str) -> Any:
        """Open a path or address for ``open_best``.

        Raises:
            ForbiddenSourceError: if the reading under way does not allow it.
        """
        reading = active()
        if reading is None:
            return self.inner.open(identifier, mode)
        reading.check(reading.policy.check, str(identifier))
        stream = self.inner.open(identifier, mode)
        return _Lines(stream, str(identifier), reading) if reading.lines and mode in ("r", "rt") else stream

    def handles_special_case(self, identifier: Any) -> bool:
        """Return what the other backend returns."""
        return self.inner.handles_special_case(identifier)

    def is_applicable(self, identifier: Any) -> bool:
        """Return what the other backend returns."""
        return self.inner.is_applicable(identifier)


class _Lines:
    """A text file whose lines pass through ``Reading.lines`` when it is iterated."""

    def __init__(self, stream: Any, path: str, reading: Reading):
        self._stream, self._path, self._reading = stream, path, reading

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._stream, start=1):
            number = getattr(self._stream, "line_number", number)  # ours leaves empty lines out
            line = self._reading.lines(line, self._path, number)
            if line is not None:
                yield line

    def __enter__(self) -> _Lines:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._stream.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class GuardedAudioBackend(AudioBackend):
    """Backend that reads audio as another backend does, if the reading under way allows the name of the file.

    Args:
        inner: the other backend.
    """

    def __init__(self, inner: AudioBackend):
        self.inner = inner

    def read_audio(self, path_or_fd: Any, *args: Any, **kwargs: Any) -> Any:
        """Read samples.

        Raises:
            ForbiddenSourceError: if the reading under way does not allow the file.
        """
        _check_audio(path_or_fd)
        return self.inner.read_audio(path_or_fd, *args, **kwargs)

    def info(self, path_or_fd: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a header.

        Raises:
            ForbiddenSourceError: if the reading under way does not allow the file.
        """
        _check_audio(path_or_fd)
        try:
            return self.inner.info(path_or_fd, *args, **kwargs)
        except AudioLoadingError:
            reading = active()
            if reading is None or not reading.postpone or not hasattr(path_or_fd, "read"):
                raise
            return LibsndfileCompatibleAudioInfo(channels=1, frames=16000, samplerate=16000, duration=1.0)

    def save_audio(self, *args: Any, **kwargs: Any) -> None:
        """Save audio by the other backend."""
        self.inner.save_audio(*args, **kwargs)

    def handles_special_case(self, path_or_fd: Any) -> bool:
        """Return what the other backend returns."""
        return self.inner.handles_special_case(path_or_fd)

    def is_applicable(self, path_or_fd: Any) -> bool:
        """Return what the other backend returns."""
        return self.inner.is_applicable(path_or_fd)

    def supports_save(self) -> bool:
        """Return what the other backend returns."""
        return self.inner.supports_save()

    def supports_info(self) -> bool:
        """Return what the other backend returns."""
        return self.inner.supports_info()


def _check_audio(path_or_fd: Any) -> None:
    reading = active()
    if reading is not None and not hasattr(path_or_fd, "read"):
        reading.check(reading.policy.check_audio, str(path_or_fd))


def install() -> None:
    """Put the guards before Lhotse's current backends, unless they are there, and our opener of text files.

    Outside a reading the guards do nothing. May be called again and again.
    """
    io, audio = get_current_io_backend(), get_current_audio_backend()
    if not isinstance(io, GuardedIOBackend):
        set_current_io_backend(GuardedIOBackend(io if isinstance(io, TextOpener) else TextOpener(io)))
    if not isinstance(audio, GuardedAudioBackend):
        set_current_audio_backend(GuardedAudioBackend(audio))
    check_before_loading(_check_source)


def _check_source(source: AudioSource) -> None:
    """Check an audio source as a whole: Lhotse runs those of type ``command`` without a backend."""
    reading = active()
    if reading is not None:
        reading.check(lambda item, place: check_cut(item, reading.policy, place), source)


class Reading:
    """A block of code in which Lhotse and NeMo open only what the policy allows: ``with Reading(policy): next(cuts)``.

    A refusal ends the block with its error even where the code of others has caught it, as some readers do. Outside
    such blocks, and in other threads, Lhotse works as always. One object may be entered again and again, not nested.

    Args:
        policy: what is allowed.
        place: names what is read, for messages; may be changed while it is read.
        lines: gets each line of a text file with the file's name and the line's number from 1, before the reader
            does; returns what the reader gets in its place, ``None`` to leave the line out.
        postpone: audio in memory whose header can't be read is taken for a second of sound, so that a reader of
            archives goes on behind it; the error comes when the audio is loaded.
    """

    def __init__(self, policy: SourcePolicy, place: str = "the data", lines: Any = None, postpone: bool = False):
        self.policy = policy
        self.place = place
        self.lines = lines
        self.postpone = postpone
        self._refused: ForbiddenSourceError | None = None
        self._token: Token[Reading | None] | None = None

    def __enter__(self) -> Reading:
        install()
        self._token = _ACTIVE.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._token is None:
            raise RuntimeError("a Reading is left that was not entered")
        _ACTIVE.reset(self._token)
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused from None

    def check(self, check: Any, what: Any) -> None:
        """Run a check of the policy, and remember its refusal.

        Raises:
            ForbiddenSourceError: the refusal.
        """
        try:
            check(what, self.place)
        except ForbiddenSourceError as error:
            self._refused = error
            raise


_ACTIVE: ContextVar[Reading | None] = ContextVar("nemo_mtbi_reading_from", default=None)


def active() -> Reading | None:
    """Return the innermost block of :class:`Reading` that is under way here."""
    return _ACTIVE.get()
