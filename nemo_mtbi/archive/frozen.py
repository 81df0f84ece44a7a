# SPDX-License-Identifier: Apache-2.0
"""The frozen parts of a model: on disk, where the configuration says, or inside the ``.nemo`` that is restored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemo_mtbi.archive.large_files import check_files, hash_together
from nemo_mtbi.archive.restored import OpenArchive
from nemo_mtbi.config.encoder import EncoderSection
from nemo_mtbi.config.model import ModelConfig
from nemo_mtbi.encoders.registry import kind_of
from nemo_mtbi.io.digests import digest_of
from nemo_mtbi.io.file_digests import sampled
from nemo_mtbi.llm.directory import TextLLMDirectory
from nemo_mtbi.speech_llm.pretrained import find_text_llm, resolve

INSIDE = {"asr": "nemo:encoder", "llm": "nemo:llm"}  # references to parts of the archive itself
DEMO_NAMES = {"asr": "encoder.nemo", "llm": "llm"}
_BESIDE = "{'encoder': {'beside': {'path': its path}}}"


class FrozenParts:
    """Places of encoder and LLM of a model, compared with what the model was trained with; nothing is loaded.

    Args:
        config: of the model.
        archive: the ``.nemo`` that the model is restored from; ``None``: it is a new model.

    Attributes:
        embedded: parts that come from inside a ``.nemo``, and have no place of their own on this machine.
        encoder_section: how the encoder is used; a second encoder with its path on this machine.
        llm: directory of the LLM; ``None`` if it is inside the archive.
        fingerprints: hash of each part.
        file_digests: SHA-256 of each file of a part of which the fingerprint covers samples only.

    Raises:
        ValueError: if a part is not where the configuration says, or not the one that the model was trained with.
    """

    def __init__(self, config: ModelConfig, archive: OpenArchive | None = None):
        self._config = config
        self.embedded = {part for part, inside in INSIDE.items() if self.reference(part) == inside}
        self._paths = {part: self._locate(part, archive) for part in INSIDE if part not in self.embedded}
        self.encoder_section = self._located_encoder(archive)
        self._check_full()
        self.llm: TextLLMDirectory | None = None if "llm" in self.embedded else find_text_llm(self._paths["llm"])
        self.fingerprints = {part: self._fingerprint(part, archive) for part in INSIDE}
        large = self._sampled_files()
        self.file_digests = hash_together(large)
        check_files(large, self.file_digests, config.file_digests)

    @property
    def paths(self) -> dict[str, list[Path]]:
        """Files and folders that a small ``.nemo`` refers to, by the keys of the configuration."""
        located = {f"pretrained_{part}": [Path(path)] for part, path in self._paths.items()}
        beside = self.encoder_section.beside if self.encoder_section else None
        return located | {"encoder.beside.path": [Path(beside.path)] if beside else []}

    def path(self, part: str) -> Path | None:
        """Return the place of a part; ``None`` if it is inside the archive."""
        return self._paths.get(part)

    def reference(self, part: str) -> str:
        """Return the path or name of a part that the configuration gives."""
        return str(getattr(self._config, f"pretrained_{part}"))

    def _located_encoder(self, archive: OpenArchive | None) -> EncoderSection | None:
        """Return the encoder's section, with the path of a second encoder on this machine."""
        section = self._config.encoder
        if section is None or section.beside is None:
            return section
        key = "model.encoder.beside.path"
        path = _find(section.beside.path, key, DEMO_NAMES["asr"], _BESIDE, archive)
        return replace(section, beside=replace(section.beside, path=str(path)))

    def _check_full(self) -> None:
        """Refuse encoders that a full ``.nemo`` can't hold."""
        if self._config.nemo_content != "full" and not self.embedded:
            return
        encoder = self._paths.get("asr")
        foreign = f"{encoder} is of another kind" if encoder is not None and not kind_of(encoder).embeds else None
        if self.encoder_section and self.encoder_section.beside:
            foreign = "model.encoder.beside is a second one"
        if foreign:
            raise ValueError(
                f"a full .nemo holds one encoder of NeMo, and {foreign}: set model.nemo_content=small, and restore "
                "what came out of a full one with pretrained_llm too"
            )

    def _locate(self, part: str, archive: OpenArchive | None) -> Path:
        key = f"model.pretrained_{part}"
        return _find(self.reference(part), key, DEMO_NAMES[part], f"{{'pretrained_{part}': its path}}", archive)

    def _fingerprint(self, part: str, archive: OpenArchive | None) -> str:
        """Return the hash of a part, after comparing it with that of the part trained with."""
        wanted = self._config.fingerprints.get(part)
        if part in self.embedded:
            archive_with(part, archive)
            return self._config.fingerprints[part]
        path = self._paths[part]
        try:
            actual = self.llm.fingerprint if part == "llm" and self.llm else self._digest_of_encoders(path)
        except OSError as error:
            raise ValueError(f"model.pretrained_{part}={path} can't be read: {error}") from error
        if wanted not in (None, actual):
            reference = self.reference(part)
            then = archive.stored[f"pretrained_{part}"] if archive else reference
            raise ValueError(
                f"model.pretrained_{part} is {reference} with hash {actual}, but this model was trained with {wanted}"
                f"{'' if then == reference else f' ({then})'}: give the path of that one"
            )
        return actual

    def _digest_of_encoders(self, path: Path) -> str:
        digest = kind_of(path).fingerprint(path)
        if self.encoder_section is None or self.encoder_section.beside is None:
            return digest
        beside = Path(self.encoder_section.beside.path)
        return f"sha256:{digest_of([digest, kind_of(beside).fingerprint(beside)])}"

    def _sampled_files(self) -> dict[str, list[Path]]:
        """Return the files of each part of which the fingerprint covers samples only."""
        beside = self.encoder_section.beside if self.encoder_section else None
        encoders = [self._paths.get("asr"), Path(beside.path) if beside else None]
        files = [path for folder in encoders if folder and folder.is_dir() for path in kind_of(folder).files(folder)]
        return {"asr": sampled(files), "llm": self.llm.sampled_files() if self.llm else []}


def archive_with(part: str, archive: OpenArchive | None) -> OpenArchive:
    """Return the archive that holds a part.

    Raises:
        ValueError: if none is restored, or it does not hold the part.
    """
    if archive is None or archive.stored[f"pretrained_{part}"] != INSIDE[part]:
        raise ValueError(
            f"model.pretrained_{part}={INSIDE[part]} means a part inside a .nemo that is restored, but there is "
            "none: give a path"
        )
    return archive


def _find(reference: str, key: str, demo: str, override: str, archive: OpenArchive | None) -> Path:
    """Return the path of a part. What is not where it was trained may lie beside the archive."""
    if archive is not None and not Path(reference).expanduser().exists():
        beside = archive.path.parent / reference
        reference = str(beside) if beside.exists() else reference
    try:
        path = resolve(reference, key, demo)
    except ValueError as error:
        if archive is None:
            raise
        raise ValueError(f"{error}. If it has moved, restore with override_config_path={override}") from error
    llm = demo == DEMO_NAMES["llm"]
    if not (path.is_dir() if llm else kind_of(path).recognizes(path)):
        raise ValueError(f"{key}={reference}: {path} must be a {'directory' if llm else 'file'}")
    return path
