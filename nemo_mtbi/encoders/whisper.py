# SPDX-License-Identifier: Apache-2.0
"""Whisper's own decoder: transcripts of speech, for directories that hold it beside the encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_mtbi.encoders.hf import read_hf_config

_TOKENIZERS = ("tokenizer.json", "vocab.json")  # one of them holds the tokens
_LOCAL: dict[str, bool] = {"local_files_only": True, "trust_remote_code": False}


def missing_of_decoder(path: Path) -> str | None:
    """Return what a directory of Hugging Face lacks to transcribe by Whisper's decoder; None if it can.

    Only names are read, no weights.

    Raises:
        ValueError: if its configuration or the header of its weights can't be read.
    """
    config = read_hf_config(path)
    if config["model_type"] != "whisper":
        return f"an encoder of type {config['model_type']} has no decoder"
    names = _weight_names(path)
    known = names if names is not None else config.get("architectures") or ()
    if not any(name.startswith(("model.decoder.", "decoder.", "WhisperForConditional")) for name in known):
        return "it holds Whisper's encoder without the decoder"
    if not any((path / name).is_file() for name in _TOKENIZERS):
        return f"it holds Whisper's decoder without its tokenizer ({' or '.join(_TOKENIZERS)})"
    return None


def _weight_names(path: Path) -> list[str] | None:
    """Return the names of the stored weights; None where they are not safetensors."""
    index = path / "model.safetensors.index.json"
    try:
        if index.is_file():
            return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names: list[str] = []
        files = sorted(path.glob("*.safetensors"))
        for file in files:
            with safe_open(file, "pt") as weights:
                names += weights.keys()
        return names if files else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the weights in {path} can't be read: {error}") from error


class WhisperTranscriber:
    """Whisper with its own decoder: greedy transcripts of audio of any length.

    A multilingual model detects the language of each utterance; its task is to transcribe.

    Args:
        path: directory of Hugging Face with encoder, decoder, tokenizer and feature extractor.
        device: of the model; the weights are float32.

    Raises:
        ValueError: if something is missing or damaged.
    """

    def __init__(self, path: Path, device: torch.device):
        from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

        lacking = missing_of_decoder(path)
        if lacking:
            raise ValueError(f"{path}: {lacking}")
        try:
            model, report = WhisperForConditionalGeneration.from_pretrained(
                str(path), output_loading_info=True, dtype=torch.float32, **_LOCAL
            )
            extractor = AutoFeatureExtractor.from_pretrained(str(path), **_LOCAL)
            tokenizer = AutoTokenizer.from_pretrained(str(path), **_LOCAL)
        except Exception as error:  # damaged files raise errors of many libraries
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"Whisper in {path} can't be read: {reason}") from error
        # transformers draws what is missing; the output layer is the table of tokens
        missing = sorted(name for name in report["missing_keys"] if name != "proj_out.weight")
        if missing:
            raise ValueError(f"Whisper in {path} can't be read: the weights lack {', '.join(missing[:5])}")
        self._path, self._model, self._extractor, self._tokenizer = path, model.to(device).eval(), extractor, tokenizer
        self.sample_rate = int(extractor.sampling_rate)

    @torch.no_grad()
    def __call__(self, audio: Sequence[Tensor]) -> list[str]:
        """Return the transcript of each utterance ``[n]`` of samples at ``sample_rate``.

        Raises:
            ValueError: if an utterance is longer than 30 s, and the model knows no timestamps to go on by.
        """
        short = [index for index, samples in enumerate(audio) if len(samples) <= self._extractor.n_samples]
        texts = dict(zip(short, self._transcribe([audio[i] for i in short]), strict=True)) if short else {}
        for index in range(len(audio)):
            if index not in texts:
                (texts[index],) = self._transcribe([audio[index]], timestamps=True)
        return [texts[index] for index in range(len(audio))]

    def _transcribe(self, audio: Sequence[Tensor], timestamps: bool = False) -> list[str]:
        padding: dict[str, Any] = {"padding": "longest", "truncation": False} if timestamps else {}
        features = self._extractor(
            [samples.cpu().numpy() for samples in audio],
            sampling_rate=self.sample_rate,
            return_tensors="pt",
            return_attention_mask=True,
            **padding,
        ).to(self._model.device)
        options: dict[str, Any] = {"return_timestamps": True} if timestamps else {}
        if timestamps and getattr(self._model.generation_config, "no_timestamps_token_id", None) is None:
            raise ValueError(
                f"Whisper in {self._path} takes {self._extractor.chunk_length} s at once, and has no timestamps in "
                f"its generation_config.json to go on by, but an utterance has {len(audio[0]) / self.sample_rate:.0f} "
                "s: cut it, or transcribe it elsewhere"
            )
        if getattr(self._model.generation_config, "lang_to_id", None):
            options["task"] = "transcribe"
        ids = self._model.generate(**features, do_sample=False, num_beams=1, **options)
        return [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
