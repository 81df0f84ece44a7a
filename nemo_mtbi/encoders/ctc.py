# SPDX-License-Identifier: Apache-2.0
"""CTC training of a speech encoder by NeMo's own code: for the demo's encoder and for adaptation to new speech."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from nemo.collections.asr.models import EncDecCTCModelBPE
from nemo.collections.asr.modules import SpectrogramAugmentation
from omegaconf import OmegaConf, open_dict

from nemo_mtbi.chat.train_tokenizer import train_tokenizer
from nemo_mtbi.compat.nemo import set_connector
from nemo_mtbi.encoders.asr_archive import TensorArchive


def train_ctc(
    model: EncDecCTCModelBPE,
    cuts: Sequence[str | Path],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_duration: float = 50.0,
    warmup_steps: int = 100,
    spec_augment: bool = False,
    precision: str = "32-true",
    progress: bool = True,
) -> None:
    """Train all weights of ``model`` on cut manifests with NeMo's Lhotse loader, CTC loss and cosine schedule.

    Args:
        model: changed in place; left in ``eval()``.
        cuts: manifests, mixed with equal weight for each.
        steps: optimizer steps.
        learning_rate: its peak.
        seed: of data order, SpecAugment and dropout.
        batch_duration: seconds of speech in a batch.
        warmup_steps: linear warm-up.
        spec_augment: mask bands and short spans of the spectrogram (arXiv 1904.08779), for little data.
        precision: Lightning's name.
        progress: show Lightning's progress bar.
    """
    seed_everything(seed, verbose=False)
    source = [{"type": "lhotse", "cuts_path": str(path), "weight": 1.0} for path in cuts]
    data = {
        "use_lhotse": True,
        "input_cfg": source,
        "batch_duration": batch_duration,
        "use_bucketing": True,
        "num_buckets": 6,
        "bucket_buffer_size": 2000,
        "num_cuts_for_bins_estimate": 1000,
        "shuffle": True,
        "shuffle_buffer_size": 4000,
        "concurrent_bucketing": False,
        "shard_seed": seed,
        "seed": seed,
        "num_workers": 0,
        "sample_rate": model.cfg.sample_rate,
    }
    optimizer = {
        "name": "adamw",
        "lr": learning_rate,
        "betas": [0.9, 0.98],
        "weight_decay": 1e-3,
        "sched": {"name": "CosineAnnealing", "warmup_steps": warmup_steps, "min_lr": 1e-6, "max_steps": steps},
    }
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        precision=precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        use_distributed_sampler=False,
        log_every_n_steps=50,
        num_sanity_val_steps=0,
    )
    if spec_augment:
        model.spec_augmentation = SpectrogramAugmentation(freq_masks=2, freq_width=18, time_masks=3, time_width=0.05)
    model.set_trainer(trainer)
    model.setup_training_data(OmegaConf.create(data))
    model.setup_optimization(OmegaConf.create(optimizer))
    trainer.fit(model)
    model.spec_augmentation = None
    model.eval()


def save_asr(model: EncDecCTCModelBPE, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a ``.nemo`` with tensors only, and without the paths of the machine that trained it.

    Args:
        model: any NeMo ASR model with a tokenizer.
        path: of the archive.
        dtype: of the stored weights; ``None`` keeps their own.
    """
    with open_dict(model.cfg):
        model.cfg.train_ds = model.cfg.validation_ds = model.cfg.optim = None
        model.cfg.tokenizer.dir = None  # its files are in the archive
    set_connector(model, TensorArchive(dtype))
    model.save_to(str(path))


@torch.no_grad()
def transcribe_ctc(model: EncDecCTCModelBPE, cuts, batch_size: int = 32) -> list[str]:
    """Return greedy CTC transcripts of an iterable of cuts, in order."""
    model.eval()
    texts: list[str] = []
    cuts = list(cuts)
    for start in range(0, len(cuts), batch_size):
        samples = [torch.from_numpy(cut.load_audio()[0]) for cut in cuts[start : start + batch_size]]
        lengths = torch.tensor([len(x) for x in samples])
        audio = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
        device = next(model.parameters()).device
        log_probs, encoded_lengths, _ = model.forward(
            input_signal=audio.to(device), input_signal_length=lengths.to(device)
        )
        hypotheses = model.decoding.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=encoded_lengths)
        texts += [hypothesis.text for hypothesis in hypotheses]
    return texts


def write_tokenizer(folder: str | Path, words: Sequence[str], vocabulary: int) -> Path:
    """Write a SentencePiece tokenizer folder for NeMo's CTC models, trained on ``words``."""
    import sentencepiece

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = train_tokenizer(words, vocabulary, sentence_marks=False, whole_words=False)
    (folder / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    scores = [processor.get_score(i) for i in range(len(pieces))]
    (folder / "tokenizer.vocab").write_text("".join(f"{p}\t{s:g}\n" for p, s in zip(pieces, scores, strict=True)))
    (folder / "vocab.txt").write_text("\n".join(piece.replace("▁", "##") for piece in pieces[1:]))
    return folder
