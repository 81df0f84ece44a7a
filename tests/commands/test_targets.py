# SPDX-License-Identifier: Apache-2.0
"""What target generation reads: manifests of every editor, stereo files, pieces of files, and what is no manifest."""

import json

import numpy as np
import pytest
import soundfile
from lhotse.serialization import deserialize_item
from omegaconf import OmegaConf

from nemo_mtbi.commands.targets import open_source, parse_generate_config
from nemo_mtbi.targets.store import with_behaviors


def opened(**source):
    return open_source(parse_generate_config(OmegaConf.create({"output_dir": "out", **source})))


@pytest.mark.parametrize("rate", [{}, {"sampling_rate": 16000}])
def test_stereo_files_and_pieces_of_them_are_written_as_they_are_heard(tmp_path, rate):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (48000, 2))
    soundfile.write(tmp_path / "a.WAV", sound, 16000)
    pieces = [(1.0, 0.5), (0.5, 2.0), (2.0, 1.0)]
    entries = [
        {
            "audio_filepath": "a.WAV",
            "offset": start,
            "duration": seconds,
            "text": "one\u2028two",
            "speaker": "s",
            **rate,
        }
        for start, seconds in pieces
    ]
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\r\n" for entry in entries) + "\r\n"
    (tmp_path / "m.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    cuts = list(opened(manifest_filepath=str(tmp_path / "m.json")))
    for (start, seconds), cut in zip(pieces, cuts, strict=True):
        written = deserialize_item(with_behaviors(cut, [{"task": "say"}], {"llm": "x"}).to_dict())
        assert (written.start, written.duration) == (start, seconds)
        assert written.supervisions[0].text == "one\u2028two" and written.custom["speaker"] == "s"
        expected = sound[int(start * 16000) : int((start + seconds) * 16000)].T
        assert np.abs(written.load_audio() - expected).max() < 1e-3


@pytest.mark.parametrize("key", ["cuts_path", "manifest_filepath"])
def test_sources_that_can_not_be_read_are_named(tmp_path, key):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes('{"audio_filepath": "où"}\n'.encode("latin-1"))
    for name, message in (("", "is a folder"), ("empty.jsonl", "it is empty"), ("latin.jsonl", "is not UTF-8")):
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
            opened(**{key: str(tmp_path / name)})
    with pytest.raises(ValueError, match=f"{key}: there is no"):
        opened(**{key: str(tmp_path / "missing.jsonl")})
