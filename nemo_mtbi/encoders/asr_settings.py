# SPDX-License-Identifier: Apache-2.0
"""Configurations of NeMo's ASR models from archives: checks, and the ones that NeMo is given instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from nemo_mtbi.encoders.nemo_parts import CLASSES, MODULES, section_class
from nemo_mtbi.io.tensor_file import ArchiveError
from nemo_mtbi.io.untrusted_yaml import entries, shown, walk

MODELS = "nemo.collections.asr.models"
_TARGETS = ("_target_", "target", "cls")  # keys under which Hydra and NeMo look for a class
# Classes that configurations of NeMo's ASR models name, in sections that are built here and in those that are not.
_KNOWN = re.compile(
    r"nemo\.collections\.(asr\.(models|modules|parts|losses|metrics|data)|common\.(losses|parts|tokenizers))"
    r"(\.[a-z_][a-z0-9_]*)*\.([A-Z]\w*|get_nemo_transformer)"
    r"|nemo\.core\.(optim|classes\.mixins)(\.[a-z_][a-z0-9_]*)*\.[A-Z]\w*"
    r"|torch\.optim\.[A-Z]\w*"
)
_HOSTS = re.compile(r"\.(os|sys|io|subprocess|builtins|importlib|shutil|pickle|torch|posix|nt|code|pty)\.")
_CODE = ("trust_remote_code",)  # keys that no ASR model needs, whatever its classes are
# Models with a CTC head: their own name, and whether they have a tokenizer.
_CTC = {
    "EncDecCTCModel": "EncDecCTCModel",
    "EncDecCTCModelBPE": "EncDecCTCModelBPE",
    "EncDecHybridRNNTCTCModel": "EncDecCTCModel",
    "EncDecHybridRNNTCTCBPEModel": "EncDecCTCModelBPE",
}
_HEAD = "decoder_layers.0.weight"  # [classes and blank, channels, 1]
# Files of a tokenizer, and their names in archives of old that do not give them.
_TOKENIZER = {"model_path": "tokenizer.model", "vocab_path": "vocab.txt", "spe_tokenizer_vocab": "tokenizer.vocab"}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a configuration that names a class other than NeMo's for speech, or asks for foreign code.

    Args:
        settings: the whole tree, plain values.

    Raises:
        ArchiveError: names the place.
    """
    target = settings.get("target")
    if target is not None and not _is_known(target):
        raise ArchiveError(f"it names the class {shown(target)}, which NeMo does not allow")
    for place, key, value in entries(settings):
        named = value is not None if key == "_target_" else isinstance(value, str) and "." in value
        if key in _TARGETS and named and not _is_known(value):
            raise ArchiveError(f"it names the class {shown(value)} at {shown(place)}, which is not one for speech")
        if key in _CODE and value:
            raise ArchiveError(f"it asks for foreign code at {shown(place)}")
        if key == "_args_":
            raise ArchiveError(f"it has {shown(place)}, which could call other code")


def _is_known(target: Any) -> bool:
    """Return whether a value is the dotted name of a class that a configuration may create."""
    return isinstance(target, str) and bool(_KNOWN.fullmatch(target)) and not _HOSTS.search(f"{target}.")


def named_files(settings: Mapping[str, Any]) -> set[str]:
    """Return the names of files that a configuration refers to: ``nemo:name``, or the end of a path."""
    texts = {value for _, value in walk(settings) if isinstance(value, str)}
    return {PurePosixPath(text.removeprefix("nemo:")).name for text in texts} | {*_TOKENIZER.values()}


def ctc_settings(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], members: Collection[str]
) -> dict[str, Any]:
    """Return the configuration of the CTC model in an archive: the model itself, or the CTC part of a hybrid one.

    Args:
        settings: of the archive; front end and encoder have been checked.
        shapes: of all weights.
        members: names of the files in the archive.

    Raises:
        ArchiveError: if there is no CTC head, or its size is not that of its weights.
    """
    target = str(settings.get("target"))
    kind = target.rpartition(".")[2]
    if not target.startswith(f"{MODELS}.") or kind not in _CTC:
        raise ArchiveError(f"its {shown(kind)} has no CTC head; give a CTC or a hybrid model of NeMo")
    hybrid = "Hybrid" in kind
    section: Any = settings.get("aux_ctc" if hybrid else "decoder")
    section = section.get("decoder") if hybrid and isinstance(section, dict) else section
    section_class(section, "decoder", {"decoder": ("ConvASRDecoder",)})
    shape = shapes.get(f"{'ctc_' if hybrid else ''}decoder.{_HEAD}", ())
    if len(shape) != 3 or shape[2] != 1:
        raise ArchiveError(f"its CTC head has no weights {_HEAD}")
    own = _CTC[kind]
    ctc: dict[str, Any] = {
        "target": f"{MODELS}.{own}",
        "sample_rate": settings.get("sample_rate", settings["preprocessor"].get("sample_rate")),
        **{name: settings[name] for name in CLASSES},
        "decoder": {
            "_target_": f"{MODULES}.ConvASRDecoder",
            "feat_in": shape[1],
            "num_classes": shape[0] - 1,
            "vocabulary": [],
        },
    }
    if own == "EncDecCTCModelBPE":
        ctc["tokenizer"] = _tokenizer(settings.get("tokenizer"), members)
    else:
        ctc["decoder"]["vocabulary"] = _letters(section.get("vocabulary"), shape[0] - 1)
    return ctc


def _letters(vocabulary: Any, classes: int) -> list[str]:
    if not isinstance(vocabulary, list) or not all(isinstance(piece, str) for piece in vocabulary):
        raise ArchiveError("its CTC head has no vocabulary")
    if len(vocabulary) != classes:
        raise ArchiveError(f"its vocabulary has {len(vocabulary)} entries, but its weights have {classes}")
    return vocabulary


def _tokenizer(section: Any, members: Collection[str]) -> dict[str, Any]:
    """Return the section of a tokenizer made only of files in the archive."""
    kind = str(section.get("type")).lower() if isinstance(section, dict) else "nothing"
    if kind == "agg" and isinstance(section.get("langs"), dict):
        langs = {str(name): _tokenizer(inner, members) for name, inner in section["langs"].items()}
        if any(inner["type"] != "bpe" for inner in langs.values()):
            raise ArchiveError("its tokenizers hold tokenizers")
        return {"type": "agg", "dir": None, "langs": langs}
    if kind != "bpe":
        raise ArchiveError(f"its tokenizer is of type {shown(kind)}, and only bpe (SentencePiece) can be read")
    files = {}
    for key, name in _TOKENIZER.items():
        given = section.get(key)
        file = PurePosixPath(str(given).removeprefix("nemo:")).name if given else name
        if file not in members and key != "spe_tokenizer_vocab":
            raise ArchiveError(f"it lacks {shown(file)}, a file of its tokenizer")
        files[key] = f"nemo:{file}"  # of the archive, whatever else has this name; NeMo does without the last one
    return {"type": "bpe", "dir": None, **files}
