# SPDX-License-Identifier: Apache-2.0
"""Write ``aa61722.tar.xz`` and ``aa61722.json``: files of the package at that commit, for ``test_old_files.py``.

The modules that are imported here have other names now, so this runs with a checkout of that commit only::

    git worktree add ../then aa61722
    PYTHONPATH=../then OMP_NUM_THREADS=1 python tests/archive/write_old_files.py tests/archive/data

Models, cuts and settings are tiny, and the frozen parts are among the files, since another torch may draw other
weights. Paths are relative to the folder of the files; where the old code writes absolute ones into its text files,
the folder is replaced by ``@FOLDER@``.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from lhotse import CutSet
from omegaconf import OmegaConf
from safetensors.torch import load

FOLDER = b"@FOLDER@"
POOL = {
    "tasks": [
        {"name": "repeat", "scoring": "wer", "split": "train", "prompts": {"train": ["say it"], "heldout": ["say"]}},
        {"name": "first", "scoring": "exact", "split": "train", "prompts": {"train": ["first word", "say the first"]}},
        {"name": "last", "scoring": "exact", "split": "train", "prompts": {"train": ["last word"]}},
        {"name": "count", "scoring": "exact", "split": "heldout", "prompts": {"train": ["count it"]}},
    ]
}
MODEL = {
    "pretrained_asr": "parts/asr.nemo",
    "pretrained_llm": "parts/llm",
    "connector": {"hidden_size": 8},
    "generation": {"max_new_tokens": 6},
    "transcription_task": "repeat",
}
TARGETS = {
    "pretrained_llm": "parts/llm",
    "tasks": "tasks.yaml",
    "cuts_path": "cuts/cuts.jsonl.gz",
    "generation": {"max_new_tokens": 6, "batch_tokens": 60},
    "shard_size": 3,
    "cuda": -1,
}
RUN = {
    "seed": 3,
    "data": None,
    "model": {
        **MODEL,
        "train_ds": {
            "cuts_path": "targets/cuts.jsonl.gz",
            "batch_size": 2,
            "rows_per_cut": 2,
            "shuffle": True,
            "seed": 3,
        },
        "validation_ds": {"cuts_path": "targets/cuts-00001.jsonl.gz", "batch_size": 4},
        "optim": {
            "name": "adamw",
            "lr": 1e-2,
            "sched": {"name": "CosineAnnealing", "warmup_steps": 2, "max_steps": 7, "min_lr": 1e-4},
        },
    },
    "benchmark": {"enabled": False, "tasks": "tasks.yaml"},
    "trainer": {
        "max_steps": 7,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "gradient_clip_val": 1.0,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    },
    "exp_manager": {
        "exp_dir": "runs",
        "create_tensorboard_logger": False,
        "create_checkpoint_callback": True,
        "checkpoint_callback_params": {"monitor": "val_loss", "save_top_k": 1, "save_nemo_on_train_end": False},
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
    },
}
RUNS = {
    "lora": {
        "interleave": None,
        "lora": {"rank": 2, "alpha": 4},
        "encoder": {"freeze": ["pre_encode", "feed_forward", "conv", "norm_self_att", "linear_[qkv]", "pos"]},
    },
    "llm": {
        "interleave": {"probability": 1.0, "text_share": 0.6},
        "llm": {"freeze": ["embedding", "output_layer", "mlp", "layers.0"], "lr": 1e-3},
    },
}
RECIPES = {  # changes of the embedded default's section data:
    "default": {},
    "reference": {"targets": "reference", "reference_format": "It is {}."},
    "other": {"seed": 1, "tasks_per_cut": 3, "always_tasks": ["transcribe"], "train_utterances": 20},
}
STOPPED_AFTER = 4  # steps, in the middle of a pass
EVALUATION = {
    "output_dir": "evaluation",
    "systems": {
        "mtbi": {"kind": "speech", "nemo": ["full.nemo"]},
        "cascade": {"kind": "cascade", "of": "mtbi", "asr": "parts/asr.nemo"},
        "text": {"kind": "text", "of": "mtbi"},
    },
    "sets": {"test": {"cuts": "cuts/cuts.jsonl.gz", "tasks": "tasks.yaml", "wordings": None, "limit": 3}},
    "kl_utterances": 2,
    "resamples": 50,
    "examples": 1,
    "cuda": -1,
}
RECIPE = {
    "cache_dir": "cache",
    "tasks": "tasks.yaml",
    "train_utterances": 6,
    "validation_utterances": 1,
    "test_utterances": 1,
    "tasks_per_cut": 2,
    "adapt": {"steps": 1},
}


def digest(value):
    """Return the hash of a tensor's dtype, shape and content."""
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content).hexdigest()


