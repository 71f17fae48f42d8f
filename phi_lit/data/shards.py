"""The files of a token store: raw ids, cut into shards, each with what it takes to trust it.

A shard is written under a partial name, synced and renamed; a reader never sees a part of one. What
goes into shards is `building.py`'s to know, and how they are read `tokens.py`'s.
"""

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from phi_lit.files import PARTIAL, sync

UINT16_IDS = 1 << 16
"""Vocabularies up to this size are stored in two bytes an id."""

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Shard:
    """One file of a split: its tokens, the sha256 of its bytes, and crc32s of some places."""

    file: str
    tokens: int
    sha256: str
    samples: list[list[int]] = field(default_factory=list)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the stored type of ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= UINT16_IDS else "<u4")


def take_samples(path: Path, size: int) -> list[list[int]]:
    """Return [offset, crc32] of evenly spread places of a file: a check without reading it all."""
    samples = []
    with open(path, "rb") as file:
        for i in range(_SAMPLES):
            offset = max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1)
            file.seek(offset)
            samples.append([offset, zlib.crc32(file.read(_SAMPLE_BYTES))])
            if size <= _SAMPLE_BYTES:
                break
    return samples


class OpenShards:
    """The shard of each split that is being written, under a partial name until it is committed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._files: dict[str, IO[bytes]] = {}
        self._hashes: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        """Ids written since the last commit."""
        return sum(self._counts.values())

    def append(self, split: str, ids: np.ndarray) -> None:
        """Write ids to the open shard of a split."""
        if split not in self._files:
            self._files[split] = open(self._partial(split), "wb")  # noqa: SIM115
            self._hashes[split], self._counts[split] = hashlib.sha256(), 0
        content = ids.astype(self._dtype, copy=False).tobytes()
        self._files[split].write(content)
        self._hashes[split].update(content)
        self._counts[split] += len(ids)

    def commit(self, numbers: dict[str, int]) -> dict[str, Shard]:
        """Sync the open shards to the disk and give them their names; `numbers`: their places."""
        committed = {}
        for split, file in list(self._files.items()):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            partial, name = self._partial(split), f"{split}-{numbers[split]:05}.bin"
            samples = take_samples(partial, self._counts[split] * self._dtype.itemsize)
            digest = self._hashes[split].hexdigest()
            committed[split] = Shard(name, self._counts[split], digest, samples)
            os.replace(partial, self._path / name)
            del self._files[split], self._counts[split]
        sync(self._path)
        return committed

    def discard(self) -> None:
        """Drop what is not committed."""
        for split, file in self._files.items():
            with contextlib.suppress(OSError):  # closing flushes, and the disk may be full
                file.close()
            self._partial(split).unlink(missing_ok=True)
        self._files, self._counts = {}, {}

    def _partial(self, split: str) -> Path:
        return self._path / f".{split}{PARTIAL}{os.getpid()}"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def stream_digest(splits: dict[str, list[Shard]]) -> str:
    """Return one hash of the token streams of all splits, from their shards' hashes."""
    listing = {name: [shard.sha256 for shard in shards] for name, shards in splits.items()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
