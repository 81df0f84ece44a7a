# SPDX-License-Identifier: Apache-2.0
"""Recognizers of NeMo: who can transcribe is found without weights; transcripts depend on the speech alone."""

import pytest
import torch
from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel, EncDecRNNTBPEModel
from nemo_models import canary, transducer

from nemo_mtbi.encoders.ctc import save_asr
from nemo_mtbi.evaluation.recognizers import find_recognizer, load_recognizer

CPU = torch.device("cpu")
AUDIO = [torch.linspace(0, 400, size).sin() * 0.3 for size in (16000, 9000)]


def test_a_transducer_without_ctc_is_refused(tmp_path):
    save_asr(transducer(EncDecRNNTBPEModel, tmp_path), tmp_path / "t.nemo")
    with pytest.raises(ValueError, match="can't transcribe with .*t.nemo: .*no CTC head.* Set systems.c.asr"):
        find_recognizer("systems.c", str(tmp_path / "t.nemo"), None)


def test_hybrids_transcribe_by_their_ctc_part(tmp_path):
    torch.manual_seed(3)
    model = transducer(EncDecHybridRNNTCTCBPEModel, tmp_path).eval()
    save_asr(model, tmp_path / "t.nemo")
    path = find_recognizer("systems.c", str(tmp_path / "t.nemo"), None)
    found = load_recognizer("systems.c", path, CPU)
    together = found.transcribe(AUDIO)
    assert together == [found.transcribe([samples])[0] for samples in AUDIO] and found.transcribe([]) == []
    assert found.frames.sample_rate == 16000 and any(together)


def test_ctc_of_the_demo():
    path = find_recognizer("systems.c", "demo", None)
    found = load_recognizer("systems.c", path, CPU)
    assert found.transcribe(AUDIO) == [found.transcribe([samples])[0] for samples in AUDIO]


def test_a_nemo_model_of_another_kind_is_refused(tmp_path):
    save_asr(canary(tmp_path), tmp_path / "canary.nemo")
    with pytest.raises(ValueError, match="can't transcribe with .*canary.nemo: .* Set systems.c.asr"):
        find_recognizer("systems.c", None, tmp_path / "canary.nemo")
    with pytest.raises(ValueError, match="holds the encoder without what writes text. Set systems.c.asr"):
        find_recognizer("systems.c", None, None)
