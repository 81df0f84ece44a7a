# SPDX-License-Identifier: Apache-2.0
"""The commands of the how-to pages, run as they stand, where small models have the names that they use."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import hf_encoder, hf_llm
from safetensors.torch import load_file
from workers import run_script

import nemo_mtbi
from nemo_mtbi.demo.corpora.corpus import load_corpus
from nemo_mtbi.demo.corpora.synthetic import build_synthetic

pytestmark = [pytest.mark.slow, pytest.mark.processes]
ROOT = Path(nemo_mtbi.__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PART, LLM, ASR = "train-clean-100", "Qwen2.5-7B-Instruct", "stt_en_fastconformer_ctc_large.nemo"
# What makes a run short; everything else is the command's own.
SHORT = {
    "mtbi_train.py": (
        "data=null benchmark.enabled=false model.connector.hidden_size=32 model.micro_batch_tokens=2000 "
        "model.train_ds.batch_tokens=1500 model.train_ds.num_workers=0 ++model.validation_ds.num_workers=0 "
        "model.validation_ds.batch_tokens=2000 model.generation.max_new_tokens=4 trainer.max_steps=2 "
        "trainer.val_check_interval=2 trainer.accelerator=cpu trainer.precision=32-true "
        "exp_manager.checkpoint_callback_params.async_save=false"
    ).split(),
    "mtbi_generate_targets.py": ["generation.max_new_tokens=4", "cuda=-1"],
    "align.py": ["--device", "cpu"],
}
DATA = ["model.train_ds.cuts_path=targets/cuts.jsonl.gz", "model.validation_ds.cuts_path=val/cuts.jsonl.gz"]


def commands(section):
    """The shell commands of a section, which stands on one page."""
    pattern = re.compile(rf"^## {section}\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    (text,) = [text for page in PAGES for text in pattern.findall(page.read_text())]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def librispeech(folder, cuts):
    """The directory layout of LibriSpeech, and transcripts with case and punctuation as LibriSpeech-PC has them."""
    chapter = folder / "LibriSpeech" / PART / "84" / "121"
    chapter.mkdir(parents=True)
    lines, texts = [], []
    for index, cut in enumerate(cuts):
        name, words = f"84-121-{index:04d}", cut.supervisions[0].text
        shutil.copy(cut.recording.sources[0].source, chapter / f"{name}.flac")
        lines.append(f"{name} {words.upper()}\n")
        texts.append(f"{name} {words.capitalize()}.\n")
    (chapter / "84-121.trans.txt").write_text("".join(lines))
    (folder / "librispeech-pc.json").write_text("".join(texts))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the commands take for granted."""
    folder = tmp_path_factory.mktemp("readme")
    hf_llm(folder / LLM, "qwen2", "chatml")
    hf_encoder(folder / "whisper-large-v3", "whisper")
    hf_encoder(folder / "wavlm-large", "wavlm")
    spoken = build_synthetic(folder / "cache", num_utterances=12, seed=7, split="train", num_workers=1, progress=False)
    librispeech(folder, list(load_corpus(spoken)))
    demo = ROOT / "nemo_mtbi" / "assets" / "demo"
    shutil.copy(demo / "encoder.nemo", folder / ASR)
    shutil.copy(demo / "tasks.yaml", folder / "tasks.yaml")
    blend = re.search(r"```yaml\n(# blend.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL).group(1)
    (folder / "blend.yaml").write_text(blend.replace("0..28", "0..0"))  # ours fits into one shard
    return folder


def run(place, command, *more):
    """Run a command as it stands, with what makes it short; what it printed.

    A plain ``python`` is forked from a process that has imported NeMo, all else is started as it is.
    """
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    words = [str(ROOT / word) if word == script else word for word in words]
    words += [*SHORT.get(Path(script).name, ()), *more]
    log = place / "output.log"
    log.unlink(missing_ok=True)
    if words[0] == "python":
        status = run_script(words[1:], place, log, 400)
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "wb") as output:
            status = subprocess.run(
                words, cwd=place, env=environment, stdout=output, stderr=output, timeout=400
            ).returncode
    printed = log.read_text(errors="replace")
    assert status == 0, f"{command}\n{printed[-4500:]}"
    return printed


