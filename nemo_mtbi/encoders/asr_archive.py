# SPDX-License-Identifier: Apache-2.0
"""``.nemo`` archives of NeMo's ASR models, checked as a whole before anything of them is unpacked or built.

The encoder is built from its own sections and read in place. Where a whole model is wanted, for alignment, transcripts
or adaptation, it is a CTC model whose configuration is written anew from checked values: whatever else an archive's
configuration says (data, optimizers, decoders, tokenizers of the hub) is not passed to NeMo.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_mtbi.compat.nemo import set_restoring
from nemo_mtbi.compat.nemo_connector import WeightFileConnector
from nemo_mtbi.encoders.asr_settings import check_settings, ctc_settings, named_files
from nemo_mtbi.encoders.nemo_parts import CLASSES, build_encoder, check_encoder, fill_encoder
from nemo_mtbi.io.nemo_tar import CONFIG, WEIGHTS, Member, read_members
from nemo_mtbi.io.pickled import load_pickled
from nemo_mtbi.io.tensor_file import ArchiveError, StoredTensors
from nemo_mtbi.io.untrusted_yaml import read_yaml, shown

PICKLED = "model_weights.ckpt"  # as NeMo itself stores weights
_CONFIG_LIMIT = 2**22  # bytes; a vocabulary of thousands of pieces may stand in it several times
_GZIP_GROWTH = 20  # weights hardly shrink; what grows more is a bomb
_HEADS = {"ctc_decoder.": "decoder.", "decoder.": "decoder."}  # of a hybrid model, and of a CTC model


class AsrFile:
    """A NeMo ASR ``.nemo``: configuration and weights, read in place.

    Args:
        path: of the file.

    Attributes:
        settings: the configuration, plain values.
        members: names of all files in it.

    Raises:
        ArchiveError: if it is damaged, or holds files that no ASR model of NeMo has.
        RuntimeError: if it is packed, and there is no room to unpack it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ArchiveError("it is not a file" if self.path.exists() else "it does not exist")
        self._file = _open_tar(self.path)
        weakref.finalize(self, self._file.close)
        self._found = read_members(self._file, os.fstat(self._file.fileno()).st_size)
        self.members = frozenset(self._found)
        weights = self.members & {WEIGHTS, PICKLED}
        if CONFIG not in self.members or not weights:
            raise ArchiveError("it lacks its configuration or its weights")
        if len(weights) > 1:
            raise ArchiveError(f"it holds both {WEIGHTS} and {PICKLED}")
        self._weights = next(iter(weights))
        self.settings = read_yaml(self._read(CONFIG), CONFIG, _CONFIG_LIMIT)
        check_settings(self.settings)
        unknown = self.members - {CONFIG, self._weights} - named_files(self.settings)
        if unknown:
            raise ArchiveError(f"it holds {shown(', '.join(sorted(unknown)[:3]))}, which {CONFIG} does not name")
        self._state: StoredTensors | dict[str, Tensor] | None = None

    def _read(self, name: str) -> bytes:
        member = self._found[name]
        if member.size > _CONFIG_LIMIT:
            raise ArchiveError(f"{name} has {member.size} bytes, more than it can need")
        self._file.seek(member.start)
        return self._file.read(member.size)

    def _tensors(self) -> StoredTensors | dict[str, Tensor]:
        """Return the weights: read in place, or as a whole if NeMo has pickled them."""
        if self._state is None:
            member = self._found[self._weights]
            if self._weights == WEIGHTS:
                try:
                    self._state = StoredTensors(self._file, WEIGHTS, member.start, member.size)
                except ArchiveError as error:
                    raise ArchiveError(f"{error}; copy or save the archive again") from error
            else:
                self._state = load_pickled(io.BufferedReader(_Part(self._file, member)), PICKLED)
        return self._state

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights, by name."""
        state = self._tensors()
        if isinstance(state, StoredTensors):
            return state.shapes
        return {name: tuple(value.shape) for name, value in state.items()}

    @property
    def encoder_settings(self) -> dict[str, Any]:
        """Sections that front end and encoder are built from."""
        front = self.settings.get("preprocessor")
        rate = self.settings.get("sample_rate", front.get("sample_rate") if isinstance(front, dict) else None)
        return {**{name: self.settings.get(name) for name in CLASSES}, "sample_rate": rate}

    def probe(self, weights: bool = True) -> SimpleNamespace:
        """Build front end and encoder with tensors that hold nothing.

        Args:
            weights: whether to compare them with the stored ones.

        Raises:
            ArchiveError: as :func:`nemo_mtbi.encoders.nemo_parts.check_encoder`.
        """
        shapes = None
        if weights:
            prefixes = tuple(f"{name}." for name in CLASSES)
            shapes = {name: shape for name, shape in self.shapes.items() if name.startswith(prefixes)}
        return check_encoder(self.encoder_settings, shapes, CONFIG, self._weights)

    def encoder(self) -> SimpleNamespace:
        """Build front end and encoder with their weights.

        Returns:
            ``preprocessor``, ``encoder`` and ``cfg.sample_rate``, as an ASR model has them.

        Raises:
            ArchiveError: if the settings are not those of the weights, or ask for what is not built here.
        """
        self.probe()
        parts, state = build_encoder(self.encoder_settings, CONFIG), self._tensors()
        tensor = state.tensor if isinstance(state, StoredTensors) else state.__getitem__
        for name in CLASSES:
            fill_encoder(getattr(parts, name), lambda key, name=name: tensor(f"{name}.{key}"))
        return parts

    def ctc_settings(self) -> dict[str, Any]:
        """Return the configuration of the CTC model in it: see :func:`nemo_mtbi.encoders.asr_settings.ctc_settings`.

        Raises:
            ArchiveError: if it has no CTC head, or sizes are not those of the weights.
        """
        self.probe()
        return ctc_settings(self.settings, self.shapes, self.members)


class _Part(io.RawIOBase):
    """A member of an archive as a read-only file."""

    def __init__(self, file: BinaryIO, member: Member):
        super().__init__()
        self._file, self._member, self._at = file, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._member.size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        count = max(min(len(buffer), self._member.size - self._at), 0)
        self._file.seek(self._member.start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _open_tar(path: Path) -> BinaryIO:
    """Open an archive; one that NeMo before 1.7 has packed is unpacked to a temporary file."""
    file = open(path, "rb")  # noqa: SIM115 (read later)
    size, packed = os.fstat(file.fileno()).st_size, file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not packed:
        return file
    with file, gzip.open(path) as unpacked:
        stream = cast(BinaryIO, unpacked)  # GzipFile has its methods, but typeshed does not say so
        members = read_members(stream, _GZIP_GROWTH * size, whole=False)
        last = max((member.start + member.size for member in members.values()), default=0)
        check_room(path, last)
        plain = tempfile.TemporaryFile()  # noqa: SIM115
        stream.seek(0)
        _copy(stream, plain, last)
    plain.write(bytes(-last % 512 + 1024))
    plain.seek(0)
    return plain


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0:
        block = source.read(min(size, 2**20))
        if not block:
            raise ArchiveError("it is cut off")
        target.write(block)
        size -= len(block)


def check_room(path: Path, need: int) -> None:
    """Refuse to unpack what does not fit on the disk.

    Raises:
        RuntimeError: names the remedy.
    """
    folder = tempfile.gettempdir()
    if need > shutil.disk_usage(folder).free:
        raise RuntimeError(
            f"{path} unpacks to {need} bytes, but {folder} has too little free space: set TMPDIR to a larger folder"
        )


class TensorArchive(WeightFileConnector):
    """NeMo's connector for CTC models: weights as safetensors; NeMo's own ``.ckpt`` is read with ``weights_only``.

    Args:
        dtype: floating-point weights are stored in it; ``None`` keeps theirs.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.model_weights_ckpt = WEIGHTS
        self.dtype = dtype

    def load_config_and_state_dict(
        self,
        calling_cls,
        restore_path: str,
        override_config_path=None,
        map_location=None,
        strict: bool = True,
        return_config: bool = False,
        trainer=None,
        validate_access_integrity: bool = True,
    ):
        """Load as NeMo does, after checking what it unpacks, and with a configuration made of checked values.

        Raises:
            ArchiveError: if the archive is damaged, harmful or not a CTC model; nothing was unpacked then.
            RuntimeError: if there is no room to unpack it.
        """
        if override_config_path is not None or self.model_extracted_dir is not None:
            raise ValueError("an ASR model is restored as it is: from its file, and with its own configuration")
        archive = AsrFile(restore_path)
        settings = OmegaConf.create(archive.ctc_settings())
        if return_config:
            return settings
        check_room(archive.path, sum(member.size for member in archive._found.values()))
        cls = get_class(settings.target)  # else NeMo would build the abstract class where this one fails
        cls = calling_cls if issubclass(calling_cls, cls) else cls
        try:
            return super().load_config_and_state_dict(
                cls, restore_path, settings, map_location, strict, False, trainer, validate_access_integrity
            )
        except ArchiveError:
            raise
        except Exception as error:  # a damaged tokenizer raises errors of many libraries
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ArchiveError(f"NeMo can't build it ({shown(reason)})") from error
        finally:  # NeMo leaves this on after an error
            set_restoring(False)

    def modify_state_dict(self, conf, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a CTC model among those of any."""
        head = next(prefix for prefix in _HEADS if any(name.startswith(prefix) for name in state_dict))
        kept = {**{f"{name}.": f"{name}." for name in CLASSES}, head: _HEADS[head]}
        return {
            own + name.removeprefix(prefix): value
            for name, value in state_dict.items()
            for prefix, own in kept.items()
            if name.startswith(prefix)
        }

    def write_weights(self, state: Mapping[str, Tensor], path: str | Path) -> None:
        """Write weights as safetensors."""

        def stored(value: Tensor) -> Tensor:
            # a tensor that two names share is written twice: safetensors refuses aliases
            value = value.detach().cpu().clone().contiguous()
            return value.to(self.dtype) if self.dtype and value.is_floating_point() else value

        save_file({name: stored(value) for name, value in state.items()}, path)

    @staticmethod
    def read_weights(path: str | Path, map_location: Any = "cpu") -> Mapping[str, Tensor]:
        """Return weights of safetensors, or of the ``.ckpt`` of an archive that NeMo itself has written.

        Raises:
            ArchiveError: if the file is damaged.
        """
        path = Path(path)
        if path.suffix == ".safetensors" and not path.exists():
            path = path.with_suffix(".ckpt")  # an archive written by NeMo itself
            with open(path, "rb") as file:
                return load_pickled(file, path.name, map_location)
        try:
            return load_file(path, device=str(map_location or "cpu"))
        except (SafetensorError, EOFError, RuntimeError) as error:
            raise ArchiveError(f"{path.name} is damaged: {error}; copy or save the archive again") from error
