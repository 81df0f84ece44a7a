# SPDX-License-Identifier: Apache-2.0
"""Sets of cuts: stereo recordings, and files that are no cuts."""

import json

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MultiCut, Recording, SupervisionSegment

from nemo_mtbi.evaluation.items import from_cuts, load_clip
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.targets.tasks import TaskPool

POOL = TaskPool.from_dict(
    {"tasks": [{"name": "say", "scoring": "wer", "split": "train", "prompts": {"train": ["say it"]}}]}
)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_stereo_cuts_are_heard_as_their_average(tmp_path, suffix):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (16000, 2))
    soundfile.write(tmp_path / f"a.{suffix}", samples, 16000)
    cut = Recording.from_file(tmp_path / f"a.{suffix}").to_cut()
    cut.supervisions = [SupervisionSegment("a", "a", 0.0, 1.0, channel=[0, 1], text="one\u2028two")]
    assert isinstance(cut, MultiCut)
    path = tmp_path / "cuts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\r\n\r\n")
    found = from_cuts("test", path, POOL)
    (clip,) = found.clips
    heard = load_clip(clip, FrameCounter((LengthStage(400, 160),), 16000))
    assert np.abs(heard.numpy() - samples.mean(axis=1)).max() < 1e-3
    assert len(found.items) == 1 and clip.transcript == "one two"


def test_sets_that_are_no_cuts_are_named_with_their_key(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes("où\n".encode("latin-1"))
    (tmp_path / "nemo.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}\n')
    CutSet.from_cuts([]).to_file(tmp_path / "none.jsonl.gz")
    for name, message in (
        ("", "is a folder"),
        ("missing.jsonl", "does not exist"),
        ("empty.jsonl", "holds no cuts"),
        ("none.jsonl.gz", "holds no cuts"),
        ("nemo.jsonl", "is a NeMo manifest"),
    ):
        with pytest.raises(ValueError, match=f"sets.test.cuts={tmp_path / name}.*{message}"):
            from_cuts("test", tmp_path / name, POOL)
    with pytest.raises(ValueError, match="line 1 of .*latin.jsonl is not UTF-8"):
        from_cuts("test", tmp_path / "latin.jsonl", POOL)
