# SPDX-License-Identifier: Apache-2.0
"""Small cuts with audio on disk, word times and behaviors, and a tokenizer of characters."""

import json

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from nemo_mtbi.chat.format import ChatFormat
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage

RATE = 16_000
TASKS = ("transcribe", "first", "last", "count", "spell")
PROVENANCE = {"llm": "sha256:llm", "chat": "sha256:chat", "decoding": {"max_new_tokens": 32}}


class CharacterTokenizer:
    """One id per character, and two special tokens."""

    special = {"<user>": 1, "<end>": 2}

    def token_to_id(self, token):
        return self.special.get(token)

    def text_to_ids(self, text):
        return [ord(character) for character in text]

    def ids_to_text(self, ids):
        return "".join(chr(i) for i in ids)


def behaviors_of(text):
    """Two wordings for each task; the responses differ in length."""
    return [
        {"task": task, "prompt": wording, "response": f"{task}{wording}:{text}"[: 6 + 3 * i], "truncated": i == 4}
        for i, task in enumerate(TASKS)
        for wording in (f"do {task}", f"please {task} it")
    ]


class Corpus:
    """Writes wav files to a folder and makes cuts of them.

    Args:
        folder: where the audio goes.
    """

    def __init__(self, folder):
        self.folder = folder

    def audio(self, name, samples, rate=RATE):
        path = self.folder / f"{name}.wav"
        soundfile.write(path, samples, rate, subtype="FLOAT")
        return path

    def cut(self, index, seconds=None, text=None, samples=None, prefix="cut", align=True, rate=RATE, behaviors=True):
        """A cut of noise with evenly spaced words; ``samples`` replaces the noise."""
        rng = np.random.default_rng(index)
        seconds = 0.6 + 0.17 * (index * 7 % 11) if seconds is None else seconds
        name = f"{prefix}-{index:03d}"
        text = " ".join(f"w{index}x{i}" for i in range(1 + index % 5)) if text is None else text
        samples = rng.uniform(-0.5, 0.5, int(seconds * rate)) if samples is None else samples
        recording = Recording.from_file(self.audio(name, samples, rate), recording_id=name)
        words = text.split()
        step = recording.duration / max(len(words), 1)
        items = [AlignmentItem(word, round(i * step, 4), round(step, 4)) for i, word in enumerate(words)]
        supervision = SupervisionSegment(
            id=name,
            recording_id=name,
            start=0.0,
            duration=recording.duration,
            channel=recording.channel_ids if recording.num_channels > 1 else 0,
            text=text or None,
            alignment={"word": items} if align and items else None,
        )
        cut = recording.to_cut()
        cut.id, cut.supervisions = name, [supervision]
        cut.custom = {"behaviors": behaviors_of(text), "behaviors_from": PROVENANCE} if behaviors else {}
        assert isinstance(cut, MonoCut) or recording.num_channels > 1
        return cut

    def cuts(self, count, first=0, **kwargs):
        return [self.cut(index, **kwargs) for index in range(first, first + count)]

    def jsonl(self, cuts, name="cuts"):
        path = self.folder / f"{name}.jsonl.gz"
        CutSet.from_cuts(cuts).to_file(path)
        return str(path)

    def manifest(self, cuts, name="manifest", **extra):
        """A NeMo manifest; the behaviors and word times are further keys of its lines."""
        path = self.folder / f"{name}.json"
        lines = []
        for cut in cuts:
            supervision = cut.supervisions[0]
            line = {"audio_filepath": cut.recording.sources[0].source, "duration": cut.duration, **extra}
            line |= {"text": supervision.text, **(cut.custom or {})}
            if supervision.alignment:
                items = supervision.alignment["word"]
                line["alignment"] = {"word": [[item.symbol, item.start, item.duration] for item in items]}
            lines.append(json.dumps(line))
        path.write_text("\n".join(lines) + "\n")
        return str(path)


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path)


@pytest.fixture
def chat():
    return ChatFormat(turn=("<user>", "{audio}", "|", "{prompt}"), end="<end>", tokenizer=CharacterTokenizer())


@pytest.fixture
def frames():
    """10 ms hop, four times halved: a frame every 160 ms."""
    halve = LengthStage(kernel=3, stride=2, padding=2)
    return FrameCounter((LengthStage(400, 160, 400), halve, halve, halve, LengthStage(2, 2)), RATE)