def frozen_parts():
    """Write encoder, LLM, cuts and tasks."""
    from nemo_mtbi.data.corpus import write_cuts
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_cuts, tiny_text_llm

    tiny_asr_nemo("parts/asr.nemo")
    llm = tiny_text_llm("parts/llm", tie_embeddings=False)
    Path("tasks.yaml").write_text(yaml.safe_dump(POOL))
    cuts = list(CutSet.from_file(tiny_cuts("cuts", 6, behaviors=False, llm=llm)))
    for cut in cuts:
        words = cut.supervisions[0].text.split()
        cut.custom = {"references": {"repeat": " ".join(words), "first": words[0], "last": words[-1], "count": "one"}}
    write_cuts(Path("cuts/cuts.jsonl.gz"), cuts)


def archives():
    """Write a small and a full ``.nemo``; return what they hold and answer."""
    from lightning.pytorch import seed_everything

    from nemo_mtbi.models.mtbi_model import MTBIModel

    seed_everything(3, verbose=False)
    model = MTBIModel(OmegaConf.create({**MODEL, "lora": {"rank": 2, "alpha": 4}})).eval()
    with torch.no_grad():  # new adapters change nothing
        for name, value in model.state_dict(keep_vars=True).items():
            if "adapters" in name:
                value.copy_(0.3 * torch.randn(value.shape))
    model.save_to("small.nemo")
    model.save_to("full.nemo", full=True)
    samples = [cut.load_audio()[0] for cut in CutSet.from_file("cuts/cuts.jsonl.gz")]
    return {
        "weights": {name: digest(value) for name, value in model.state_dict().items()},
        "all": {name: digest(x) for name, x in [*model.named_parameters(), *model.named_buffers()]},
        "answers": model.generate(samples, ["say it"] * 6),
    }


def targets():
    """Write targets, and those of a run that was killed behind the first batch of its second shard."""
    from nemo_mtbi import generate_targets
    from nemo_mtbi.data.targets import _ShardMaker

    generate_targets.run(OmegaConf.create({**TARGETS, "output_dir": "targets"}))
    partial, ask = Path("killed/cuts-00001.partial.jsonl"), _ShardMaker._ask

    def killed(self, requests):
        if partial.exists() and partial.read_bytes().count(b"\n") == 2:  # a header and a batch
            raise KeyboardInterrupt
        return ask(self, requests)

    _ShardMaker._ask = killed
    with contextlib.suppress(KeyboardInterrupt):
        generate_targets.run(OmegaConf.create({**TARGETS, "output_dir": "killed"}))
    _ShardMaker._ask = ask


