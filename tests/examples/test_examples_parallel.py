# SPDX-License-Identifier: Apache-2.0
"""The scripts that ask an LLM write with several processes what one process writes."""

import json
import runpy
from pathlib import Path

import pytest
from lhotse import CutSet
from matrix import with_core
from omegaconf import OmegaConf

from nemo_mtbi.data.cut_files import write_cuts
from nemo_mtbi.testing import tiny_cuts

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"single": (1, 1, 1), "tp2": (2, 1, 2), "pp2": (1, 2, 2), "tp2_dp2": (2, 1, 4), "pp2_dp2": (1, 2, 4)}
POOL = """\
tasks:
  - {name: repeat, scoring: wer, split: train, prompts: {train: [say it, repeat it], heldout: [say]}}
  - {name: count, scoring: exact, split: heldout, prompts: {train: [count it]}}
"""


def main(script, name, **keys):
    """Runs an example with its own YAML under a layout."""
    cfg = OmegaConf.load(ROOT / "conf" / f"{script}.yaml")
    cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, _ = SIZES[name]
    cfg.update({"cuda": -1, **keys})
    return runpy.run_path(str(ROOT / "examples" / f"{script}.py"))["main"](cfg)


def generate(folder, name):
    keys = {"cuts_path": f"{folder}/cuts.jsonl.gz", "pretrained_llm": f"{folder}/llm", "tasks": f"{folder}/pool.yaml"}
    generation = {"max_new_tokens": 8, "batch_tokens": 100}
    main("mtbi_generate_targets", name, output_dir=f"{folder}/{name}", shard_size=2, generation=generation, **keys)


def transcribe(folder, name):
    audio = [cut.recording.sources[0].source for cut in CutSet.from_file(f"{folder}/cuts.jsonl.gz")]
    keys = {"model_path": f"{folder}/m.nemo", "output_filename": f"{folder}/{name}.jsonl", "audio": audio}
    main("mtbi_transcribe", name, prompt="say it", **keys)


def evaluate(folder, name, cache_gib="2"):
    systems = {"mtbi": {"nemo": f"{folder}/m.nemo"}, "text": {"kind": "text", "of": "mtbi"}}
    systems["cascade"] = {"kind": "cascade", "of": "mtbi"}
    sets = {"test": {"cuts": f"{folder}/cuts.jsonl.gz", "tasks": f"{folder}/pool.yaml"}}
    keys = {"output_dir": f"{folder}/eval-{name}", "systems": systems, "sets": sets, "resamples": 20, "examples": 0}
    keys["cache_gib"] = float(cache_gib)
    main("mtbi_eval", name, **keys)


@pytest.fixture(scope="module")
def folder(model_section, tmp_path_factory):
    """Model, LLM, utterances and task pool, with what one process makes of them."""
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.testing import tiny_text_llm

    folder = tmp_path_factory.mktemp("scripts")
    section = model_section(train_ds=None, validation_ds=None)
    section.pretrained_llm = str(tiny_text_llm(folder / "llm", tie_embeddings=False))
    MTBIModel(section).save_to(str(folder / "m.nemo"))
    cuts = list(CutSet.from_file(tiny_cuts(folder / "audio", 6, behaviors=False)))
    for cut in cuts:
        words = cut.supervisions[0].text.split()
        cut.custom = {"references": {"repeat": " ".join(words), "count": str(len(words))}}
    write_cuts(folder / "cuts.jsonl.gz", cuts)
    (folder / "pool.yaml").write_text(POOL)
    for job in (generate, transcribe, evaluate):
        job(folder, "single")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", with_core([name for name in SIZES if name != "single"], ["tp2", "pp2_dp2"]))
def test_parity_of_targets(folder, name, processes):
    processes(generate, folder, name, count=SIZES[name][2])
    for path in (folder / "single").iterdir():
        if path.suffix == ".gz":
            assert (folder / name / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((folder / name).glob("cuts-*.jsonl.gz"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", with_core(["tp2", "pp2"], ["tp2"]))
def test_parity_of_transcripts_and_evaluations(folder, name, processes):
    processes(transcribe, folder, name, count=2)
    lines = (folder / "single.jsonl").read_text()
    assert (folder / f"{name}.jsonl").read_text() == lines and len(lines.splitlines()) == 6
    # without room every task encodes the speech again, which all processes must do together
    processes(evaluate, folder, name, 0, count=2)
    for file in ("answers", "divergences"):
        assert len(list((folder / f"eval-{name}" / file).rglob("*.jsonl"))) > 3
    expected, found = (
        [json.loads(line) for line in (folder / f"eval-{layout}" / "predictions.jsonl").read_text().splitlines()]
        for layout in ("single", name)
    )
    for row, same in zip(found, expected, strict=True):
        assert row.pop("kl") == pytest.approx(same.pop("kl"), abs=1e-4)
        assert row == same


def refused(folder):
    """Worker: two replicas would both write one file."""
    with pytest.raises(ValueError, match="2 processes were started, but one replica of the model does this"):
        transcribe(folder, "single")


def test_one_replica_transcribes(folder, processes):
    processes(refused, folder, count=2)
