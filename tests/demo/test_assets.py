# SPDX-License-Identifier: Apache-2.0
"""The two small models that ship inside the package."""

import random
import tarfile

import pytest

from nemo_mtbi.demo.corpora import grammar
from nemo_mtbi.demo.corpora.corpus import load_corpus
from nemo_mtbi.demo.corpora.synthetic import build_synthetic
from nemo_mtbi.metrics.corpus import wer
from nemo_mtbi.speech_llm.pretrained import DEMO
from nemo_mtbi.targets.tasks import TaskPool


def test_both_together_are_small_and_hold_no_pickle():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    with tarfile.open(DEMO / "encoder.nemo") as archive:
        names = [name.rsplit("/", 1)[-1] for name in archive.getnames()] + [path.name for path in files]
    assert "model_weights.safetensors" in names and "model.safetensors" in names
    assert not [name for name in names if name.endswith((".ckpt", ".pt", ".pkl", ".bin"))]


def test_the_text_llm_answers_every_task():
    from nemo_mtbi.config.generation import GenerationConfig
    from nemo_mtbi.inference.respond import Responder
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
    from nemo_mtbi.speech_llm.pretrained import load_text_llm

    groups.initialize()
    llm, rng = load_text_llm("demo"), random.Random(11)
    requests, right = [], []
    for task in TaskPool.from_yaml(DEMO / "tasks.yaml").tasks:
        for prompt in task.prompts + task.heldout_prompts:
            sentence = grammar.sample_sentence(rng)
            requests.append((prompt, sentence.text))
            right.append(grammar.ANSWERS[task.name](sentence))
    answers = Responder(LayoutDecoder(llm.chunks), llm.chat, GenerationConfig(max_new_tokens=40)).text(requests)
    share = sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)
    assert share >= 0.97, [row for row in zip(requests, right, answers, strict=True) if row[1] != row[2]][:5]


def test_the_encoder_understands_voices_that_it_never_heard(tmp_path):
    pytest.importorskip("espeakng_loader")
    from nemo_mtbi.encoders.ctc import transcribe_ctc
    from nemo_mtbi.speech_llm.pretrained import load_asr_model

    folder = build_synthetic(tmp_path, num_utterances=30, seed=3, split="test", num_workers=1, progress=False)
    cuts = list(load_corpus(folder))
    assert wer([cut.supervisions[0].text for cut in cuts], transcribe_ctc(load_asr_model("demo"), cuts)) <= 0.06