def runs():
    """Train to the end without a stop, and up to a signal; return losses and weights of the former.

    The checkpoint of the latter is in the middle of a pass, which this commit counted as ended: going on from it, it
    gave the same steps up to the end of that pass, and then drew those of another one.
    """
    from nemo_mtbi import training
    from nemo_mtbi.models.mtbi_model import MTBIModel

    step, losses, found, models = MTBIModel.training_step, [], {}, []

    def recorded(self, batch, index):
        models[:] = [self]
        loss = step(self, batch, index)
        losses.append(float(loss))
        if len(losses) == STOPPED_AFTER - 1 and folder != "whole":
            os.kill(os.getpid(), signal.SIGTERM)  # it ends after the next step, which has been read
        return loss

    MTBIModel.training_step = recorded
    for name, changes in RUNS.items():
        for folder in ("whole", name):
            losses.clear()
            cfg = OmegaConf.merge(RUN, {"name": folder, "model": changes, "exp_manager": {"name": folder}})
            nemo = training.train(cfg)
            if folder == "whole":
                found[name] = {"losses": list(losses), "weights": weights_of(nemo)}
        assert nemo is None and losses == found[name]["losses"][:STOPPED_AFTER]
        found[name]["stopped"] = {key: digest(value) for key, value in models[0].state_dict().items()}
        shutil.rmtree("runs/whole")
    MTBIModel.training_step = step
    for path in [*Path("runs").glob("*/*"), *Path("runs").glob("*/checkpoints/*")]:
        if path.name != "checkpoints" and not path.name.endswith("-last"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def weights_of(nemo):
    """Return the digests of the trained weights in an archive."""
    with tarfile.open(nemo) as tar:
        held = load(tar.extractfile("./model_weights.safetensors").read())
    return {name: digest(value) for name, value in held.items()}


def frames():
    """Fill a cache of the encoder's frames."""
    from nemo_mtbi.models.mtbi_model import MTBIModel

    model = MTBIModel(OmegaConf.create({**MODEL, "encoder_cache": "frames"})).eval()
    samples = [torch.from_numpy(cut.load_audio()[0]) for cut in list(CutSet.from_file("cuts/cuts.jsonl.gz"))[:2]]
    lengths = torch.tensor([len(x) for x in samples])
    audio = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    cache = model.speech_llm.encoder_cache
    out, counts = cache.encode(model.speech_llm.encoder, audio, lengths)
    assert (cache.hits, cache.misses) == (0, 2)
    return {"frames": digest(out), "counts": counts.tolist()}


def evaluation():
    """Let three systems answer; keep answers and results."""
    from nemo_mtbi.evaluation.run import Backends, run
    from nemo_mtbi.evaluation.settings import parse_eval_config
    from nemo_mtbi.models.ctc import transcribe_ctc
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.modules.text_llm import file_digest

    config = parse_eval_config(OmegaConf.create(EVALUATION))
    run(config, Backends(MTBIModel.restore_from, transcribe_ctc, file_digest))
    for name in ("predictions.jsonl", "results.json"):
        path = Path("evaluation", name)
        Path(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    for path in Path("evaluation").glob("*.*"):
        path.unlink()


def recipe():
    """Fill the cache of a recipe; return the names in it, and those of the embedded default."""
    from nemo_mtbi import recipe as module
    from nemo_mtbi.config import parse_model_config

    found = module.prepare(module.parse_data_config(RECIPE), asdict(parse_model_config(MODEL)))
    for path in Path("cache").glob("*/audio"):  # only training reads it
        shutil.rmtree(path)
    for path in [*Path("cache").glob("*.lock"), *Path("cache").glob("*/encoder.nemo")]:
        path.unlink()
    here = os.getcwd() + "/"
    names = ("train", "validation", "test", "pretrained_asr")
    return {name: str(Path(getattr(found, name)).absolute()).replace(here, "") for name in names}


def names():
    """Return the names in the cache that recipes have, without making anything."""
    from nemo_mtbi import recipe as module
    from nemo_mtbi.config import parse_model_config
    from nemo_mtbi.data import corpus
    from nemo_mtbi.parallel import groups

    groups.initialize()
    cfg = OmegaConf.load(Path(module.__file__).parents[1] / "conf" / "mtbi_demo.yaml")
    model, found = asdict(parse_model_config(cfg.model)), {}
    corpus._finished_root = lambda folder: folder
    module.load_corpus = lambda folder: []
    module.generate_targets = lambda cuts, out_dir, **more: [Path(out_dir) / "cuts"]
    module.reference_targets = lambda cuts, out_dir, **more: Path(out_dir) / "cuts"
    for name, changes in RECIPES.items():
        made = module.prepare(module.parse_data_config({**cfg.data, "cache_dir": "names", **changes}), model)
        found[name] = [path.parent.name for path in (made.train, made.validation, made.test)]
    shutil.rmtree("names")
    return found


def hide_folder():
    """Put a mark in the place of this folder's absolute path."""
    here = os.getcwd().encode()
    for path in sorted(Path().rglob("*")):
        if path.suffix not in (".json", ".jsonl", ".gz", ".yaml") or not path.is_file():
            continue
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        if here in text:
            text = text.replace(here, FOLDER)
            path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def without_owner(info):
    """Leave out who has written a file, and when."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def main(output):
    """Write both files."""
    output = Path(output).absolute()
    found = {"run": RUN, "runs": RUNS, "targets": TARGETS, "evaluation": EVALUATION, "recipe": RECIPE}
    found = {"settings": {**found, "model": MODEL, "recipes": RECIPES, "stopped_after": STOPPED_AFTER}}
    with tempfile.TemporaryDirectory(prefix="aa61722-") as folder:
        os.chdir(folder)
        frozen_parts()
        found["archives"] = archives()
        targets()
        found["runs"] = runs()
        found["frames"] = frames()
        evaluation()
        found["recipe"] = recipe()
        hide_folder()
        with tarfile.open(output / "aa61722.tar.xz", "w:xz") as tar:
            for path in sorted(Path().rglob("*")):
                if path.is_file():
                    tar.add(path, filter=without_owner)
        found["names"] = names()
        os.chdir(output)
    text = json.dumps(found, indent=1) + "\n"
    (output / "aa61722.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
