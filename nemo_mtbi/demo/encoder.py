# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's speech encoder: a small FastConformer-CTC on sentences spoken by espeak-ng."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf

from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.synthetic import build_synthetic
from nemo_mtbi.encoders.ctc import save_asr, train_ctc, transcribe_ctc, write_tokenizer

SIZE = dict(layers=4, width=160, heads=4, subsampling_channels=64, kernel=9)
VOCABULARY = 128  # pieces of words: sounds are shared between words, and 8 x fewer frames than 10 ms still suffice


def configuration(tokenizer_dir: Path):
    """Return NeMo's configuration of a FastConformer-CTC (8 x subsampling: 12.5 frames per second)."""
    return OmegaConf.create(
        {
            "sample_rate": 16000,
            "log_prediction": False,
            "tokenizer": {"dir": str(tokenizer_dir), "type": "bpe"},
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": 16000,
                "normalize": "per_feature",
                "window_size": 0.025,
                "window_stride": 0.01,
                "window": "hann",
                "features": 80,
                "n_fft": 512,
                "dither": 1e-5,
                "pad_to": 0,
            },
            "encoder": {
                "_target_": "nemo.collections.asr.modules.ConformerEncoder",
                "feat_in": 80,
                "feat_out": -1,
                "n_layers": SIZE["layers"],
                "d_model": SIZE["width"],
                "subsampling": "dw_striding",
                "subsampling_factor": 8,
                "subsampling_conv_channels": SIZE["subsampling_channels"],
                "ff_expansion_factor": 4,
                "self_attention_model": "rel_pos",
                "n_heads": SIZE["heads"],
                "conv_kernel_size": SIZE["kernel"],
                "dropout": 0.0,
                "dropout_pre_encoder": 0.0,
                "dropout_emb": 0.0,
                "dropout_att": 0.0,
            },
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                "feat_in": None,
                "num_classes": -1,
                "vocabulary": [],
            },
            "decoding": {"strategy": "greedy_batch"},
            "optim": None,
        }
    )


def build(out: Path, steps: int, seed: int, utterances: int = 12000) -> None:
    """Train the encoder on ``utterances`` sentences and writes ``out/encoder.nemo``, weights as float16."""
    from nemo.collections.asr.models import EncDecCTCModelBPE

    from nemo_mtbi.demo.corpora.corpus import load_corpus
    from nemo_mtbi.metrics.corpus import wer

    cache = Path.home() / ".cache" / "nemo_mtbi"
    train = build_synthetic(cache, num_utterances=utterances, seed=1000 + seed, split="train")
    held_out = build_synthetic(cache, num_utterances=300, seed=1000 + seed, split="validation")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(folder, sorted(grammar.grammar_words()), VOCABULARY)
        model = EncDecCTCModelBPE(configuration(tokenizer))
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
        train_ctc(model, [train / "cuts.jsonl.gz"], steps=steps, learning_rate=2e-3, seed=seed)
        cuts = list(load_corpus(held_out))
        error = wer([cut.supervisions[0].text for cut in cuts], transcribe_ctc(model, cuts))
        print(f"word error rate on {len(cuts)} sentences and voices not trained on: {error:.2%}")
        save_asr(model, out / "encoder.nemo", torch.float16)
