# SPDX-License-Identifier: Apache-2.0
"""Speech with exact word times from espeak-ng (GPL, optional extra ``demo``: the wheel ``espeakng-loader``)."""

import ctypes
import importlib.metadata
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_mtbi.compat.ctypes import unload

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000  # report a missing data folder instead of ending the process
_POS_CHARACTER = 1
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_EVENT_END_OF_LIST, _EVENT_WORD = 0, 1

# espeak speaks some pairs ("in the", "to be") as one word with one event. Between words joined by a no-break space it
# does not, and the rhythm stays that of plain text.
_SEPARATOR = "\u00a0"
_SILENCE = 0.003  # of full scale; espeak's own tail is digital silence but for some rounding

MISSING = "speaking the demo corpus needs espeak-ng: pip install nemo_mtbi[demo]"


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # 1-based, in characters
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Speech(NamedTuple):
    """Synthesized speech with its word times."""

    samples: np.ndarray  # [N] float32 in [-1, 1]
    sample_rate: int  # espeak's own, 22050 Hz
    words: list[tuple[float, float]]  # (start, duration) of each word, in seconds


def espeak_version() -> str:
    """Return the version of the installed espeak-ng wheel; RuntimeError with the remedy where there is none."""
    try:
        return importlib.metadata.version("espeakng-loader")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(MISSING) from error


class Espeak:
    """One espeak-ng voice box.

    The C library keeps its state (flutter, echo) from one utterance to the next, over re-initialization too, so what
    it says would depend on what it said before; and it seeds its noise (breath, whisper) by the clock. Every call
    therefore loads a fresh private copy of the library (0.3 ms) and seeds it: equal arguments give equal samples.

    Raises:
        RuntimeError: the wheel is missing.
    """

    def __init__(self):
        espeak_version()
        import espeakng_loader

        source = Path(espeakng_loader.get_library_path())
        folder = tempfile.mkdtemp(prefix="nemo_mtbi_espeak_")
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # A copy, since a library that someone else in this process has open would not be loaded afresh.
        self._library = shutil.copy(source, folder)
        data = Path(espeakng_loader.get_data_path())
        self._data = str(data.parent if data.name == "espeak-ng-data" else data)

    def speak(self, text: str, voice: str = "en-us", rate: int = 165, pitch: int = 50) -> Speech:
        """Speak a text.

        Args:
            text: words separated by spaces.
            voice: espeak voice with an optional variant, such as ``en-us+f2``.
            rate: words per minute.
            pitch: 0 to 100.

        Raises:
            ValueError: the text is empty, the voice is unknown, or espeak does not speak the text as one word for each
                word of it, so that the word times can't be known.
        """
        words = text.split()
        if not words:
            raise ValueError("espeak got an empty text; give at least one word")
        self._check_variant(voice)
        library = ctypes.CDLL(self._library)
        try:
            sample_rate = self._initialize(library)
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            library.srand(1)  # of libc, which the library is linked to: the noise of the Klatt voices
            samples, events = _synthesize(library, words, voice, rate, pitch)
        finally:
            library.espeak_Terminate()
            unload(library)
        return Speech(samples, sample_rate, _word_times(words, events, samples, sample_rate))

    def _check_variant(self, voice: str) -> None:
        """Refuse a variant that espeak does not have, since espeak itself ignores it."""
        _, plus, variant = voice.partition("+")
        folder = Path(self._data, "espeak-ng-data", "voices", "!v")
        if plus and not (folder / variant).is_file():
            raise ValueError(f"espeak-ng has no variant {variant!r} (voice {voice!r}); {folder} holds those it has")

    def _initialize(self, library: ctypes.CDLL) -> int:
        path = os.fsencode(self._data)
        sample_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, path, _INITIALIZE_DONT_EXIT)
        if sample_rate <= 0:
            raise RuntimeError(
                f"espeak-ng can't read its data in {self._data}: reinstall espeakng-loader, in a folder whose path is "
                "shorter than 150 characters"
            )
        return sample_rate


def _synthesize(
    library: ctypes.CDLL, words: list[str], voice: str, rate: int, pitch: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return samples [N] float32 and the (text position, sample) of every word event."""
    chunks: list[np.ndarray] = []
    events: list[tuple[int, int]] = []

    def receive(wave, count, event):
        if count > 0:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type != _EVENT_END_OF_LIST:
            if event[i].type == _EVENT_WORD:
                events.append((event[i].text_position, event[i].sample))
            i += 1
        return 0

    callback = _Callback(receive)  # this name keeps it alive while C calls it
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}; `espeak-ng --voices=en` lists them (en-us, en-us+f2, …)")
    library.espeak_SetParameter(_PARAMETER_RATE, int(rate), 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, int(pitch), 0)
    data = _SEPARATOR.join(words).encode() + b"\0"
    status = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
    if status != 0 or not chunks:
        raise RuntimeError(f"espeak-ng failed (status {status}) on {' '.join(words)!r}")
    return np.concatenate(chunks).astype(np.float32) / 32768.0, events


def _word_times(
    words: list[str], events: list[tuple[int, int]], samples: np.ndarray, sample_rate: int
) -> list[tuple[float, float]]:
    """Return (start, duration) in seconds of each word: until the next word, the last one until its sound ends."""
    expected, position = [], 1
    for word in words:
        expected.append(position)
        position += len(word) + len(_SEPARATOR)
    if [position for position, _ in events] != expected:
        raise ValueError(
            f"espeak-ng speaks {' '.join(words)!r} as {len(events)} words, so word times can't be known; spell out "
            "numbers and abbreviations and leave out punctuation"
        )
    starts = [sample for _, sample in events]
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    ends = [*starts[1:], int(loud[-1]) + 1 if len(loud) else len(samples)]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"espeak-ng leaves a word of {' '.join(words)!r} without any sound; leave that word out")
    return [(start / sample_rate, (end - start) / sample_rate) for start, end in zip(starts, ends, strict=True)]
