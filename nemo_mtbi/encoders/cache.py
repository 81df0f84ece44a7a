# SPDX-License-Identifier: Apache-2.0
"""Cache of the frozen encoder's frames, so that many runs over the same speech encode it once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from nemo_mtbi.encoders.paired import AnyEncoder
from nemo_mtbi.layouts.frames import FrameCounter

logger = logging.getLogger(__name__)
FRAMES, _DIGEST = "frames", "sha256"


class EncoderCache:
    """Caches frames by the content of the audio, in memory and in a folder that several runs may share.

    A missing utterance is encoded alone, without padding: its entry depends on its samples only, and not on the other
    utterances of a batch. Augmented audio is other audio: it fills the cache and gains
    nothing. Entries carry a digest: what is damaged, or lies in the place of another, is made again.

    Args:
        folder: made if it is missing; about 4 bytes x frames x width for each utterance.
        fingerprint: of the encoder.
        dtype: of the encoder.
        memory_bytes: of frames that this process holds beside the folder; the oldest go first.

    Attributes:
        hits: number of utterances so far that were in the cache.
        misses: number of utterances so far that were encoded.
        damaged: number of entries so far that differed from what was written, and were made again.
    """

    def __init__(self, folder: str | Path, fingerprint: str, dtype: torch.dtype, memory_bytes: int = 2**30):
        name = f"{fingerprint.removeprefix('sha256:')}-{str(dtype).removeprefix('torch.')}"
        self.folder = Path(folder).expanduser() / name
        # of versions that wrote no digests: what they have encoded is not encoded again
        self._older = self.folder.with_name(f"{fingerprint[:16]}-{str(dtype).removeprefix('torch.')}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.memory_bytes = memory_bytes
        self.hits = self.misses = self.damaged = 0
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0

    @torch.no_grad()
    def encode(self, encoder: AnyEncoder, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames that ``encoder`` gives for each utterance alone.

        Args:
            encoder: the one with the fingerprint.
            audio: ``[U, N]`` samples.
            lengths: ``[U]`` valid samples.

        Returns:
            ``[U, E, D]`` frames, zero behind their ``[U]`` valid lengths. ``E`` is what ``N`` samples give, so that
            it is equal in processes that encode different utterances of a batch.
        """
        frames = []
        for samples, length in zip(audio, lengths.tolist(), strict=True):
            samples = samples[:length]
            key = hashlib.blake2b(samples.float().cpu().numpy().tobytes(), digest_size=20).hexdigest()
            entry = self._find(key)
            self.hits, self.misses = self.hits + (entry is not None), self.misses + (entry is None)
            if entry is None:
                encoded, valid = encoder(samples[None], lengths.new_tensor([length]))  # [1, E, D]
                entry = encoded[0, : int(valid)].contiguous()
                self._store(key, entry)
            frames.append(entry.to(audio.device))
        counts = torch.tensor([len(one) for one in frames], device=audio.device)
        longest = FrameCounter(encoder.shape.stages, encoder.shape.sample_rate)(audio.shape[1])
        return torch.stack([F.pad(one, (0, 0, 0, longest - len(one))) for one in frames]), counts

    def _path(self, key: str, folder: Path) -> Path:
        return folder / key[:2] / f"{key}.safetensors"

    def _find(self, key: str) -> Tensor | None:
        if key in self._held:
            return self._held[key]
        for folder in (self.folder, self._older):
            path = self._path(key, folder)
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise RuntimeError(f"{path} can't be read ({error}): make it readable, or remove it") from error
            frames = self._parse(key, content, with_digest=folder == self.folder)
            if frames is not None:
                self._hold(key, frames)
                return frames
            self.damaged += 1
            logger.warning(f"{path} is damaged: the utterance is encoded again")
        return None

    def _parse(self, key: str, content: bytes, with_digest: bool) -> Tensor | None:
        """Return the frames of an entry; ``None`` if it is not the one that was written for these samples."""
        try:
            frames = load(content)[FRAMES]
            if not with_digest:
                return frames
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            digest = header["__metadata__"][_DIGEST]
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return frames if digest == self._digest(key, frames) else None

    def _digest(self, key: str, frames: Tensor) -> str:
        """Return SHA-256 of an entry: of the encoder, the samples and the frames."""
        name = f"{self.folder.name} {key} {frames.dtype} {list(frames.shape)} "
        data = frames.contiguous().view(-1).view(torch.uint8) if frames.numel() else frames.view(torch.uint8)
        return hashlib.sha256(name.encode() + data.numpy().tobytes()).hexdigest()

    def _store(self, key: str, frames: Tensor) -> None:
        path = self._path(key, self.folder)
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")  # other runs may write the same
        frames = frames.cpu()
        save_file({FRAMES: frames}, scratch, {_DIGEST: self._digest(key, frames)})
        scratch.replace(path)
        self._hold(key, frames)

    def _hold(self, key: str, frames: Tensor) -> None:
        self._held[key] = frames
        self._held_bytes += frames.nbytes
        while self._held_bytes > self.memory_bytes:
            oldest = next(iter(self._held))
            self._held_bytes -= self._held.pop(oldest).nbytes
