# SPDX-License-Identifier: Apache-2.0
"""The stores that ``corrupt.py`` damages: small models, checkpoints, caches, targets and answers.

Whatever starts process groups runs in a process of its own: a forked one can't use those of its parent.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Store:
    """Something on disk that can be damaged.

    Attributes:
        name: for the table.
        make: writes it into a folder of its name below the one that it gets, where the parts and the audio are.
        load: loads what lies in a folder, and returns a hash of it.
        named: text that is in a message that names what is damaged, beside the path of the folder.
    """

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path], str]
    named: tuple[str, ...] = ()


def hash_of(value: Any) -> str:
    """SHA-256 of plain values and tensors, bit by bit."""
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} of".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    else:
        yield repr(value).encode()


# ------------------------------------------------------------------------------------------------------------- stores


def make_stores(folder: Path, stores: Sequence[Store]) -> None:
    """Write stores below ``folder``, the working directory, and what they are made of."""
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_cuts, tiny_text_llm

    tiny_asr_nemo(folder / "parts" / "asr.nemo")
    tiny_text_llm(folder / "parts" / "llm", tie_embeddings=False)
    tiny_cuts(folder / "audio", 6, behaviors=False)
    for store in stores:
        store.make(folder)


def _model(parts: Path):
    from lightning.pytorch import seed_everything
    from omegaconf import OmegaConf

    from nemo_mtbi.models.mtbi_model import MTBIModel

    seed_everything(3, verbose=False)
    section = {"pretrained_asr": str(parts / "asr.nemo"), "pretrained_llm": str(parts / "llm")}
    return MTBIModel(OmegaConf.create({**section, "connector": {"hidden_size": 24}}))


def _restored(path: Path) -> str:
    """Hash of all that a ``.nemo`` gives: every weight, the chat format, the tokenizer and the configuration."""
    from omegaconf import OmegaConf

    from nemo_mtbi.models.mtbi_model import MTBIModel

    model = MTBIModel.restore_from(str(path), map_location="cpu")
    chat, weights = model.chat, dict([*model.named_parameters(), *model.named_buffers()])
    words = chat.encode("red cat runs"), chat.turn, chat.end, chat.more
    return hash_of([weights, words, OmegaConf.to_container(model.cfg), model.frozen.fingerprints])


def _make_full(folder: Path) -> None:
    _model(folder / "parts").save_to(folder / "full nemo" / "model.nemo", full=True)


def _make_small(folder: Path) -> None:
    place = folder / "small nemo"
    shutil.copytree(folder / "parts", place)
    os.chdir(place)  # so that the archive refers to what lies beside it
    _model(Path()).save_to(place / "model.nemo")
    os.chdir(folder)


def _training(model):
    """A checkpoint plugin and the optimizer whose state it saves."""
    from nemo_mtbi.parallel.checkpoint.plugin import ShardedCheckpointIO

    optimizer = torch.optim.AdamW(model.trained, 0.1)
    plugin = ShardedCheckpointIO(lambda: model.state_dict(keep_vars=True), lambda: [optimizer], seed=7)
    return plugin, optimizer


def _make_checkpoint(folder: Path, name: str) -> None:
    model = _model(folder / "parts")
    plugin, optimizer = _training(model)
    for value in model.trained:
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    state = {"epoch": 0, "global_step": 1, "state_dict": model.state_dict(), "loops": {"data": {"batches": 1}}}
    state |= {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{"last_epoch": 1}]}
    state["hyper_parameters"] = {"cfg": model.cfg}
    model.on_save_checkpoint(state)
    plugin.save_checkpoint(state, folder / name / "run-last.ckpt")


def _resumed(place: Path) -> str:
    from nemo_mtbi.parallel.checkpoint.plugin import choose_resume

    model = _model(Path("parts"))
    plugin, _ = _training(model)
    path = choose_resume(place)
    if path is None:
        raise ValueError(f"{place} holds no checkpoint")
    state = plugin.load_checkpoint(path)
    model.on_load_checkpoint(state)
    return hash_of(state)


def _resumed_as_large(place: Path) -> str:
    from nemo_mtbi.parallel.checkpoint import files

    files.HASHED_BYTES = 0  # in this process, which ends: as if every file were larger
    return _resumed(place)


def _encode(place: Path) -> str:
    from nemo_mtbi.encoders.cache import EncoderCache
    from nemo_mtbi.speech_llm.pretrained import load_speech_encoder

    audio = 0.1 * torch.randn(4, 9000, generator=torch.Generator().manual_seed(0))
    cache = EncoderCache(place, "sha256:" + "f" * 64, torch.float32)
    encoder = load_speech_encoder(Path("parts") / "asr.nemo")
    return hash_of(cache.encode(encoder, audio, torch.tensor([9000, 8000, 7000, 6000])))


def _make_cache(folder: Path) -> None:
    (folder / "encoder cache").mkdir()
    _encode(folder / "encoder cache")


class _Stopped(Exception):
    """The LLM that answers was stopped."""


def _answer(layout: list[int]) -> tuple[list[int], bool]:
    """Some tokens of the tiny vocabulary that depend on the prompt."""
    return [20 + byte % 90 for byte in hashlib.sha256(repr(layout).encode()).digest()[:6]], False


def _generate(folder: Path, place: Path, batches: int = 1000) -> None:
    from lhotse import CutSet

    from nemo_mtbi.targets.generate import TargetPlan, generate_targets
    from nemo_mtbi.targets.tasks import TaskPool
    from nemo_mtbi.testing import PROMPTS, tiny_chat

    left = iter(range(batches))

    def respond(layouts: list[list[int]]) -> list[tuple[list[int], bool]]:
        if next(left, None) is None:
            raise _Stopped
        return [_answer(layout) for layout in layouts]

    tasks = [
        {"name": name, "scoring": "exact", "split": "train", "prompts": {"train": list(wordings)}}
        for name, wordings in PROMPTS.items()
    ]
    generate_targets(
        CutSet.from_file(folder / "audio" / "cuts.jsonl.gz"),
        place,
        pool=TaskPool.from_dict({"tasks": tasks}),
        chat=tiny_chat(folder / "parts" / "llm" / "tokenizer.model"),
        respond=respond,
        provenance={"llm": "sha256:tiny"},
        plan=TargetPlan(max_new_tokens=8, batch_tokens=60),
        shard_size=3,
        progress=False,
    )


def _make_targets(folder: Path) -> None:
    from nemo_mtbi.targets.store import join_shards, seal

    _generate(folder, folder / "targets")
    join_shards(folder / "targets")
    seal(folder / "targets")


def _load_targets(place: Path) -> str:
    from lhotse import CutSet

    from nemo_mtbi.targets.store import JOINED, check_published, read_targets

    cuts = [cut.to_dict() for cut in read_targets(place)]
    check_published(place / JOINED)
    return hash_of([cuts, [cut.to_dict() for cut in CutSet.from_file(place / JOINED)]])


def _make_unfinished(folder: Path) -> None:
    try:
        _generate(folder, folder / "unfinished targets", batches=5)
    except _Stopped:
        return
    raise RuntimeError("the targets were finished: let fewer batches be answered")


def _finish(place: Path) -> str:
    _generate(Path(), place)
    # what is packed: a time in the header of a gzip file is nobody's content
    return hash_of({path.name: gzip.decompress(path.read_bytes()) for path in place.glob("cuts-*.gz")})


def _units() -> list:
    from nemo_mtbi.evaluation.answers import Unit

    return [Unit("mtbi", seed, "test", "seen", "repeat", f"print {seed}", 9) for seed in range(2)]


def _make_answers(folder: Path) -> None:
    from nemo_mtbi.evaluation.answers import save_answers
    from nemo_mtbi.evaluation.items import Reply

    for unit in _units():
        replies = [Reply(f"answer {unit.seed} {n}", n, n % 2 == 0) for n in range(unit.size)]
        save_answers(folder / "answers", unit, replies)


def _load_answers(place: Path) -> str:
    from nemo_mtbi.evaluation.answers import load_answers

    loaded = [load_answers(place, unit) for unit in _units()]
    if None in loaded:
        raise ValueError(f"{place} lacks answers, which are generated again")
    return hash_of([[vars(reply) for reply in replies] for replies in loaded])


_PARTS = ("model.pretrained_asr", "model.pretrained_llm")  # keys that name a damaged part
STORES = (
    Store("full nemo", _make_full, lambda place: _restored(place / "model.nemo")),
    Store("small nemo", _make_small, lambda place: _restored(place / "model.nemo"), _PARTS),
    Store("checkpoint", lambda folder: _make_checkpoint(folder, "checkpoint"), _resumed),
    Store("large checkpoint", lambda folder: _make_checkpoint(folder, "large checkpoint"), _resumed_as_large),
    Store("encoder cache", _make_cache, _encode),
    Store("targets", _make_targets, _load_targets),
    Store("unfinished targets", _make_unfinished, _finish),
    Store("answers", _make_answers, _load_answers),
)
