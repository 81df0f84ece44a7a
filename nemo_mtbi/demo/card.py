# SPDX-License-Identifier: Apache-2.0
"""Scores the demo's frozen models on held-out data and writes their model card."""

from __future__ import annotations

from pathlib import Path

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.data.behaviors import custom_value, transcript
from nemo_mtbi.demo.corpora.corpus import load_corpus
from nemo_mtbi.demo.corpora.synthetic import VOICES, build_synthetic
from nemo_mtbi.encoders.ctc import transcribe_ctc
from nemo_mtbi.evaluation.questions import questions
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.metrics.corpus import score, wer
from nemo_mtbi.parallel import groups
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.speech_llm.pretrained import load_asr_model, load_text_llm
from nemo_mtbi.targets.tasks import TaskPool

CARD = """# The demo's frozen models

Made by `python scripts/build_demo_models.py`; nothing was downloaded. Licence: Apache-2.0. The speech was made by
espeak-ng, which is not part of this package. The encoder had 3000 steps. The LLM had four rounds: 4000 steps, and then
3500, 2500 and 2500 with `--resume`, between which its pre-training data were improved (words said twice, more digit
strings), so the script as it stands makes a model like it, not the same one.

| model | architecture | parameters | file |
|---|---|---|---|
| text LLM | Megatron-core GPT, {layers} layers of {width}, RoPE, RMSNorm, SwiGLU, GQA | {llm:.2f} M | `llm/` |
| encoder | NeMo FastConformer-CTC, 4 layers of {encoder_width}, 12.5 frames/s | {asr:.2f} M | `encoder.nemo` |

They know the small world of `nemo_mtbi/demo/corpora/grammar.py` ({words} spoken words) and nothing else: a means to
try and to test, not models to use.

## Scores

On {n} sentences in {voices} voices (seed 0 of the test split). The encoder was trained on neither these
sentences nor these voices. The LLM's pre-training drew its text from the whole grammar, so it may have read some of
them.

- speech encoder: word error rate {error:.2%} (greedy CTC)
- text LLM: {right:.2%} of {rows} answers to transcripts right

| task | scored by | held out from MTBI training | right |
|---|---|---|---|
{tasks}
"""


def write(folder: Path, utterances: int = 300) -> None:
    """Score the models in ``folder`` and write ``folder/README.md``."""
    groups.initialize()
    pool = TaskPool.from_yaml(folder / "tasks.yaml")
    cache = Path.home() / ".cache" / "nemo_mtbi"
    corpus = build_synthetic(cache, num_utterances=utterances, seed=0, split="test", with_references=True)
    cuts = list(load_corpus(corpus))
    texts = [transcript(cut) for cut in cuts]
    asr = load_asr_model(folder / "encoder.nemo")
    error = wer(texts, transcribe_ctc(asr, cuts))
    llm = load_text_llm(folder / "llm")
    responder = Responder(LayoutDecoder(llm.chunks), llm.chat, GenerationConfig(max_new_tokens=40))
    rows = questions(cuts, pool, seed=0)
    answers = responder.text([(row.prompt, texts[row.utterance]) for row in rows])
    right: dict[str, list[bool]] = {task.name: [] for task in pool.tasks}
    for row, answer in zip(rows, answers, strict=True):
        reference = custom_value(cuts[row.utterance], "references")[row.task.name]
        right[row.task.name].append(score(row.task.scoring, reference, answer) == 1.0)
    lines = [
        f"| {task.name} | {task.scoring} | {'yes' if task.heldout else 'no'} "
        f"| {sum(right[task.name]) / len(right[task.name]):.1%} |"
        for task in pool.tasks
    ]
    architecture = llm.decoder.architecture
    card = CARD.format(
        layers=architecture.num_layers,
        width=architecture.hidden_size,
        llm=sum(p.numel() for p in llm.decoder.parameters()) / 1e6,
        encoder_width=asr.encoder.d_model,
        asr=sum(p.numel() for p in asr.parameters()) / 1e6,
        words=len({word for text in texts for word in text.split()}),
        n=len(cuts),
        voices=len(VOICES["test"]),
        error=error,
        right=sum(map(sum, right.values())) / len(rows),
        rows=len(rows),
        tasks="\n".join(lines),
    )
    (folder / "README.md").write_text(card)
    print(card)
