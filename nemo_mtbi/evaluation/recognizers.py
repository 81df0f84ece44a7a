# SPDX-License-Identifier: Apache-2.0
"""Recognizers, which write the transcripts of a cascade: a CTC model of NeMo, or Whisper's own decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from nemo_mtbi.encoders.ctc import transcribe_ctc
from nemo_mtbi.encoders.hf import HFSpeechEncoder
from nemo_mtbi.encoders.nemo import NemoEncoder
from nemo_mtbi.encoders.whisper import WhisperTranscriber, missing_of_decoder
from nemo_mtbi.layouts.frames import FrameCounter, LengthStage
from nemo_mtbi.speech_llm.pretrained import load_asr_model, resolve


@dataclass(frozen=True)
class Recognizer:
    """Speech to text.

    Attributes:
        frames: Has its sample rate and the shortest audio that it takes.
        transcribe: From utterances ``[n]`` at that rate to their transcripts.
    """

    frames: FrameCounter
    transcribe: Callable[[Sequence[Tensor]], list[str]]


def remedy(where: str) -> str:
    """Return the remedy for a cascade that can't transcribe."""
    return (
        f"Set {where}.asr to a NeMo .nemo with CTC (hybrids have it too), or to a Hugging Face directory of Whisper "
        f"with its decoder, or {where}.hypotheses to a JSONL of transcripts made elsewhere, or leave the system out: "
        f"~{where}"
    )


def find_recognizer(where: str, asr: str | None, encoder: Path | None) -> Path:
    """Return the path of the model that transcribes for a cascade; no weights are read.

    Args:
        where: The system in the configuration, for messages.
        asr: Its key ``asr``; None: the model that the encoder of its speech system belongs to.
        encoder: That encoder; None if it lies inside the ``.nemo``, without the rest of its model.

    Raises:
        ValueError: the model can't transcribe; names the remedy.
    """
    path = encoder if asr is None else resolve(asr, f"{where}.asr", "encoder.nemo")
    if path is None:
        raise ValueError(
            f"{where}: the .nemo of its speech system holds the encoder without what writes text. {remedy(where)}"
        )
    if path.is_dir():
        lacking = (
            missing_of_decoder(path) if HFSpeechEncoder.recognizes(path) else "it is not a directory of Hugging Face"
        )
    else:
        lacking = _missing_of_nemo(path)
    if lacking:
        raise ValueError(f"{where} can't transcribe with {path}: {lacking}. {remedy(where)}")
    return path


def _missing_of_nemo(path: Path) -> str | None:
    """Return why a file can't transcribe, None if it is a NeMo model that can; no weights are read."""
    from nemo.collections.asr.models import ASRModel, EncDecCTCModel
    from nemo.utils.model_utils import import_class_by_path

    from nemo_mtbi.encoders.asr_archive import TensorArchive

    try:
        config = ASRModel.restore_from(
            str(path), return_config=True, map_location="cpu", save_restore_connector=TensorArchive()
        )
        if not str(config.get("target")).startswith("nemo.collections.asr."):  # nothing else is imported
            return f"it holds a {config.get('target')} and not a NeMo ASR model"
        kind = import_class_by_path(config.target)
    except Exception as error:  # a file that is something else raises what the libraries below happen to raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"it is not the .nemo of a NeMo ASR model ({reason})"
    if not (isinstance(kind, type) and issubclass(kind, EncDecCTCModel)):
        return f"{getattr(kind, '__name__', kind)} has no CTC head"
    return None


def load_recognizer(where: str, path: Path, device: torch.device) -> Recognizer:
    """Load a recognizer.

    Args:
        where: The system in the configuration, for messages.
        path: What :func:`find_recognizer` returned.
        device: Of the model.

    Raises:
        ValueError: the model is damaged.
    """
    if path.is_dir():
        whisper = WhisperTranscriber(path, device)
        return Recognizer(FrameCounter((LengthStage(1, 1),), whisper.sample_rate), whisper)
    try:
        model = load_asr_model(path).to(device)
    except ValueError as error:
        raise ValueError(f"{where} can't transcribe with {path}: {error}. {remedy(where)}") from error
    shape = NemoEncoder(model).shape
    frames = FrameCounter(shape.stages, shape.sample_rate)

    def transcribe(audio: Sequence[Tensor]) -> list[str]:
        # resampled and mono already, whatever the file is
        cuts = [SimpleNamespace(load_audio=lambda x=x: x[None].numpy()) for x in audio]
        return transcribe_ctc(model, cuts, batch_size=max(1, len(cuts)))

    return Recognizer(frames, transcribe)
