# SPDX-License-Identifier: Apache-2.0
"""Whisper's own decoder: what a directory needs for it, and that its transcripts depend on the speech alone."""

import json

import hf_models as hf
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_mtbi.encoders.whisper import WhisperTranscriber, missing_of_decoder

CPU = torch.device("cpu")


@pytest.fixture
def whisper(tmp_path):
    return hf.hf_encoder(tmp_path / "whisper", "whisper")


def test_a_transcript_does_not_depend_on_its_batch(whisper):
    hf.add_whisper_tokenizer(whisper)
    assert missing_of_decoder(whisper) is None
    transcribe = WhisperTranscriber(whisper, CPU)
    torch.manual_seed(0)
    audio = [torch.randn(size) for size in (8000, 32000, 400)]
    together = transcribe(audio)
    assert together == [transcribe([samples])[0] for samples in audio] and all(text.isalpha() for text in together)
    assert transcribe([]) == [] and transcribe.sample_rate == 16000


def test_long_audio_needs_timestamps(whisper):
    hf.add_whisper_tokenizer(whisper)
    long = torch.randn(16000 * 31)
    with pytest.raises(ValueError, match="takes 30 s at once, and has no timestamps .* but an utterance has 31 s"):
        WhisperTranscriber(whisper, CPU)([long])
    hf.add_whisper_tokenizer(whisper, timestamps=True)
    transcribe, asked = WhisperTranscriber(whisper, CPU), []

    def generate(input_features, attention_mask, **given):
        asked.append((tuple(input_features.shape), given.get("return_timestamps")))
        return torch.full((len(input_features), 1), 3 + len(asked))

    transcribe._model.generate = generate
    # whole, and apart from the short ones, which are filled up to 30 s
    assert transcribe([long[:8000], long, long[:9000]]) == ["b", "c", "b"]
    assert asked == [((2, 80, 3000), None), ((1, 80, 3100), True)]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_directory_of_the_encoder_alone(whisper, prefix):
    hf.add_whisper_tokenizer(whisper)
    weights = load_file(whisper / "model.safetensors")
    save_file({prefix + k: v for k, v in weights.items() if k.startswith("encoder.")}, whisper / "model.safetensors")
    with pytest.raises(ValueError, match="it holds Whisper's encoder without the decoder"):
        WhisperTranscriber(whisper, CPU)
    names = {f"{prefix}decoder.embed_tokens.weight": "model-2.safetensors"}
    (whisper / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert missing_of_decoder(whisper) is None


def test_what_else_a_directory_may_lack(whisper, tmp_path):
    assert "without its tokenizer" in missing_of_decoder(whisper)
    hf.add_whisper_tokenizer(whisper)
    weights = load_file(whisper / "model.safetensors")
    gone = weights.pop("decoder.layers.0.fc1.weight")
    save_file(weights, whisper / "model.safetensors")
    with pytest.raises(ValueError, match="can't be read: the weights lack model.decoder.layers.0.fc1.weight"):
        WhisperTranscriber(whisper, CPU)
    assert gone.numel()
    (whisper / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="the weights in .* can't be read"):
        missing_of_decoder(whisper)
    assert "type wavlm has no decoder" in missing_of_decoder(hf.hf_encoder(tmp_path / "wavlm", "wavlm"))
