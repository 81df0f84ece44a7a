# SPDX-License-Identifier: Apache-2.0
import tarfile

import numpy as np
import pytest
import torch
from lhotse import CutSet

from nemo_mtbi.encoders.ctc import save_asr, train_ctc, transcribe_ctc, write_tokenizer
from nemo_mtbi.speech_llm.pretrained import load_asr_model
from nemo_mtbi.testing import WORDS, scale_weights, tiny_asr_model, tiny_cuts


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    return tiny_cuts(tmp_path_factory.mktemp("cuts"), 24, behaviors=False)


def train(folder, cuts, steps=3, seed=0, **changes):
    model = tiny_asr_model(folder)
    settings = dict(steps=steps, learning_rate=1e-2, seed=seed, batch_duration=10.0, warmup_steps=2, progress=False)
    train_ctc(model, cuts, **{**settings, **changes})
    return model


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def mean_loss(model, cuts):
    """CTC loss on clean, undisturbed utterances, one by one."""
    losses = []
    for cut in CutSet.from_file(cuts):
        audio = torch.from_numpy(cut.load_audio())
        log_probs, lengths, _ = model.forward(input_signal=audio, input_signal_length=torch.tensor([audio.shape[1]]))
        target = torch.tensor([model.tokenizer.text_to_ids(cut.supervisions[0].text)])
        size = torch.tensor([target.shape[1]])
        losses.append(model.loss(log_probs=log_probs, targets=target, input_lengths=lengths, target_lengths=size))
    return torch.stack(losses).mean().item()


def test_training_lowers_the_loss_and_forgets_the_paths(tmp_path, cuts):
    with torch.no_grad():
        before = mean_loss(tiny_asr_model(tmp_path / "before"), cuts)
        model = train(tmp_path / "after", [cuts], steps=30)
        after = mean_loss(model, cuts)
    assert after < 0.8 * before
    assert not model.training
    save_asr(model, tmp_path / "asr.nemo")
    with tarfile.open(tmp_path / "asr.nemo") as archive:
        config = archive.extractfile("./model_config.yaml").read().decode()
    assert str(tmp_path) not in config and str(cuts) not in config
    restored = load_asr_model(tmp_path / "asr.nemo")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))


def test_a_run_depends_on_its_seed_alone(tmp_path, cuts):
    one, two, other = (
        weights(train(tmp_path / name, [cuts], seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_several_corpora_are_mixed(tmp_path, cuts):
    other = tiny_cuts(tmp_path / "cuts", 3, seed=1, behaviors=False)
    both, one = (weights(train(tmp_path / str(len(corpora)), corpora, steps=4)) for corpora in ([cuts, other], [cuts]))
    assert not torch.equal(both, one), "the second corpus has a share in the training"


def test_transcripts_come_in_order_whatever_the_batch(tmp_path, cuts):
    model = tiny_asr_model(tmp_path)
    scale_weights(model)  # or it says the same about everything
    found = list(CutSet.from_file(cuts))
    one = transcribe_ctc(model, found, batch_size=1)
    assert len(one) == 24 and transcribe_ctc(model, iter(found), batch_size=7) == one
    assert len(set(one)) > 12
    assert transcribe_ctc(model, []) == []


def test_every_word_is_a_piece(tmp_path):
    import sentencepiece

    folder = write_tokenizer(tmp_path / "new" / "tokenizer", WORDS, 64)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert all(len(processor.encode(word)) == 1 for word in WORDS)
    assert processor.bos_id() == processor.eos_id() == -1  # CTC has neither
    vocabulary = (folder / "vocab.txt").read_text().split("\n")
    assert len(vocabulary) == processor.get_piece_size() - 1 and "##cat" in vocabulary


def test_audio_is_what_makes_the_transcript(asr_model, cuts):
    cut = next(iter(CutSet.from_file(cuts)))
    log_probs = []
    for samples in (cut.load_audio(), np.random.default_rng(0).uniform(-0.3, 0.3, (1, cut.num_samples))):
        audio = torch.tensor(samples, dtype=torch.float32)
        length = torch.tensor([audio.shape[1]])
        with torch.no_grad():
            log_probs.append(asr_model.forward(input_signal=audio, input_signal_length=length)[0])
    assert not torch.allclose(log_probs[0], log_probs[1], atol=0.1)