@pytest.fixture(scope="module")
def corpus(place):
    """The section on corpora is run first, and as a whole: the others train on what it makes."""
    prepare, align, targets, *exports, train = commands("Your own corpus")
    said = {"prepare": run(place, prepare), "align": run(place, align), "targets": run(place, targets)}
    (place / "val").mkdir()
    shutil.copy(place / "targets" / "cuts.jsonl.gz", place / "val" / "cuts.jsonl.gz")
    said["export"] = "".join(run(place, export) for export in exports)
    said["train"] = run(place, train, "trainer.devices=1")
    return said


def test_a_corpus(corpus, place):
    assert f"corpora/{PART}.jsonl.gz: 12 utterances" in corpus["prepare"] and "upper case" not in corpus["prepare"]
    assert "go on with scripts/align.py" in corpus["prepare"]
    assert '"aligned": 1' in corpus["align"]
    assert "train on: model.train_ds.cuts_path=" in corpus["targets"]
    assert "lhotse_shar" in corpus["export"] and "nemo_tarred" in corpus["export"]
    assert list(place.glob("nemo_experiments/mtbi_qwen2.5-7b_fastconformer/**/*.nemo"))


def test_an_llm_is_converted(corpus, place):
    _, to_megatron, to_hf, *_ = commands("Your own LLM")
    run(place, to_megatron)
    run(place, to_hf)
    same = [load_file(place / name / "model.safetensors") for name in (LLM, "Qwen2.5-7B-again")]
    assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())


@pytest.mark.full
def test_an_llm(corpus, place):
    train, _, _, lora, whole = commands("Your own LLM")
    asr = f"model.pretrained_asr={ASR}"
    run(place, train, asr, "+model.targets={allow_foreign: true}", *DATA)  # a system prompt of its own
    for learning in (lora, whole):
        run(place, learning, asr, f"model.pretrained_llm={LLM}", *DATA)


def test_an_encoder_that_trains(corpus, place):
    _, freeze, _ = commands("Your own encoder")
    run(place, freeze, f"model.pretrained_asr={ASR}", f"model.pretrained_llm={LLM}", *DATA)


@pytest.mark.full
def test_an_encoder(corpus, place):
    layers, _, beside = commands("Your own encoder")
    models = [f"model.pretrained_llm={LLM}", *DATA]
    run(place, layers.replace("16, -1", "1, -1"), *models)  # three layers here
    run(place, beside.replace("6, -1", "1, -1"), f"model.pretrained_asr={ASR}", *models)


CLUSTER = [f"model.pretrained_llm={LLM}", f"model.pretrained_asr={ASR}", *DATA]


def test_a_plan_of_a_cluster(corpus, place):
    plan, *_ = commands("On a cluster")
    assert "nothing of this would be refused" in run(place, plan, *CLUSTER)


@pytest.mark.full
def test_a_cluster(corpus, place):
    _, train, _ = commands("On a cluster")
    run(place, in_pieces(train, 4), *CLUSTER)


@pytest.mark.full
def test_targets_on_a_cluster(corpus, place):
    *_, targets = commands("On a cluster")
    (place / "targets").rename(place / "targets-before")  # the others train on either
    own = [f"pretrained_llm={LLM}", "tasks=tasks.yaml", "cuts_path=aligned/cuts.jsonl.gz"]
    assert "train on: model.train_ds.cuts_path=" in run(place, in_pieces(targets, 2), *own)


def in_pieces(command, processes):
    """torchrun of this environment, with as many processes as a small machine has."""
    command = re.sub(r"^torchrun", f"{sys.executable} -m torch.distributed.run --standalone", command)
    if processes == 2:
        command = command.replace("=8", "=2").replace("parallel_size=4", "parallel_size=2")
    return command


def test_every_section_that_was_promised_is_there():
    for section in ("Your own LLM", "Your own encoder", "Your own corpus", "On a cluster"):
        assert commands(section), section
